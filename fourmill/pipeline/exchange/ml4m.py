"""apple/ml-4m's layout, as its own loader reads it: one folder a modality, the same samples in the same order in each.

    ml4m         <modality>/shard-00012.tar          its modified WebDataset, for training: members `<key>.<extension>`
    ml4m-files   <modality>/shard-00012/<key>.<ext>  its plain folders, for small sets: paired there by sorted position

ml-4m keeps pictures and boxes in the frame of the whole picture and cuts the crop when it reads. So `frame` picture has
the pictures as they are and no maps of crops; `frame` crop has crop 0 of everything, cut, for maps and for training
tokenizers. ml-4m holds complete samples only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fourmill.modalities import Kind, modality, unknown
from fourmill.pipeline.exchange import ml4m_values
from fourmill.pipeline.exchange.layout import Content
from fourmill.pipeline.exchange.ml4m_values import Converted, Frame
from fourmill.pipeline.exchange.rows import Run, spec_fields
from fourmill.pipeline.exchange.stems import stem_of
from fourmill.pipeline.exchange.tars import archive
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.shards import Spec

MAPS = {"depth": "depth", "normal": "normal", "semseg": "semseg_coco", "canny_edge": "canny_edge"}
TEXTS = ("caption", "alt_text")  # the first of these that is chosen is ml-4m's caption
_PLAIN = ("rgb", "crop_settings", "det", "metadata", "color_palette", *TEXTS)
_REFUSED = {
    "sam_instance": "ml-4m reads its masks' tokens from pickles",
    "human_poses": "ml-4m reads HMR2's own output with pose codes inside",
}
_PATCH = {"dinov2": 14, "imagebind": 14}


class Ml4m:
    """Tars by modality; `Ml4mFiles` writes the same files one by one."""

    name: ClassVar[str] = "ml4m"
    keeps_incomplete: ClassVar[bool] = False
    frame: ClassVar[Frame] = "picture"

    def __init__(self, content: Content) -> None:
        self.content = content
        self.places = {name: self._folder(name) for name in self.content.modalities}
        if len({*self.places.values()}) < len(self.places):
            raise ValueError(f"two modalities would share a folder: {self.places}; choose one of them with --modality")

    @classmethod
    def select(cls, manifest: Manifest, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """Those asked for, or all that ml-4m can hold; crop_settings is always among them, as its loader wants it."""
        if wanted is None:
            chosen = [m for m in manifest.modalities if cls._refusal(m) is None]
            if "caption" in chosen:
                chosen = [m for m in chosen if m != "alt_text"]
        else:
            chosen = list(wanted)
        for name in chosen:
            if why := cls._refusal(name):
                raise ValueError(f"{name} has no place in {cls.name}: {why}")
        if "rgb" not in chosen and "det" in chosen:
            raise ValueError("det needs rgb beside it: ml-4m takes the picture's size from there to cut boxes")
        if "crop_settings" not in chosen:
            if "crop_settings" not in manifest.blocks:
                raise ValueError(
                    unknown("modality", "crop_settings", manifest.modalities) + "; ml-4m cannot do without"
                )
            chosen.append("crop_settings")
        return tuple(chosen)

    @classmethod
    def _refusal(cls, name: str) -> str | None:
        """Why ml-4m cannot hold a modality, None if it can."""
        entry = modality(name)
        if entry.name in _PLAIN or entry.kind is Kind.GRID:
            return None
        if entry.name in MAPS:
            return None if cls.frame == "crop" else "it is a map of a crop; choose --format ml4m-crops"
        if entry.name in _REFUSED:
            return _REFUSED[entry.name]
        if entry.kind is Kind.SEQUENCE:
            return f"ml-4m tokenizes {entry.source} itself when it reads"
        return "ml-4m knows no such files"

    def _folder(self, name: str) -> str:
        """What ml-4m calls it: `rgb`, `det`, `tok_depth@224`, and `caption` for the text."""
        entry = modality(name)
        if entry.name in MAPS:
            return MAPS[entry.name] + name[len(entry.name) :]
        texts = [t for t in TEXTS if t in self.content.modalities]
        if texts and name == texts[0]:
            return "caption"
        if entry.kind is not Kind.GRID or "@" in name or name.endswith("_global"):
            return name
        return f"{name}@{self.content.crop_size or _size_of(name, self.content.specs[name])}"

    def files(self, number: int, run: Run) -> Iterator[tuple[str, bytes, Mapping[str, int]]]:
        for name in self.content.modalities:
            found = [self._convert(name, run, row) for row in range(len(run.keys))]
            notes: dict[str, int] = {}
            for _, _, note in found:
                if note:
                    notes[f"{name}: {note}"] = notes.get(f"{name}: {note}", 0) + 1
            named = [(f"{stem_of(k)}.{e}", data) for k, (e, data, _) in zip(run.keys, found, strict=True)]
            yield from self._published(self.places[name], number, named, notes)

    def _published(
        self, folder: str, number: int, files: list[tuple[str, bytes]], notes: Mapping[str, int]
    ) -> Iterator[tuple[str, bytes, Mapping[str, int]]]:
        yield f"{folder}/shard-{number:05d}.tar", archive(files)[0], notes

    def _convert(self, name: str, run: Run, row: int) -> Converted:
        entry, part = modality(name), run.parts[name]
        stored = [column[row] for column in part.columns]
        if self.frame == "crop":
            return self._cut(name, run, row)
        if entry.kind is Kind.GRID:
            return ml4m_values.tokens(stored, part.spec)
        if entry.name == "rgb":
            return ml4m_values.picture(stored[0])
        if entry.name == "det":
            crops = [column[row] for column in run.parts["crop_settings"].columns]
            return ml4m_values.boxes(stored, crops, run.parts["rgb"].value(row))
        return self._same(entry.name, stored)

    def _same(self, name: str, stored: Sequence[Any]) -> Converted:
        """What does not depend on the frame."""
        if name == "crop_settings":
            return ml4m_values.crops(stored)
        if name == "color_palette":
            return ml4m_values.palettes(stored)
        if name == "metadata":
            return "json", stored[0].encode(), None
        return ml4m_values.caption(stored[0])

    def _cut(self, name: str, run: Run, row: int) -> Converted:
        """Crop 0 of a modality, as if it were the whole picture."""
        entry, part, size = modality(name), run.parts[name], self._size(run, row)
        stored = part.value(row)
        if entry.kind is Kind.GRID:
            return ml4m_values.tokens([stored], part.spec)
        if entry.name in MAPS:
            return ml4m_values.map_picture(entry, stored)
        if entry.name == "rgb":
            return ml4m_values.cut_picture(stored, run.parts["crop_settings"].value(row), size)
        if entry.name == "det":
            return ml4m_values.cut_boxes(stored)
        if entry.name == "crop_settings":
            return ml4m_values.crops([[0, 0, size, size, 0]])
        return self._same(entry.name, [stored])

    def _size(self, run: Run, row: int) -> int:
        """The side of the crop that labels were made from."""
        if self.content.crop_size:
            return self.content.crop_size
        for name, part in run.parts.items():
            if modality(name).name in MAPS:
                return ml4m_values.side_of(modality(name), part.value(row))
        raise ValueError("the crops' size is in no lineage and no map: export a map as well, or --format ml4m")

    def folders(self) -> dict[str, Any]:
        return {name: {"folder": folder} for name, folder in self.places.items()}

    def extra(self, parts: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bytes]]:
        yield from ()

    def usage(self, shards: int) -> str:
        folders = ",".join(sorted(self.places.values()))
        return (
            "For ml-4m's training configurations:\n\n```yaml\n"
            f"data_path: 'HERE/[{folders}]/shard-{{00000..{shards - 1:05d}}}.tar'\nuse_wds: True\n"
            "```\n\nKeep one of ml-4m's `modality_info` names per folder; `crop_settings` is read by itself.\n"
        )


class Ml4mFiles(Ml4m):
    """One file a sample and modality."""

    name: ClassVar[str] = "ml4m-files"

    def _published(
        self, folder: str, number: int, files: list[tuple[str, bytes]], notes: Mapping[str, int]
    ) -> Iterator[tuple[str, bytes, Mapping[str, int]]]:
        for index, (name, data) in enumerate(files):
            yield f"{folder}/shard-{number:05d}/{name}", data, {} if index else notes

    def usage(self, shards: int) -> str:
        return "For ml-4m's `build_fm_pretraining_dataset(data_path='HERE', ...)` (`use_wds: False`).\n"


class Ml4mCrops(Ml4m):
    """Crop 0 of everything, with maps, in tars."""

    name: ClassVar[str] = "ml4m-crops"
    frame: ClassVar[Frame] = "crop"

    def folders(self) -> dict[str, Any]:
        specs = self.content.specs
        return {m: {**place, "spec": spec_fields(replace(specs[m], crops=1))} for m, place in super().folders().items()}

    def usage(self, shards: int) -> str:
        return super().usage(shards) + "\nEvery picture here is the centre crop that the labels were made from.\n"


def _size_of(name: str, spec: Spec) -> int:
    """Pixels of the crop behind a grid of tokens, by ml-4m's patch of 16 (14 for DINOv2 and ImageBind)."""
    patch = _PATCH.get(modality(name).source or "", 16)
    rows = spec.grid[0] if spec.grid else round((spec.length or 0) ** 0.5)
    return rows * patch
