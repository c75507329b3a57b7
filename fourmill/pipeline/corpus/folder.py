"""Folders of images, each with `.txt` and `.json` beside it, or all with one captions table in the root.

Without a table the order is that of the images' paths; with one it is the table's, and images that it does not name
follow. Keys are paths without suffix. Paths in a table are a stranger's: none leads out of the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fourmill.pipeline.corpus import IMAGE_SUFFIXES, Corpus, Sample, fetch, stem_of, suffix_of
from fourmill.pipeline.corpus.table import TABLE_SUFFIXES, read_columns, read_rows
from fourmill.pipeline.corpus.values import (
    MAX_TEXT_BYTES,
    TEXT_FIELDS,
    as_metadata,
    as_text,
    bounded,
    caption_in,
    clean_text,
    first_of,
    found,
    named,
    printable,
)
from fourmill.pipeline.store import ObjectInfo

_PATH_FIELDS = ("file_name", "image", "path", "filename", "file", "image_path")
_TABLE_STEMS = ("captions", "metadata")
_PROSE = ("readme", "license", "licence")  # about the corpus, not captions whose image is missing


class FolderCorpus(Corpus):
    """Images in nested folders with sidecars, or with a table `captions.csv`, `.jsonl` or `.parquet`."""

    format = "folder"

    def _read(self) -> Iterator[Sample]:
        images = [o for o in self.objects if suffix_of(o.name) in IMAGE_SUFFIXES]
        if not images:
            raise ValueError(f"no images in {self.src!r}: looked for {', '.join(IMAGE_SUFFIXES)}")
        table = self._table()
        yield from self._with_sidecars(images) if table is None else self._with_table(images, table)

    def _with_sidecars(self, images: Sequence[ObjectInfo]) -> Iterator[Sample]:
        by_name = {o.name: o for o in self.objects}
        stems = {stem_of(o.name) for o in images}
        captions = [o for o in self.objects if suffix_of(o.name) == "txt" and not _is_prose(o.name)]
        lonely = [o for o in captions if stem_of(o.name) not in stems]
        used = {*(o.name for o in (*images, *captions)), *(f"{stem}.json" for stem in stems)}
        self.ignored.update(f".{suffix_of(name)} file" for name in by_name if name not in used)
        for info in sorted([*images, *lonely], key=lambda o: o.name):
            yield self._beside(info, by_name)

    def _beside(self, info: ObjectInfo, by_name: Mapping[str, ObjectInfo]) -> Sample:
        """The sample of one image, or of a caption that has none, with what stands beside it."""
        stem = stem_of(info.name)
        image = b""
        problem: str | None = "no image: a caption file without an image beside it"
        if suffix_of(info.name) != "txt":
            image, problem = fetch(self.store, info)
        metadata, metadata_problem = self._json(by_name.get(f"{stem}.json"))
        if f"{stem}.txt" in by_name:
            text, text_problem = self._text(by_name[f"{stem}.txt"])
        else:
            text, text_problem = caption_in(metadata, self.text_field)
        problems = found(rgb=problem, alt_text=text_problem, source=metadata_problem)
        return Sample(stem, image, text, metadata, printable(info.name), problems=problems)

    def _text(self, info: ObjectInfo) -> tuple[str | None, str | None]:
        data, problem = fetch(self.store, info, 8 * MAX_TEXT_BYTES)
        return (None, f"text {problem}") if problem else as_text(data)

    def _json(self, info: ObjectInfo | None) -> tuple[dict[str, Any], str | None]:
        if info is None:
            return {}, None
        data, problem = fetch(self.store, info, 8 * MAX_TEXT_BYTES)
        return ({}, f"metadata {problem}") if problem else as_metadata(data)

    def _with_table(self, images: Sequence[ObjectInfo], table: ObjectInfo) -> Iterator[Sample]:
        by_name = {o.name: o for o in images}
        others = (o.name for o in self.objects if o.name not in by_name and o.name != table.name)
        self.ignored.update(f".{suffix_of(name)} file" for name in others)
        path_field, text_field = self._columns(table)
        named_in_table: set[str] = set()
        for number, row in read_rows(self.store, table, self.damage):
            name = str(row.pop(path_field, None) or "").removeprefix("./")
            named_in_table.add(name)
            yield self._row(name, row, text_field, by_name, origin=f"{table.name}:{number}")
        for info in images:
            if info.name not in named_in_table:
                yield self._row(info.name, {}, None, by_name, origin=info.name)

    def _row(
        self,
        name: str,
        row: dict[str, Any],
        text_field: str | None,
        by_name: Mapping[str, ObjectInfo],
        *,
        origin: str,
    ) -> Sample:
        value = row.pop(text_field, None) if text_field else None
        text, text_problem = clean_text(first_of(value))
        metadata, metadata_problem = bounded({**row, "captions": value} if isinstance(value, list) else row)
        image = b""
        problem: str | None = f"no image: {printable(name)!r} is not in the folder"
        if name in by_name:
            image, problem = fetch(self.store, by_name[name])
        problems = found(rgb=problem, alt_text=text_problem, source=metadata_problem)
        return Sample(stem_of(name) or origin, image, text, metadata, printable(origin), problems=problems)

    def _table(self) -> ObjectInfo | None:
        """The captions table in the root: `captions.*`, else `metadata.*`, else the only one that names images."""
        tables = [o for o in self.objects if "/" not in o.name and suffix_of(o.name) in TABLE_SUFFIXES]
        for stem in _TABLE_STEMS:
            called = [o for o in tables if stem_of(o.name).lower() == stem]
            if len(called) == 1:
                return called[0]
            tables = called or tables
        if len(tables) > 1:
            raise ValueError(f"several tables in {self.src!r}: {[o.name for o in tables]}; call one captions.*")
        return tables[0] if tables and self._names_images(tables[0]) else None

    def _names_images(self, table: ObjectInfo) -> bool:
        return bool(self.image_field) or named(read_columns(self.store, table), _PATH_FIELDS) is not None

    def _columns(self, table: ObjectInfo) -> tuple[str, str | None]:
        """The table's columns of paths and of captions."""
        columns = read_columns(self.store, table)
        path_field = self.image_field or named(columns, _PATH_FIELDS)
        text_field = self.text_field or named(columns, TEXT_FIELDS)
        for wanted, looked in ((path_field, _PATH_FIELDS), (text_field, TEXT_FIELDS)):
            if wanted not in columns:
                sought = repr(wanted) if wanted else " or ".join(looked)
                raise ValueError(f"no column {sought} in {table.name} of {self.src!r}; it has {', '.join(columns)}")
        assert path_field is not None
        return path_field, text_field


def _is_prose(name: str) -> bool:
    return stem_of(name).rpartition("/")[2].lower() in _PROSE
