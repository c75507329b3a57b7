"""`manifest diff`: exactly what differs, in which shards and samples, by how much and why; nothing is read in vain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from token_toys import Literal
from typer.testing import CliRunner

from fourmill.cli import app
from fourmill.config import Config
from fourmill.pipeline.fingerprints import Retries
from fourmill.pipeline.manifest import Manifest, Update, read_manifest, update_manifest
from fourmill.pipeline.manifest import tables as records
from fourmill.pipeline.manifest.diff import ManifestDiff, ModalityDiff, diff
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import Spec, read_shard
from fourmill.pipeline.store import LocalStore, open_store


def opened(data: Literal) -> Manifest:
    return read_manifest(open_store(data.done()))


def only(found: ManifestDiff) -> ModalityDiff:
    (modality,) = found.modalities
    return modality


def depths(uri: str, first: float, spec: Spec | None = None, **options: Any) -> Literal:
    """Six samples in three shards; depth is 1 but for the first sample."""
    data = Literal(uri, [f"k{i}" for i in range(6)], shards=3)
    data.put("rgb", [b"x"] * 6)
    data.put("depth", [np.full((2, 2), first if i == 0 else 1.0, np.float32) for i in range(6)], spec=spec, **options)
    return data


# --- snapshots -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Snapshot 1: ingested. 2: labelled. 3: brightness doubled. 4: only shards put back into the plan."""
    folder = tmp_path_factory.mktemp("history")
    dataset = toys.make_dataset(folder, str(folder / "d"))
    for gain in (1.0, 2.0):
        assert run(Config.model_validate(toys.config(dataset, gain=gain))).ok
    again = Retries().raised("depth", [1, 3])
    update_manifest(open_store(dataset), lambda old: Update(retries=again))
    return dataset


def between(dataset: str, a: int, b: int, **options: Any) -> ManifestDiff:
    store = open_store(dataset)
    return diff(read_manifest(store, a), read_manifest(store, b), **options)


def test_a_snapshot_is_equal_to_itself_and_no_table_is_read(history: str) -> None:
    found = between(history, 3, 3)
    assert (found.equal, found.modalities, found.tables_read) == (True, (), 0)
    assert found.same == ("alt_text", "crop_settings", "depth", "det", "rgb", "semseg", "source", "tok_depth")


def test_modalities_that_came_or_went_are_added_or_removed(history: str) -> None:
    found = between(history, 1, 2)
    made = ["crop_settings", "depth", "det", "semseg", "tok_depth"]
    assert [(m.name, m.kind, m.shards.added) for m in found.modalities] == [(name, "added", 4) for name in made]
    assert found.same == ("alt_text", "rgb", "source")
    depth = found.modalities[1]
    assert (depth.rows, depth.present, depth.shards.first) == ((0, 24), (0, 24), {"added": [0, 1, 2, 3]})
    assert depth.producers[0].startswith("now made by Brightness version 1 (recipe ")
    back = between(history, 2, 1)
    assert [(m.name, m.kind, m.shards.removed) for m in back.modalities] == [(name, "removed", 4) for name in made]
    assert back.modalities[1].present == (24, 0)


def test_a_changed_option_is_said_in_words_for_what_it_touched_alone(history: str) -> None:
    found = between(history, 2, 3)
    words = {m.name: (m.kind, m.shards.changed, m.shards.same, m.producers) for m in found.modalities}
    because = ("its input depth changed (config.gain was 1.0, is 2.0)",)
    assert words == {
        "depth": ("changed", 4, 0, ("config.gain was 1.0, is 2.0",)),
        "semseg": ("changed", 4, 0, because),
        "tok_depth": ("changed", 4, 0, because),
    }
    assert found.tables_read == 6, "of three modalities in two snapshots; the others' tables are the same objects"


def test_shards_put_back_into_the_plan_are_told_and_are_no_difference_yet(history: str) -> None:
    found = between(history, 3, 4)
    assert (found.equal, found.retried) == (True, 2)


def test_only_the_modalities_asked_for_are_compared(history: str) -> None:
    assert [m.name for m in between(history, 2, 3, names=["depth", "rgb"]).modalities] == ["depth"]
    with pytest.raises(ValueError, match="unknown modality of these datasets 'dept'; did you mean 'depth'"):
        between(history, 2, 3, names=["dept"])


def test_measures_of_values_follow_from_what_the_labeler_did(history: str) -> None:
    found = {m.name: m.samples for m in between(history, 2, 3, samples=7).modalities}
    depth = found["depth"]
    assert depth is not None
    assert [(c.key, c.shard, c.row) for c in depth.changes] == [(f"{i:09}", i // 6, i % 6) for i in range(7)]
    assert (depth.shards_read, depth.shards_left, depth.rows_changed, depth.rows_same) == (2, 2, 12, 0)
    store = open_store(history)
    one = next(read_manifest(store, 2).records("depth"))
    before = read_shard(store, one.name).value(0)
    assert depth.changes[0].measure["max_abs_difference"] == pytest.approx(float(before.max()), rel=1e-3)
    assert depth.changes[0].measure["mean_abs_difference"] == pytest.approx(float(before.mean()), rel=1e-3)


# --- datasets ------------------------------------------------------------------------------------------------------


def test_datasets_on_two_stores_with_the_same_objects_are_equal(tmp_path: Path, s3_uri: str) -> None:
    found = diff(opened(depths(str(tmp_path / "a"), 1.0)), opened(depths(s3_uri, 1.0)), samples=5)
    assert (found.equal, found.same) == (True, ("depth", "rgb"))
    assert (found.a, found.b) == ((str(tmp_path / "a"), 1), (s3_uri, 1))


def test_one_changed_value_is_found_across_stores(tmp_path: Path, s3_uri: str) -> None:
    found = only(diff(opened(depths(str(tmp_path / "a"), 1.0)), opened(depths(s3_uri, 1.5)), samples=5))
    assert (found.name, found.kind, found.producers, found.shards.first) == ("depth", "changed", (), {"changed": [0]})
    assert (found.shards.same, found.shards.changed, found.shards.other_keys) == (2, 1, 0)
    assert found.samples is not None
    (change,) = found.samples.changes
    assert (change.key, change.shard, change.row) == ("k0", 0, 0)
    assert change.what == "differs by at most 0.5, 0.5 on average"
    assert (found.samples.rows_same, found.samples.rows_changed) == (1, 1)


def test_an_equal_value_made_by_another_version_is_a_changed_shard_of_unchanged_samples(tmp_path: Path) -> None:
    before = depths(str(tmp_path / "a"), 1.0, producer={"class": "Net", "version": 1})
    after = depths(str(tmp_path / "b"), 1.0, producer={"class": "Net", "version": 2})
    found = only(diff(opened(before), opened(after), samples=9))
    assert (found.producers, found.shards.changed) == (("version was 1, is 2",), 3)
    assert found.samples is not None
    assert (found.samples.changes, found.samples.rows_same, found.samples.shards_read) == ([], 6, 3)


def test_added_removed_and_changed_shards_are_told_apart_in_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BLOCK", 2)

    def made(uri: str, texts: dict[int, str]) -> Manifest:
        data = Literal(str(tmp_path / uri), [f"k{i}" for i in range(7)], shards=7)
        data.put("caption", [texts.get(i, "same") for i in range(7)])
        data.records = [r for r in data.records if texts.get(r.shard) != "absent"]
        return opened(data)

    a = made("a", {1: "old", 2: "absent", 4: "absent", 5: "absent"})
    b = made("b", {1: "new", 0: "absent", 3: "absent", 6: "absent"})
    found = only(diff(a, b, samples=9))
    assert found.shards.first == {"removed": [0, 3, 6], "changed": [1], "added": [2, 4, 5]}
    assert (found.shards.same, found.rows) == (0, (4, 4))
    assert found.samples is not None
    assert [c.what for c in found.samples.changes] == ["'old' before, 'new' after"]


def test_presence_and_reasons_are_compared(tmp_path: Path) -> None:
    def made(uri: str, *values: Any, **reasons: str) -> Manifest:
        data = Literal(str(tmp_path / uri), ["a", "b", "c"])
        data.put("caption", list(values), quarantine=reasons)
        return opened(data)

    a = made("a", "one", None, None, b="blank: no words", c="decode: cut")
    b = made("b", None, "two", None, a="too long: 900 words", c="decode: cut")
    found = only(diff(a, b, samples=9))
    assert (found.present, found.quarantined) == ((1, 1), {"blank": (1, 0), "too long": (0, 1)})
    assert found.samples is not None
    assert [(c.key, c.what) for c in found.samples.changes] == [
        ("a", "only A has a value: too long: 900 words"),
        ("b", "only B has a value: blank: no words"),
    ]


CAT, DOG = {"class_name": "cat", "box": [0, 0, 1, 1]}, {"class_name": "dog", "box": [0, 0, 1, 1]}
GRID = Spec(vocabulary=9, length=4, grid=(2, 2))
VALUES: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "tok_depth": (
        np.array([1, 2, 3, 4]),
        np.array([1, 2, 3, 5]),
        "25.0% of its tokens differ",
        {"changed_share": 0.25},
    ),
    "tok_caption": (
        np.array([1, 2]),
        np.array([1, 3, 4, 5]),
        "75.0% of its tokens differ, 2 tokens before and 4 after",
        {"changed_share": 0.75},
    ),
    "normal": (
        np.zeros((3, 1, 1)),
        np.array([0, 0, -2.0]).reshape(3, 1, 1),
        "differs by at most 2, 0.667 on average",
        {"max_abs_difference": 2.0, "mean_abs_difference": pytest.approx(2 / 3)},
    ),
    "clip": (
        np.zeros((2, 1, 1)),
        np.zeros((3, 1, 1)),
        "shape (2, 1, 1) before, (3, 1, 1) after",
        {"shapes": [[2, 1, 1], [3, 1, 1]]},
    ),
    "semseg": (
        np.array([[1, 1], [2, 3]]),
        np.array([[1, 1], [2, 2]]),
        "25.0% of its pixels are of another class",
        {"changed_share": 0.25},
    ),
    "canny_edge": (
        np.array([[0, 255]]),
        np.array([[255, 255]]),
        "differs by at most 255, 128 on average",
        {"max_abs_difference": 255.0, "mean_abs_difference": 127.5},
    ),
    "det": (
        [CAT],
        [CAT, DOG],
        '1 entry before, 2 after: [{"box": [0, 0, 1, 1], "class_name": "cat"}] before, '
        '[{"box": [0, 0, 1, 1], "class_name": "cat"}, {"box": [0, 0, 1, 1], "class_name": "dog"}] after',
        {"before": [CAT], "after": [CAT, DOG]},
    ),
    "metadata": (
        {"width": 4, "height": 3},
        {"width": 5, "height": 3},
        '{"width": 4} before, {"width": 5} after',
        {"before": {"width": 4}, "after": {"width": 5}},
    ),
    "rgb": (b"abc", b"abcde", "another file: 3 bytes before, 5 after", {"bytes": [3, 5]}),
    "crop_settings": (
        np.array([0, 0, 4, 4, 0]),
        np.array([0, 0, 4, 4, 1]),
        "[0, 0, 4, 4, 0] before, [0, 0, 4, 4, 1] after",
        {"before": [0, 0, 4, 4, 0], "after": [0, 0, 4, 4, 1]},
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_every_kind_are_measured(name: str, tmp_path: Path) -> None:
    before, after, what, measure = VALUES[name]
    spec = GRID if name == "tok_depth" else Spec(vocabulary=9) if name == "tok_caption" else None
    manifests = []
    for uri, value in (("a", before), ("b", after)):
        data = Literal(str(tmp_path / uri), ["k"])
        data.put(name, [value], spec=spec)
        manifests.append(opened(data))
    one, two = manifests
    samples = only(diff(one, two, samples=3)).samples
    assert samples is not None
    (change,) = samples.changes
    assert (change.what, change.measure) == (what, measure)


def test_the_crops_that_differ_are_counted_and_the_largest_gap_is_told(tmp_path: Path) -> None:
    manifests = []
    for uri, gap in (("a", 0.0), ("b", 3.0)):
        data = Literal(str(tmp_path / uri), ["k"], crops=3)
        data.put("depth", *[[np.full((1, 1), 1 + gap * crop)] for crop in range(3)])
        manifests.append(opened(data))
    one, two = manifests
    samples = only(diff(one, two, samples=3)).samples
    assert samples is not None
    assert samples.changes[0].what == "differs by at most 6, 4.5 on average (2 of 3 crops)"


def test_rows_are_matched_by_key(tmp_path: Path) -> None:
    a = Literal(str(tmp_path / "a"), ["x", "y", "gone"])
    a.put("caption", ["one", "two", "three"])
    b = Literal(str(tmp_path / "b"), ["y", "x", "new"])
    b.put("caption", ["two", "other", "four"])
    found = only(diff(opened(a), opened(b), samples=9))
    assert found.shards.other_keys == 1
    assert found.samples is not None
    assert [(c.key, c.row, c.what) for c in found.samples.changes] == [
        ("y", 0, "the same value, moved from row 1"),
        ("x", 1, "'one' before, 'other' after"),
        ("new", 2, "the sample is new"),
        ("gone", 2, "the sample is no longer there"),
    ]


def test_objects_that_are_gone_are_told_and_the_rest_is_compared(tmp_path: Path) -> None:
    a, b = opened(depths(str(tmp_path / "a"), 1.0)), opened(depths(str(tmp_path / "b"), 2.0, spec=Spec(convention="m")))
    lost = a.record("depth", 1)
    assert lost is not None
    a.store.delete(lost.name)
    samples = only(diff(a, b, samples=9)).samples
    assert samples is not None
    assert samples.problems == [f"no object {lost.name} in {a.store.uri}"]
    assert ([c.key for c in samples.changes], samples.shards_read) == (["k0"], 2)


def noting(names: list[str], read: Any) -> Any:
    def reading(store: LocalStore, name: str) -> Any:
        names.append(name)
        return read(store, name)

    return reading


def test_without_samples_no_object_is_opened(history: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    for method in ("get", "local_path"):
        monkeypatch.setattr(LocalStore, method, noting(read, getattr(LocalStore, method)))
    assert not between(history, 2, 3).equal
    assert all(name.startswith("manifest/") for name in read)


# --- command -------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["manifest", "diff", *arguments], standalone_mode=False)


@pytest.mark.parametrize(
    ("options", "code", "snapshots"),
    [
        ([], 0, (3, 4)),
        (["--to", "3"], 1, (2, 3)),
        (["--at", "1"], 1, (1, 4)),
        (["--at", "2", "--to", "2"], 0, (2, 2)),
    ],
)
def test_with_one_dataset_two_of_its_snapshots_are_compared(
    history: str, options: list[str], code: int, snapshots: tuple[int, int]
) -> None:
    done = command(history, *options, "--json")
    found = json.loads(done.stdout)
    assert (done.return_value, found["equal"]) == (code, code == 0)
    assert (found["a"][1], found["b"][1]) == snapshots


def test_the_table_says_what_differs_and_why(history: str) -> None:
    told = command(history, "--to", "3", "--samples", "1").stdout
    assert "config.gain was 1.0, is 2.0" in told
    assert "4 changed (0, 1, 2, 3)" in told
    assert "depth: 6 of 6 samples differ; changed shards read: 1, not read: 3" in told
    assert "the same: alt_text, crop_settings, det, rgb, source (6 record tables read)" in told


def test_a_first_snapshot_alone_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    refused = command(depths(str(tmp_path / "a"), 1.0).done())
    assert str(refused.exception).endswith("is the first there is: name another dataset, or --at N")
    with pytest.raises(FileNotFoundError, match=r"no manifest 9 in .*: it has snapshots 1 to 1"):
        CliRunner().invoke(
            app, ["manifest", "diff", str(tmp_path / "a"), "--at", "9"], standalone_mode=False, catch_exceptions=False
        )
