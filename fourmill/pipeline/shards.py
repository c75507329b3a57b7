"""A shard object: one modality of one run of samples, as an Arrow IPC file, and the record that describes it.

Row i of shard s is the same key in every modality. A value that could not be made is null, and the reason stands
in the object's own metadata, so that a record can always be derived from the object alone (`record_of`). Nothing in
the bytes depends on the clock, the host or the number of workers.

    <modality>/shard-000012.3f9a41c07d55e2b8.arrow     the object; the middle part is its fingerprint
    <modality>/shard-000012.3f9a41c07d55e2b8.json      its record

Columns: `key`, then `value`, or `crop_0`, `crop_1`, … for modalities with one value per recorded crop.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.modalities import Kind, Modality, modality
from fourmill.pipeline import codecs, statistics
from fourmill.pipeline.store import Store

FORMAT = 1
_NAME = re.compile(r"(?P<modality>[^/]+)/shard-(?P<shard>\d{6,})\.(?P<fingerprint>[0-9a-f]{16})\.(arrow|json)")


def digest(*parts: bytes | str) -> str:
    """SHA-256 over length-prefixed parts, as hex."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()


def canonical(value: Any) -> str:
    """JSON with one spelling for equal values: what fingerprints are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def shard_name(modality_name: str, shard: int, fingerprint: str, suffix: str = "arrow") -> str:
    return f"{modality_name}/shard-{shard:06d}.{fingerprint}.{suffix}"


def parse_name(name: str) -> tuple[str, int, str] | None:
    """(modality, shard, fingerprint) of an object or record name; None for any other object."""
    match = _NAME.fullmatch(name)
    return (match["modality"], int(match["shard"]), match["fingerprint"]) if match else None


@dataclass(frozen=True)
class Spec:
    """What a reader must know of a modality's values beyond the catalogue.

    `crops`: columns of a per-crop modality. For tokens: `vocabulary` size, `length` of a grid's row, `grid` (rows,
    columns). `classes`: names by id. `convention`: such as 'metric' for depth.
    """

    crops: int = 1
    vocabulary: int | None = None
    length: int | None = None
    grid: tuple[int, int] | None = None
    classes: tuple[str, ...] | None = None
    convention: str | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Spec:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**fields)


@dataclass(frozen=True)
class Record:
    """What is known of one committed shard object; all but `spent` follows from its bytes.

    `present`: rows that are not null. `keys_digest`: digest of the ordered keys, equal across modalities of a shard.
    `producer`: id of the lineage entry. `statistics`: min, max and, for tokens, a histogram of ids. `quarantined`:
    rows that could not be made, by reason. `spent`: seconds and attempts, not part of any digest.
    """

    modality: str
    shard: int
    fingerprint: str
    producer: str
    rows: int
    present: int
    num_bytes: int
    digest: str
    keys_digest: str
    spec: dict[str, Any]
    statistics: dict[str, Any] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def name(self) -> str:
        return shard_name(self.modality, self.shard, self.fingerprint)

    def to_json(self) -> bytes:
        return canonical(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes | str) -> Record:
        fields = json.loads(data)
        check_format(fields.get("format"), f"record of {fields.get('modality')} shard {fields.get('shard')}")
        return cls(**fields)


def check_format(found: Any, where: str, known: int | None = None) -> None:
    known = FORMAT if known is None else known
    if found != known:
        raise ValueError(f"{where} has format {found!r}; this Fourmill reads format {known}")


class Shard:
    """One shard object, open for reading; columns are views of its buffer (a memory map for local files)."""

    def __init__(self, table: pa.Table, data: pa.Buffer) -> None:
        meta = json.loads(table.schema.metadata[b"fourmill"])
        check_format(meta["format"], f"shard {meta.get('modality')} {meta.get('shard')}")
        self.table, self.data, self.meta = table, data, meta
        self._columns: dict[str, pa.Array] = {}
        self.entry = modality(meta["modality"])
        self.spec = Spec.from_json(meta["spec"])

    @property
    def keys(self) -> list[str]:
        return list(self.table["key"].to_pylist())

    @property
    def quarantine(self) -> dict[str, str]:
        """Reason by key, for the rows that are null because something went wrong here."""
        return dict(self.meta["quarantine"])

    def column(self, crop: int = 0) -> pa.Array:
        name = f"crop_{crop}" if self.entry.per_crop else "value"
        if name not in self._columns:  # objects hold one batch, so this is a view, not a copy
            chunks = self.table[name]
            self._columns[name] = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()
        return self._columns[name]

    def value(self, row: int, crop: int = 0) -> Any:
        """The decoded value of one row, None if it is null."""
        item = self.column(crop)[row]
        if not item.is_valid:
            return None
        if self.entry.kind is Kind.CROP or self.entry.is_tokens:
            return np.asarray(item.values)
        return codecs.decode(self.entry, item.as_py())

    def values(self, crop: int = 0, start: int = 0, stop: int | None = None) -> list[Any]:
        """Decoded values of rows start..stop, None where null."""
        rows = self.column(crop).slice(start, None if stop is None else stop - start)
        if self.entry.kind is Kind.CROP or self.entry.is_tokens:
            return [np.asarray(item.values) if item.is_valid else None for item in rows]
        return [codecs.decode(self.entry, item.as_py()) if item.is_valid else None for item in rows]

    def tokens(self, crop: int = 0) -> np.ndarray:
        """A grid modality's ids as one (rows, L) view, no copy; rows that are null hold zeros (see `valid`)."""
        column, length = self.column(crop), self.spec.length or 0
        flat = column.values.slice(column.offset * length, len(column) * length)
        return np.asarray(flat).reshape(len(column), -1)

    def valid(self, crop: int = 0) -> np.ndarray:
        """(rows,) bool: which rows hold a value."""
        return np.asarray(self.column(crop).is_valid())


def write_shard(
    modality_name: str,
    shard: int,
    fingerprint: str,
    keys: Sequence[str],
    columns: Sequence[Sequence[Any]],
    spec: Spec,
    producer: Mapping[str, Any],
    quarantine: Mapping[str, str],
) -> bytes:
    """The shard object's bytes. `columns`: for each crop (or once) the encoded values of all rows, None for null."""
    entry = modality(modality_name)
    assert all(len(c) == len(keys) for c in columns)
    assert len(columns) == spec.crops
    kind = codecs.arrow_type(entry, codecs.token_dtype(spec.vocabulary or 0), spec.length)
    names = [f"crop_{i}" for i in range(spec.crops)] if entry.per_crop else ["value"]
    meta = {
        "format": FORMAT,
        "modality": modality_name,
        "shard": shard,
        "fingerprint": fingerprint,
        "producer": dict(producer),
        "spec": {k: v for k, v in asdict(spec).items() if v is not None},
        "quarantine": dict(quarantine),
    }
    fields = [pa.field("key", pa.string(), nullable=False), *(pa.field(n, kind) for n in names)]
    schema = pa.schema(fields, metadata={b"fourmill": canonical(meta).encode()})
    arrays = [pa.array(keys, pa.string()), *(_array(column, kind, entry) for column in columns)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:  # one batch, uncompressed: a row is an address
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return bytes(sink.getvalue().to_pybytes())


def _array(column: Sequence[Any], kind: pa.DataType, entry: Modality) -> pa.Array:
    if entry.kind in (Kind.GRID, Kind.CROP):
        length = kind.list_size
        blank = np.zeros(length, dtype=kind.value_type.to_pandas_dtype())
        flat = np.concatenate([blank if v is None else _row(v, length, entry) for v in column] or [blank[:0]])
        mask = pa.array([v is None for v in column], pa.bool_())
        return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind, mask=mask)
    return pa.array(column, kind)


def _row(value: Any, length: int, entry: Modality) -> np.ndarray:
    if len(value) != length:
        raise ValueError(f"{entry.name}: a row of {len(value)} where the shard's rows have {length}")
    return np.asarray(value)


def read_shard(store: Store, name: str) -> Shard:
    """Open a shard object: memory-mapped if it is a local file, read whole otherwise."""
    path = store.local_path(name)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"no object {name} in {store.uri}")
    data = pa.memory_map(str(path)).read_buffer() if path is not None else pa.py_buffer(store.get(name))
    return open_shard(data, f"{name} in {store.uri}")


def open_shard(data: pa.Buffer, where: str) -> Shard:
    """A shard object from its bytes. ValueError if they are not a whole one; `where` names it."""
    try:
        table = pa.ipc.open_file(data).read_all()
        # Damaged offsets would abort the process on first use. 0.3 ms for 50,000 x 196 tokens.
        table.validate(full=True)
        return Shard(table, data)
    except (pa.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is not a whole shard object: {error}") from error


def commit(store: Store, data: bytes, spent: Mapping[str, float] | None = None) -> Record:
    """Publish a shard object and its record; if another writer was first, its object stands and ours is dropped."""
    record = record_of(data, spent)
    if not store.create(record.name, data):
        theirs = store.get(record.name)
        if theirs != data:
            record = record_of(theirs, spent)
    store.create(shard_name(record.modality, record.shard, record.fingerprint, "json"), record.to_json())
    return record


def record_of(data: bytes, spent: Mapping[str, float] | None = None) -> Record:
    """The record that belongs to a shard object's bytes."""
    shard = open_shard(pa.py_buffer(data), "an object to be recorded")
    present = sum(shard.column(i).is_valid().to_numpy(zero_copy_only=False) for i in range(_columns(shard)))
    return Record(
        modality=shard.meta["modality"],
        shard=shard.meta["shard"],
        fingerprint=shard.meta["fingerprint"],
        producer=producer_id(shard.meta["producer"]),
        rows=len(shard.keys),
        present=int(np.count_nonzero(np.asarray(present) == _columns(shard))),
        num_bytes=len(data),
        digest=hashlib.sha256(data).hexdigest(),
        keys_digest=digest(*shard.keys),
        spec=shard.meta["spec"],
        statistics=statistics.compute(shard),
        quarantined=dict(sorted(Counter(map(reason_kind, shard.quarantine.values())).items())),
        spent=dict(spent or {}),
    )


def _columns(shard: Shard) -> int:
    return shard.spec.crops if shard.entry.per_crop else 1


def producer_id(producer: Mapping[str, Any]) -> str:
    return digest(canonical(producer))[:16]


def reason_kind(reason: str) -> str:
    """Reasons are counted by their first part: 'decode: truncated at byte 512' counts as 'decode'."""
    return reason.split(":", 1)[0]
