"""Parquet that Hugging Face `datasets` opens with pictures: one file a shard, one row a sample, a column a modality.

    Fourmill            column                                        in `datasets`
    verbatim, png8      struct<bytes, path>                           Image: a PIL picture
    utf8                string                                        str
    json                string with the JSON text; `det` is a list    str; list of {class_name, score, box}
    grid, crops         fixed-size list of integers                   list
    sequence            list of integers                              list
    float16             binary: a .npy file of float16                bytes: np.load(io.BytesIO(b))

Crop 2 of `depth` is the column `depth__2`. Maps of float16 are not pictures, since 8 or 16 bits of grey lose something.
`key` is the sample's key; `quarantine` says, as JSON by modality, why a value is null.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fourmill.modalities import Kind, Modality, modality
from fourmill.pipeline import codecs
from fourmill.pipeline.exchange import members
from fourmill.pipeline.exchange.layout import Content
from fourmill.pipeline.exchange.rows import Part, Run, WrongDataError
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.shards import Spec, canonical

_ROW_GROUP = 100  # rows that a viewer must fetch to show one; 20 MB of pictures of 200 KB
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_BOX_FIELDS = ("box", "class_name", "score")
_OBJECT = pa.struct([("box", pa.list_(pa.float64())), ("class_name", pa.string()), ("score", pa.float64())])


def column_name(name: str, crop: int) -> str:
    return f"{name}__{crop}" if crop else name


class Parquet:
    """`data/train-00012.parquet`."""

    name: ClassVar[str] = "parquet"
    keeps_incomplete: ClassVar[bool] = True

    def __init__(self, content: Content) -> None:
        self.content = content

    @classmethod
    def select(cls, manifest: Manifest, wanted: Sequence[str] | None) -> tuple[str, ...]:
        return tuple(wanted if wanted is not None else manifest.modalities)

    def files(self, number: int, run: Run) -> Iterator[tuple[str, bytes, Mapping[str, int]]]:
        columns: dict[str, pa.Array] = {"key": pa.array(run.keys, pa.string())}
        features: dict[str, Any] = {"key": _value("string")}
        for name in self.content.modalities:
            entry, part = modality(name), run.parts[name]
            for crop, values in enumerate(part.columns):
                columns[column_name(name, crop)] = _column(entry, part.spec, values, run.keys)
                features[column_name(name, crop)] = _feature(entry, part.spec)
        columns["quarantine"] = pa.array([_reasons(run.parts, key) for key in run.keys], pa.string())
        features["quarantine"] = _value("string")
        schema = pa.schema(
            [(n, c.type) for n, c in columns.items()],
            metadata={b"huggingface": canonical({"info": {"features": features}}).encode()},
        )
        sink = io.BytesIO()
        table = pa.Table.from_arrays(list(columns.values()), schema=schema)
        pq.write_table(table, sink, row_group_size=_ROW_GROUP, compression="zstd", use_dictionary=False)
        yield f"data/{self.content.split}-{number:05d}.parquet", sink.getvalue(), {}

    def folders(self) -> dict[str, Any]:
        return {name: {"column": name} for name in self.content.modalities}

    def extra(self, parts: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bytes]]:
        yield from ()

    def usage(self, shards: int) -> str:
        split = self.content.split
        return (
            "```python\nfrom datasets import load_dataset\n"
            f'dataset = load_dataset("parquet", data_dir="data", split="{split}")\n```\n'
        )


def _reasons(parts: Mapping[str, Part], key: str) -> str | None:
    reasons = {name: part.quarantine[key] for name, part in parts.items() if key in part.quarantine}
    return canonical(reasons) if reasons else None


def _column(entry: Modality, spec: Spec, values: Sequence[Any], keys: Sequence[str]) -> pa.Array:
    if entry.codec in ("verbatim", "png8"):
        rows = [
            v and {"bytes": v, "path": f"{k}.{members.image_extension(v)}"} for k, v in zip(keys, values, strict=True)
        ]
        return pa.array(rows, _PICTURE)
    if entry.name == "det":
        return pa.array([None if v is None else _objects(v) for v in values], pa.list_(_OBJECT))
    if entry.codec == "float16":
        return pa.array([None if v is None else members.to_file(entry, v)[1] for v in values], pa.binary())
    return pa.array(values, _arrow_type(entry, spec))


def _arrow_type(entry: Modality, spec: Spec) -> pa.DataType:
    return codecs.arrow_type(entry, codecs.token_dtype(spec.vocabulary or 0), spec.length)


def _objects(text: str) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = json.loads(text)
    odd = sorted({name for o in objects for name in o} ^ set(_BOX_FIELDS)) if objects else []
    if odd:
        raise ValueError(f"det has objects whose fields are not {', '.join(_BOX_FIELDS)}: {', '.join(odd)}")
    return objects


def _feature(entry: Modality, spec: Spec) -> Any:
    """What `datasets` is told of a column, in words that its versions 3 to 5 understand: `Sequence` of numbers, but a
    plain list around a struct, of which a `Sequence` would make a struct of lists."""
    if entry.codec in ("verbatim", "png8"):
        return {"_type": "Image"}
    if entry.name == "det":
        inner = {"box": _list(_value("float64")), "class_name": _value("string"), "score": _value("float64")}
        return [inner]
    if entry.codec == "float16":
        return _value("binary")
    if entry.kind is Kind.CROP:
        return _list(_value("int32"), 5)
    if entry.is_tokens:
        length = spec.length if entry.kind is Kind.GRID else None
        return _list(_value(codecs.token_dtype(spec.vocabulary or 0)), length or -1)
    return _value("string")


def _value(dtype: str) -> dict[str, Any]:
    return {"_type": "Value", "dtype": dtype}


def _list(feature: Any, length: int = -1) -> dict[str, Any]:
    return {"_type": "Sequence", "feature": feature, "length": length}


def read(data: bytes, specs: Mapping[str, Spec], where: str) -> Run:
    """A shard back from its file; WrongDataError names `where` if it is not one of ours."""
    try:
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        keys = table["key"].to_pylist()
        reasons = [json.loads(text) if text else {} for text in table["quarantine"].to_pylist()]
        parts = {
            name: Part(
                spec,
                [_stored(modality(name), table[column_name(name, crop)]) for crop in range(spec.crops)],
                {key: why[name] for key, why in zip(keys, reasons, strict=True) if name in why},
            )
            for name, spec in specs.items()
        }
    except (pa.ArrowException, KeyError, OSError, json.JSONDecodeError) as error:
        raise WrongDataError(f"{where} is not a whole Parquet export: {error}") from error
    return Run(keys, parts)


def _stored(entry: Modality, column: pa.ChunkedArray) -> list[Any]:
    rows = column.to_pylist()
    if entry.codec in ("verbatim", "png8"):
        return [row and row["bytes"] for row in rows]
    if entry.name == "det":
        return [None if row is None else codecs.encode(entry, row) for row in rows]
    if entry.codec == "float16":
        return [None if row is None else members.from_file(entry, row) for row in rows]
    if entry.kind is Kind.CROP or entry.is_tokens:
        return [None if row is None else np.asarray(row) for row in rows]
    return list(rows)
