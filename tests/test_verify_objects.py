"""What `verify --deep` finds in objects whose bytes are their record's: values that cannot be, and lying records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import add, build, newest, object_name, object_of, overwrite, put

from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.manifest.verify import CODES, Options, Problem, Verification, verify
from fourmill.pipeline.shards import Record, Spec, record_of
from fourmill.pipeline.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    found = LocalStore(tmp_path / "dataset")
    build(found)
    return found


def deep(store: LocalStore, **options: Any) -> Verification:
    return verify(store, newest(store), Options(deep=True, **options))


def depth_bytes(value: np.ndarray) -> bytes:
    """As the codec would store it, did it not refuse NaN."""
    sound = codecs.encode(modality("depth"), np.zeros_like(value))
    planes = np.frombuffer(value.astype(np.float16).tobytes(), np.uint8).reshape(-1, 2).T
    import pyarrow as pa

    return bytes(sound[:9]) + bytes(pa.Codec("zstd").compress(planes.tobytes(), asbytes=True))


RAMP = np.arange(64, dtype=np.float32).reshape(8, 8)
NAN = RAMP.copy()
NAN[2, 3] = np.nan
DAMAGED = [
    ("tok_depth", np.array([1, 2, 256, 4]), "token-range", "token 256 at 2; the vocabulary has 256 ids"),
    ("depth", depth_bytes(NAN), "not-finite", "1.6% of the values are NaN or infinite"),
    ("depth", RAMP[:4], "wrong-shape", "is of shape (4, 8), most of the shard are (8, 8)"),
    ("depth", RAMP - 5, "bad-value", "negative depth: down to -5, in a map that is called metric"),
    ("depth", b"\x02nonsense", "undecodable-value", "cannot be decoded: "),
    ("det", [{"box": [0.5, 0.2, 0.1, 0.9], "class_name": "cat", "score": 0.5}], "bad-value", "bad box: "),
    ("det", [{"box": [0.1, 0.2, 0.5, 0.9], "class_name": "cat"}], "bad-value", "is not what det promises: KeyError"),
    ("caption", "  ", "bad-value", "blank text: '  '"),
]


@pytest.mark.parametrize(("name", "value", "code", "words"), DAMAGED, ids=[f"{d[0]} {d[2]}" for d in DAMAGED])
def test_a_value_that_cannot_be_is_named_by_row_and_key(
    store: LocalStore, name: str, value: Any, code: str, words: str
) -> None:
    put(store, object_of(name, 1, values={3: value}))
    (problem,) = deep(store).problems
    assert (problem.code, problem.name, problem.shard) == (code, object_name(name, 1), 1)
    assert (problem.row, problem.key) == (3, "s1r3")
    assert problem.what.startswith(f"row 3 (s1r3): {words}")


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("depth", np.full((8, 8), 2.5), "every value is 2.5"),
        ("tok_depth", np.full(4, 7), "every token is 7"),
    ],
)
def test_a_value_that_is_one_number_everywhere_is_a_warning(
    store: LocalStore, name: str, value: np.ndarray, what: str
) -> None:
    put(store, object_of(name, 1, values={3: value}))
    outcome = deep(store)
    assert outcome.ok
    assert outcome.warned == {"constant-value": 1}
    where: dict[str, Any] = {"modality": name, "shard": 1, "row": 3, "key": "s1r3", "warning": True}
    assert outcome.warnings == (
        Problem("constant-value", object_name(name, 1), f"row 3 (s1r3): {what}", **where),
    )  # fmt: skip


def test_a_picture_that_cannot_be_decoded_is_a_warning_as_the_corpus_had_it_so(store: LocalStore) -> None:
    put(store, object_of("rgb", 1, values={3: b"\xff\xd8 no more"}))
    outcome = deep(store)
    assert (outcome.ok, outcome.warned) == (True, {"undecodable-value": 1})


def test_rows_that_are_null_are_not_looked_into(store: LocalStore) -> None:
    put(store, object_of("depth", 1, values={3: None}, quarantine={"s1r3": "decode: truncated"}))
    put(store, object_of("tok_depth", 1, values={3: None}))
    outcome = deep(store)
    assert (outcome.ok, outcome.warnings) == (True, ())


def test_a_grid_of_another_length_than_its_spec_is_found(store: LocalStore) -> None:
    spec = Spec(vocabulary=256, length=4, grid=(2, 3))
    put(store, object_of("tok_depth", 1, spec=spec))
    assert [(p.code, p.what) for p in deep(store).problems] == [
        ("wrong-length", "rows of 4 tokens are no grid of 2 x 3")
    ]


LIES: list[tuple[dict[str, Any], str, str]] = [
    ({"rows": 6}, "wrong-rows", "has 5 rows; its record says 6"),
    ({"present": 4}, "wrong-presence", "has 5 values; its record says 4"),
    (
        {"spec": {"crops": 1, "convention": "relative"}},
        "wrong-spec",
        "its spec is {'convention': 'metric', 'crops': 1}",
    ),
    ({"quarantined": {"decode": 1}}, "wrong-quarantine", "quarantines 0 rows; its record: {'decode': 1}"),
    ({"producer": "0" * 16}, "wrong-identity", "holds depth shard 1 of fingerprint "),
    ({"keys_digest": "0" * 64}, "wrong-keys", "its keys are not those of its record, but those of"),
]


@pytest.mark.parametrize(("lie", "code", "words"), LIES, ids=[lie[1] for lie in LIES])
def test_a_record_that_lies_is_found_by_its_object(
    store: LocalStore, lie: dict[str, Any], code: str, words: str
) -> None:
    data = object_of("depth", 1)
    record = replace(record_of(data), digest="0" * 64)
    add(store, [record])  # a shard is only replaced if its digest changes
    record = replace(record_of(data), **lie)
    overwrite(store, record.name.replace(".arrow", ".json"), record.to_json())
    add(store, [record])
    problems = [p for p in deep(store).problems if p.code not in ("unknown-producer", "mixed-generations")]
    assert [(p.code, p.name) for p in problems] == [(code, record.name)]
    assert problems[0].what.startswith(words)


def test_an_object_under_another_shards_name_is_found(store: LocalStore) -> None:
    theirs, name = object_of("caption", 2), object_name("caption", 1)
    overwrite(store, name, theirs)
    record = replace(record_of(theirs), shard=1, fingerprint=name.split(".")[1])
    overwrite(store, name.replace(".arrow", ".json"), record.to_json())
    add(store, [record])
    codes = [(p.code, p.name, p.row) for p in deep(store).problems]
    assert codes == [("wrong-identity", name, None), ("wrong-keys", name, 0)]


def test_a_quarantined_key_that_is_not_there_is_found(store: LocalStore) -> None:
    put(store, object_of("depth", 1, quarantine={"s9r9": "decode: truncated"}))
    assert [(p.code, p.key) for p in deep(store).problems] == [("wrong-quarantine", "s9r9")]


def test_bytes_that_are_no_shard_object_but_the_records_are_a_bad_format(store: LocalStore) -> None:
    record = newest(store).record("depth", 1)
    assert record is not None
    import hashlib

    data = b"x" * record.num_bytes
    overwrite(store, record.name, data)
    add(store, [replace(record, digest=hashlib.sha256(data).hexdigest())])
    assert [(p.code, p.name) for p in deep(store).problems] == [("bad-format", record.name)]


def test_a_lost_json_record_is_named(store: LocalStore) -> None:
    name = object_name("depth", 1, "json")
    store.delete(name)
    assert verify(store, newest(store)).ok
    assert [(p.code, p.name, p.what) for p in deep(store).problems] == [
        ("missing-record", name, "the JSON record is gone")
    ]


def test_a_json_record_that_differs_from_the_manifests_is_named_with_both(store: LocalStore) -> None:
    name = object_name("depth", 1, "json")
    fields = json.loads(store.get(name))
    overwrite(store, name, json.dumps({**fields, "present": 2}).encode())
    assert [(p.code, p.name, p.what) for p in deep(store).problems] == [
        ("wrong-record", name, "is not the manifest's: present 2 for 5")
    ]
    overwrite(store, name, b"<html>")
    assert [p.code for p in deep(store).problems] == ["wrong-record"]


def test_statistics_that_the_object_does_not_bear_out_are_a_warning(store: LocalStore) -> None:
    name = object_name("caption", 1, "json")
    fields = json.loads(store.get(name))
    del fields["statistics"]["words"]["bins"]
    overwrite(store, name, json.dumps(fields).encode())
    record = Record.from_json(store.get(name))
    add(store, [replace(record, digest="0" * 64)])  # a shard is only replaced if its digest changes
    add(store, [record])
    outcome = deep(store)
    assert outcome.ok
    assert [(w.code, w.name) for w in outcome.warnings] == [("other-statistics", name)]


@pytest.mark.parametrize(
    ("order", "keys", "code", "what"),
    [
        ([1, 2, 3, 4, 0], None, "misordered-rows", "5 rows stand in another order"),
        ([0, 1, 2, 3, 4], ["s1r0", "s1r1", "x", "s1r3", "s1r4"], "wrong-keys", "row 2 is 'x'; in the shard's other"),
        ([0, 1, 2, 3], None, "wrong-keys", "has 4 keys where the shard's other modalities have 5"),
    ],
)
def test_keys_that_differ_from_the_other_modalities_are_named(
    store: LocalStore, order: list[int], keys: list[str] | None, code: str, what: str
) -> None:
    put(store, object_of("depth", 1, rows=order, **({"keys": keys} if keys else {})))
    (problem,) = deep(store).problems
    assert (problem.code, problem.name) == (code, object_name("depth", 1))
    assert problem.what.startswith(what)


def test_every_code_that_the_library_can_give_is_described() -> None:
    import re

    import fourmill.pipeline.manifest.verify as package

    source = "".join(p.read_text() for p in Path(package.__file__).parent.glob("*.py"))
    given = set(re.findall(r'(?:Problem|_problem|problem|Flaw)\(\s*(?:record, )?"([a-z-]+)"', source))
    assert {"missing-object", "swapped-rows", "token-range", "wrong-record"} <= given
    assert given <= set(CODES)
