"""Parquet corpora: one row a sample, image bytes in a column, as Hugging Face's datasets and web crawls have them.

Rows are read a few at a time. A row's key is its own (`key`, `__key__`, `id`) or the file's name and the row's
number, which do not depend on what else can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fourmill.pipeline.corpus import Corpus, Sample, stem_of, suffix_of
from fourmill.pipeline.corpus.table import NotParquetError, open_parquet, parquet_batches
from fourmill.pipeline.corpus.values import TEXT_FIELDS, bounded, clean_text, first_of, found, named, printable
from fourmill.pipeline.store import ObjectInfo

_IMAGE_FIELDS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content", "data")
_KEY_FIELDS = ("key", "__key__", "id")


@dataclass(frozen=True)
class _Columns:
    """Which column is what; `image` is bytes, or a struct with the field `bytes`."""

    image: str
    text: str | None
    key: str | None
    binary: tuple[str, ...]


class ParquetCorpus(Corpus):
    """Images as `struct<bytes, path>` (Hugging Face) or binary; every other plain column becomes metadata."""

    format = "parquet"

    def _read(self) -> Iterator[Sample]:
        files = [o for o in self.objects if suffix_of(o.name) == "parquet"]
        if not files:
            raise ValueError(f"no .parquet files in {self.src!r}")
        self.ignored.update(f".{suffix_of(o.name)} file" for o in self.objects if suffix_of(o.name) != "parquet")
        for info in files:
            try:
                yield from self._read_file(info)
            except NotParquetError as error:
                self.damage.append(f"{info.name}: {error}")

    def _read_file(self, info: ObjectInfo) -> Iterator[Sample]:
        with open_parquet(self.store, info) as parquet:
            columns = self._columns(info.name, parquet.schema_arrow)
            self.ignored.update({f"column {c}": parquet.metadata.num_rows for c in columns.binary})
            names = [n for n in parquet.schema_arrow.names if n not in columns.binary]
            for start, rows in parquet_batches(parquet, info.name, self.damage, names):
                for number, row in enumerate(rows, start):
                    yield self._sample(row, columns, info.name, number)

    def _sample(self, row: dict[str, Any], columns: _Columns, name: str, number: int) -> Sample:
        image, problem = _image(row.pop(columns.image))
        value = row.pop(columns.text, None) if columns.text else None
        text, text_problem = clean_text(first_of(value))
        own_key = row.get(columns.key) if columns.key else None
        key = f"{stem_of(name)}-{number:08d}" if own_key in (None, "") else str(own_key)
        metadata, metadata_problem = bounded({**row, "captions": value} if isinstance(value, list) else row)
        problems = found(rgb=problem, alt_text=text_problem, source=metadata_problem)
        return Sample(key, image, text, metadata, printable(f"{name}:{number}"), problems=problems)

    def _columns(self, name: str, schema: pa.Schema) -> _Columns:
        images = [f.name for f in schema if _is_image(f.type)]
        texts = [f.name for f in schema if _is_text(f.type)]
        where = f"{name} of {self.src!r}; its columns are {', '.join(f'{f.name} ({f.type})' for f in schema)}"
        image = self.image_field or named(images, _IMAGE_FIELDS) or (images[0] if len(images) == 1 else None)
        if image not in images:
            sought = repr(self.image_field) if self.image_field else "that is struct<bytes, path> or binary"
            hint = f" (several could be: {', '.join(images)}; image_field picks one)" if len(images) > 1 else ""
            raise ValueError(f"no column of image bytes {sought}{hint} in {where}")
        if self.text_field and self.text_field not in texts:
            raise ValueError(f"no column of text {self.text_field!r} in {where}")
        assert image is not None
        others = tuple(f.name for f in schema if _is_image(f.type) and f.name != image)
        return _Columns(image, self.text_field or named(texts, TEXT_FIELDS), named(schema.names, _KEY_FIELDS), others)


def _image(value: Any) -> tuple[bytes, str | None]:
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            return b"", f"no image: the row holds only the path {printable(str(path))!r}"
    return (b"", "no image: the row's image is null") if value is None else (bytes(value), None)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(f.name == "bytes" and _is_image(f.type) for f in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
