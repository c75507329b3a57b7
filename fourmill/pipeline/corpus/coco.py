"""COCO captions: `captions_*.json` beside folders of images; several captions for each picture.

The order is that of the files' names and of the `images` list in each. The first caption is the sample's text, all of
them stand in `metadata['captions']`. A caption whose picture is not listed is a sample without an image.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fourmill.pipeline.corpus import IMAGE_SUFFIXES, Corpus, Sample, fetch, is_coco, locate, stem_of, suffix_of
from fourmill.pipeline.corpus.values import bounded, clean_text, found, printable
from fourmill.pipeline.store import ObjectInfo, Store

_log = logging.getLogger(__name__)
_MAX_FILE_BYTES = 2 << 30  # COCO 2017's captions for 118,287 pictures are 92 MB


class CocoCorpus(Corpus):
    """Keys are image ids of 12 digits, as in COCO's own file names."""

    format = "coco"

    def __init__(self, src: str, store: Store, objects: Sequence[ObjectInfo], *fields: str | None) -> None:
        self._chosen = ""
        if len(objects) == 1 and suffix_of(objects[0].name) == "json":  # `src` is the file: images lie around it
            root, _, leaf = src.rpartition("/")
            inside = root == "annotations" or root.endswith("/annotations")
            self._chosen = f"annotations/{leaf}" if inside else leaf
            store, objects = locate(root[: -len("annotations")].rstrip("/") or "." if inside else root or ".")
        super().__init__(src, store, objects, *fields)
        if any(fields):
            _log.warning("text_field and image_field have no effect on a coco corpus: its fields are fixed")

    def _read(self) -> Iterator[Sample]:
        files = [o for o in self.objects if (o.name == self._chosen if self._chosen else is_coco(o.name))]
        if not files:
            raise ValueError(f"no captions_*.json in {self.src!r}: that is what COCO calls its caption files")
        pictures: dict[str, list[ObjectInfo]] = defaultdict(list)
        for info in self.objects:
            if suffix_of(info.name) in IMAGE_SUFFIXES:
                pictures[_leaf(info.name)].append(info)
        used = {o.name for o in files}
        for info in files:
            yield from self._read_file(info, pictures, used)
        self.ignored.update(f".{suffix_of(o.name)} file that is not listed" for o in self.objects if o.name not in used)

    def _read_file(
        self, info: ObjectInfo, pictures: Mapping[str, list[ObjectInfo]], used: set[str]
    ) -> Iterator[Sample]:
        listed, captions = self._parse(info)
        split = stem_of(_leaf(info.name)).removeprefix("captions_")  # captions_val2017.json: pictures in val2017/
        for number, entry in enumerate(listed):
            origin = f"{info.name}:images[{number}]"
            image, problem = b"", "no image: its entry has no file_name"
            if file_name := str(entry.get("file_name") or ""):
                picture = _find(file_name, split, pictures)
                problem = f"no image: {printable(file_name)!r} is not in the corpus"
                if picture is not None:
                    used.add(picture.name)
                    image, fault = fetch(self.store, picture)
                    problem = fault or ""
            own = captions.pop(entry.get("id"), [])
            yield _sample(entry.get("id"), image, problem, own, entry=entry, origin=origin)
        for image_id, own in captions.items():
            reason = f"no image: {info.name} has captions for id {image_id!r}, but no such image"
            yield _sample(image_id, b"", reason, own, entry={}, origin=f"{info.name}:annotations")

    def _parse(self, info: ObjectInfo) -> tuple[list[dict[str, Any]], dict[Any, list[Any]]]:
        """The images listed in one file, and the captions by image id, in the file's order."""
        where = f"{info.name} in {self.store.uri}"
        if info.num_bytes > _MAX_FILE_BYTES:
            raise ValueError(f"{where} has {info.num_bytes} bytes; at most {_MAX_FILE_BYTES} are read")
        try:
            root = json.loads(self.store.get(info.name))
            captions: dict[Any, list[Any]] = {}
            for annotation in root["annotations"]:
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
            images = [dict(entry) for entry in root["images"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{where} is not in COCO's caption format (images, annotations): {error!r}") from error
        return images, captions


def _sample(
    image_id: Any, image: bytes, problem: str, captions: list[Any], *, entry: Mapping[str, Any], origin: str
) -> Sample:
    text, text_problem = clean_text(captions[0] if captions else None)
    metadata, metadata_problem = bounded({**entry, "captions": captions})
    problems = found(rgb=problem, alt_text=text_problem, source=metadata_problem)
    return Sample(str(image_id).zfill(12), image, text, metadata, printable(origin), problems=problems)


def _find(file_name: str, split: str, pictures: Mapping[str, list[ObjectInfo]]) -> ObjectInfo | None:
    """The picture of that path, or in the split's folder, or the only one of that name."""
    named = pictures.get(_leaf(file_name), [])
    for ending in (file_name, f"{split}/{file_name}"):
        fitting = [o for o in named if o.name == ending or o.name.endswith(f"/{ending}")]
        if len(fitting) == 1:
            return fitting[0]
    return named[0] if len(named) == 1 else None


def _leaf(name: str) -> str:
    return name.rpartition("/")[2]
