"""Shards and codecs: literal values in, exact values and bytes out, and no two writers lose anything."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fourmill.modalities import CATALOGUE, modality
from fourmill.pipeline import codecs
from fourmill.pipeline.shards import (
    Record,
    Spec,
    commit,
    parse_name,
    read_shard,
    record_of,
    shard_name,
    write_shard,
)
from fourmill.pipeline.statistics import unpack_counts
from fourmill.pipeline.store import LocalStore, Store, open_store

FINGERPRINT = "0123456789abcdef"
PRODUCER = {"class": "test", "version": 1, "config": {}}
RAMP = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


def encoded(name: str, values: Sequence[Any]) -> list[Any]:
    return [None if v is None else codecs.encode(modality(name), v) for v in values]


def shard_bytes(name: str, values: Sequence[Any], spec: Spec | None = None, **changes: Any) -> bytes:
    """A shard of these values, the same in every crop column, under keys k0, k1, …"""
    spec = spec or Spec()
    arguments: dict[str, Any] = {
        "keys": [f"k{i}" for i in range(len(values))],
        "columns": [encoded(name, values)] * spec.crops,
        "producer": PRODUCER,
        "quarantine": {},
        "shard": 3,
        "fingerprint": FINGERPRINT,
        **changes,
    }
    return write_shard(name, spec=spec, **arguments)


def stored(store: Store, data: bytes) -> str:
    record = record_of(data)
    assert store.create(record.name, data)
    return record.name


# --- codecs --------------------------------------------------------------------------------------------------------

EXACT = [
    ("rgb", b"\xff\xd8 any bytes \x00"),
    ("alt_text", "naïve 猫 \U0001f408\n"),
    ("source", {"b": [1, 2.5, None, True], "a": {"ü": "x"}}),
    ("det", [{"box": [0.1, 0.2, 0.30000000000000004, 1.0], "class_name": "cat", "score": 0.5}]),
    ("semseg", np.array([[0, 1, 255], [7, 0, 254]], np.uint8)),
    ("crop_settings", np.array([1, 2, 300, 40_000, 0], np.int32)),
    ("tok_depth", np.array([0, 5, 65_535], np.uint16)),
    ("tok_caption", np.array([29_999], np.uint16)),
]


@pytest.mark.parametrize(("name", "value"), EXACT, ids=[name for name, _ in EXACT])
@pytest.mark.parametrize("backend", ["memory", "local"])
def test_a_value_without_loss_comes_back_the_same_from_a_shard(
    name: str, value: Any, backend: str, tmp_path: Path
) -> None:
    spec = Spec(vocabulary=65_536, length=3) if name.startswith("tok_") else Spec()
    store = LocalStore(tmp_path)
    shard = read_shard(store, stored(store, shard_bytes(name, [value, None, value], spec)))
    for found in (shard.value(0), shard.value(2), shard.values()[2], shard.values(start=2)[0]):
        np.testing.assert_array_equal(found, value) if isinstance(value, np.ndarray) else _same(found, value)
    assert shard.value(1) is None
    assert shard.valid().tolist() == [True, False, True]
    assert shard.keys == ["k0", "k1", "k2"]


def _same(found: Any, value: Any) -> None:
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("name", ["depth", "normal", "clip", "clip_global", "dinov2"])
def test_float16_keeps_its_stated_bound_and_its_shape(name: str) -> None:
    rng = np.random.default_rng(0)
    for shape in ((7,), (5, 9), (3, 4, 5), (1, 1), (2, 0)):
        value = (rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, shape)).astype(np.float32)
        found = codecs.decode(modality(name), codecs.encode(modality(name), value))
        assert (found.shape, found.dtype) == (shape, np.float32)
        assert (np.abs(found - value) <= np.maximum(np.abs(value) * 2.0**-11, 2.0**-25)).all()


def test_float16_gives_exactly_these_values() -> None:
    value = np.array([[0.0, -1.5, 65504.0], [1 / 3, 1e-8, 2049.0]], np.float32)
    found = codecs.decode(modality("depth"), codecs.encode(modality("depth"), value))
    assert found.tolist() == [[0.0, -1.5, 65504.0], [0.333251953125, 0.0, 2048.0]]


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=lambda e: e.name)
def test_settle_is_the_round_trip(entry: Any) -> None:
    values: dict[str, Any] = {"verbatim": b"x", "utf8": "x", "json": {"b": (1, 2), "a": 0.1}, "png8": RAMP.astype(int)}
    values |= {"float16": RAMP, "int32": [1, 2, 3, 4, 5], "tokens": np.array([1, 2], np.uint16)}
    value = values[entry.codec]
    found = codecs.decode(entry, codecs.encode(entry, value))
    settled = codecs.settle(entry, value)
    np.testing.assert_array_equal(found, settled)
    assert np.asarray(found).dtype == np.asarray(settled).dtype


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("depth", np.array([[np.nan]]), "NaN or infinite"),
        ("depth", np.array([[np.inf]]), "NaN or infinite"),
        ("depth", np.array([[70_000.0]]), "at most 65504"),
        ("semseg", np.array([[256]]), "ids 0..255"),
        ("semseg", np.array([[-1]]), "ids 0..255"),
        ("semseg", np.zeros((1, 2, 3)), r"\(H, W\)"),
    ],
)
def test_a_value_that_a_codec_cannot_hold_is_refused(name: str, value: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        codecs.encode(modality(name), value)


def test_a_float16_header_that_asks_for_too_much_is_refused() -> None:
    hostile = b"\x02" + np.array([1 << 20, 1 << 20], "<u4").tobytes() + b"x"
    with pytest.raises(ValueError, match="larger than any"):
        codecs.decode(modality("depth"), hostile)


def test_png8_reads_nothing_but_png() -> None:
    file = io.BytesIO()
    Image.new("L", (2, 2)).save(file, "BMP")
    with pytest.raises(Exception, match="cannot identify"):
        codecs.decode(modality("semseg"), file.getvalue())


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_token_dtype_is_the_narrowest_that_holds_every_id(vocabulary: int, dtype: str) -> None:
    spec = Spec(vocabulary=vocabulary, length=2)
    data = shard_bytes("tok_rgb", [np.array([0, vocabulary - 1])], spec)
    column = pa.ipc.open_file(pa.py_buffer(data)).read_all()["crop_0"]
    assert str(column.type.value_type) == dtype
    assert column.to_pylist() == [[0, vocabulary - 1]]


# --- shards --------------------------------------------------------------------------------------------------------


def test_crops_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    store, spec = LocalStore(tmp_path), Spec(crops=2, vocabulary=100, length=2)
    columns = [[np.array([1, 2]), None], [np.array([3, 4]), np.array([5, 6])]]
    shard = read_shard(store, stored(store, shard_bytes("tok_rgb@448", [0, 0], spec, columns=columns)))
    assert [v if v is None else v.tolist() for v in shard.values(0)] == [[1, 2], None]
    assert shard.value(1, crop=1).tolist() == [5, 6]
    assert shard.tokens(0).tolist() == [[1, 2], [0, 0]]
    assert shard.tokens(1).tolist() == [[3, 4], [5, 6]]
    assert shard.valid(0).tolist() == [True, False]


def test_sequences_of_any_length_come_back() -> None:
    data = shard_bytes("tok_caption", [np.array([5, 6, 7]), np.array([], int), None], Spec(vocabulary=100))
    assert [v and list(v) for v in pa.ipc.open_file(pa.py_buffer(data)).read_all()["value"].to_pylist()] == [
        [5, 6, 7],
        [],
        None,
    ]
    assert record_of(data).statistics["tokens"] == 3


def test_a_grid_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 3 where the shard's rows have 2"):
        shard_bytes("tok_rgb", [np.array([1, 2]), np.array([1, 2, 3])], Spec(vocabulary=9, length=2))


def test_a_token_that_does_not_fit_its_type_is_refused() -> None:
    with pytest.raises((ValueError, OverflowError)):
        shard_bytes("tok_rgb", [np.array([1, 70_000])], Spec(vocabulary=100, length=2))


def test_same_inputs_give_same_bytes_and_any_change_other_bytes() -> None:
    whole = shard_bytes("alt_text", ["a", None])
    assert shard_bytes("alt_text", ["a", None]) == whole
    assert record_of(shard_bytes("alt_text", ["a", None])).digest == record_of(whole).digest
    changes: list[dict[str, Any]] = [{"keys": ["k0", "kx"]}, {"shard": 4}, {"quarantine": {"k1": "decode: x"}}]
    for change in [*changes, {"producer": {**PRODUCER, "version": 2}}, {"columns": [["b", None]]}]:
        assert shard_bytes("alt_text", ["a", None], **change) != whole


def test_a_record_follows_from_the_object_alone() -> None:
    spec = Spec(crops=2, vocabulary=10, length=2)
    columns = [[np.array([1, 2]), None, np.array([9, 9])], [np.array([2, 2]), np.array([3, 3]), np.array([0, 1])]]
    quarantine = {"k1": "decode: broken at 5"}
    data = shard_bytes("tok_rgb", [0, 0, 0], spec, columns=columns, quarantine=quarantine)
    record = record_of(data)
    assert (record.modality, record.shard, record.fingerprint) == ("tok_rgb", 3, FINGERPRINT)
    assert (record.rows, record.present, record.num_bytes) == (3, 2, len(data))  # k1 lacks its first crop
    assert record.quarantined == {"decode": 1}
    assert (record.statistics["tokens"], record.statistics["min"], record.statistics["max"]) == (10, 0, 9)
    assert unpack_counts(record.statistics["histogram"]).tolist() == [1, 2, 3, 2, 0, 0, 0, 0, 0, 2]
    assert Record.from_json(record.to_json()) == record
    assert record.keys_digest == record_of(shard_bytes("alt_text", ["x", "y", "z"])).keys_digest


def test_an_empty_shard_is_a_shard(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name, spec in (("alt_text", Spec()), ("tok_rgb", Spec(vocabulary=10, length=4))):
        shard = read_shard(store, stored(store, shard_bytes(name, [], spec)))
        assert (shard.keys, shard.values()) == ([], [])


def test_names_of_objects_are_read_back_and_others_are_not_ours() -> None:
    assert shard_name("tok_depth@448", 12, FINGERPRINT) == f"tok_depth@448/shard-000012.{FINGERPRINT}.arrow"
    assert parse_name(f"tok_depth@448/shard-000012.{FINGERPRINT}.arrow") == ("tok_depth@448", 12, FINGERPRINT)
    assert parse_name(shard_name("rgb", 1_234_567, FINGERPRINT)) == ("rgb", 1_234_567, FINGERPRINT)
    for name in ("rgb/shard-12.0123456789abcdef.arrow", "rgb/x.arrow", "manifest/000001.json", "a/b/shard-000001.x"):
        assert parse_name(name) is None


def test_commit_of_the_same_shard_twice_publishes_once(store_uri: str) -> None:
    store, data = open_store(store_uri), shard_bytes("alt_text", ["a"])
    first = commit(store, data)
    assert commit(store, data) == first
    assert [info.name for info in store.list()] == [first.name, first.name.replace(".arrow", ".json")]
    assert Record.from_json(store.get(first.name.replace(".arrow", ".json"))) == first


def test_commit_after_another_writer_keeps_and_reports_theirs(store_uri: str) -> None:
    store = open_store(store_uri)
    theirs = commit(store, shard_bytes("alt_text", ["theirs"]))
    ours = commit(store, shard_bytes("alt_text", ["ours"]))  # the same fingerprint, as from another device
    assert ours == theirs
    assert read_shard(store, ours.name).values() == ["theirs"]


@pytest.mark.parametrize("damage", ["empty", "cut", "tail", "footer", "offsets", "text", "foreign"])
def test_a_damaged_object_is_a_clear_error_naming_it(store_uri: str, damage: str) -> None:
    store, data = open_store(store_uri), shard_bytes("alt_text", ["some text"] * 50)
    offsets = np.arange(0, 51 * 9, 9, dtype="<i4").tobytes()  # 50 texts of 9 bytes
    assert offsets in data
    sink = pa.BufferOutputStream()
    table = pa.table({"key": ["k"]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    broken = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "footer": data[:-100] + b"\xff" * 90 + data[-10:],  # its length and the closing mark are right
        "tail": data[:-40] + b"\xff" * 40,
        "offsets": data.replace(offsets, np.full(51, 1 << 30, "<i4").tobytes()),  # reading these would end the process
        "text": b"<html>404</html>",
        "foreign": sink.getvalue().to_pybytes(),  # a whole Arrow file, but none of ours
    }[damage]
    name = shard_name("alt_text", 3, FINGERPRINT)
    store.create(name, broken)
    with pytest.raises(ValueError, match=f"{name} in .* is not a whole shard object"):
        read_shard(store, name).values()


def test_a_missing_object_is_not_found(store_uri: str) -> None:
    with pytest.raises(FileNotFoundError, match="shard-000003"):
        read_shard(open_store(store_uri), shard_name("alt_text", 3, FINGERPRINT))


def test_another_format_is_refused_naming_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourmill.pipeline.shards.FORMAT", 2)
    store, data = LocalStore(tmp_path), shard_bytes("alt_text", ["a"])
    record = replace(record_of(data), format=2).to_json()
    name = stored(store, data)
    monkeypatch.setattr("fourmill.pipeline.shards.FORMAT", 1)
    with pytest.raises(ValueError, match=r"has format 2; this Fourmill reads format 1"):
        read_shard(store, name)
    with pytest.raises(ValueError, match=r"record of alt_text shard 3 has format 2; this Fourmill reads format 1"):
        Record.from_json(record)


def test_an_unknown_modality_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown modality 'tok_dpeth'; did you mean 'tok_depth'"):
        modality("tok_dpeth@448")
