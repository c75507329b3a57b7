"""Plan, worker and in-process runner: what is made, what is redone and why, what happens to bad samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from helpers import all_records

from fourmill.checkpoints import is_non_commercial
from fourmill.config import Config, ConfigError, load_config
from fourmill.pipeline.component import Batch
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.manifest.verify import verify
from fourmill.pipeline.plan import make_plan
from fourmill.pipeline.runner import BudgetExceededError, run
from fourmill.pipeline.shards import Shard, read_shard
from fourmill.pipeline.store import open_store


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return toys.make_dataset(tmp_path, str(tmp_path / "dataset"))


def config(dataset: str, **options: Any) -> Config:
    return Config(**toys.config(dataset, **options))


def digests(dataset: str) -> dict[str, str]:
    return {r.name: r.digest for r in all_records(read_manifest(open_store(dataset)))}


def shards_of(dataset: str, modality: str) -> list[Shard]:
    store = open_store(dataset)
    return [read_shard(store, r.name) for r in read_manifest(store).records(modality)]


def values_of(dataset: str, modality: str) -> dict[str, Any]:
    return {k: v for s in shards_of(dataset, modality) for k, v in zip(s.keys, s.values(), strict=True)}


def test_every_modality_gets_one_aligned_shard_per_input_shard(dataset: str) -> None:
    report = run(config(dataset))
    manifest = read_manifest(open_store(dataset))
    assert report.ok
    assert report.samples == 3 * 24  # geometry, labels, more
    for name in ("crop_settings", "depth", "det", "semseg", "tok_depth"):
        assert [r.rows for r in manifest.records(name)] == [6, 6, 6, 6]
    assert verify(open_store(dataset), manifest).ok


def test_labels_are_the_components_outputs_on_the_recorded_crop(dataset: str) -> None:
    run(config(dataset))
    depth = values_of(dataset, "depth")["000000005"]
    crop = values_of(dataset, "crop_settings")["000000005"]
    pixels = np.asarray(toys.picture(5).crop((4, 0, 36, 32)).resize((16, 16), 3), dtype=np.float32)
    assert crop.tolist() == [0, 4, 32, 32, 0]
    assert np.abs(depth - pixels.mean(-1)).max() < 4  # JPEG
    assert values_of(dataset, "tok_depth")["000000005"].tolist() == toys._blocks(depth).tolist()


def test_annotated_boxes_move_with_the_crop(dataset: str) -> None:
    run(config(dataset))
    # 40 x 32 picture, crop x 4..36: 0.25 * 40 = 10 -> (10 - 4) / 32 = 0.1875
    expected = {"box": [0.1875, 0.25, 0.8125, 0.75], "class_name": "box", "score": 1.0}
    assert values_of(dataset, "det")["000000000"] == [expected]


def test_second_run_has_nothing_to_do(dataset: str) -> None:
    first = run(config(dataset))
    before = {i.name for i in open_store(dataset).list()}
    again = run(config(dataset))
    assert not again.plan.num_units
    assert again.manifest.snapshot == first.manifest.snapshot
    assert {i.name for i in open_store(dataset).list()} == before


def test_resolved_configuration_lies_beside_what_it_made(tmp_path: Path, dataset: str) -> None:
    run(config(dataset, gain=0.25))
    store = open_store(dataset)
    (name,) = [i.name for i in store.list("manifest/config-")]
    path = tmp_path / "resolved.yaml"
    path.write_bytes(store.get(name))
    assert load_config(path) == config(dataset, gain=0.25)


def test_fused_stage_without_stored_labels_makes_the_same_tokens(tmp_path: Path, dataset: str) -> None:
    run(config(dataset))
    other = toys.make_dataset(tmp_path, str(tmp_path / "fused"))
    stages = {"all": {"labelers": ["bright", "blocks"], "store": ["tok_depth"]}}
    run(config(other, stages=stages))
    tokens = {n: d for n, d in digests(dataset).items() if n.startswith("tok_depth/")}
    assert len(tokens) == 4
    assert tokens.items() <= digests(other).items()
    assert "depth" not in read_manifest(open_store(other)).modalities


def test_batch_size_changes_neither_bytes_nor_plan(tmp_path: Path, dataset: str) -> None:
    run(config(dataset))
    other = toys.make_dataset(tmp_path, str(tmp_path / "other"))
    run(config(other, batch_size=5))
    assert digests(other) == digests(dataset)


def test_changed_option_makes_its_shards_and_their_dependants_stale(dataset: str) -> None:
    run(config(dataset))
    store = open_store(dataset)
    plan = make_plan(store, read_manifest(store), config(dataset, gain=0.5))
    stale = {m for u in plan.units() for m in u.makes}
    assert stale == {"depth", "semseg", "tok_depth"}  # not det, not crop_settings
    reasons = {reason: count for totals in plan.totals.values() for reason, count in totals.reasons.items()}
    because = "its input depth changed (config.gain was 1.0, is 0.5)"
    assert reasons == {
        "depth: stale: config.gain was 1.0, is 0.5": 4,
        f"semseg: stale: {because}": 4,
        f"tok_depth: stale: {because}": 4,
    }


def test_going_back_to_an_earlier_configuration_recomputes_nothing(dataset: str) -> None:
    run(config(dataset))
    before = digests(dataset)
    run(config(dataset, gain=0.5))
    assert digests(dataset) != before
    back = run(config(dataset))
    assert not back.plan.num_units
    assert digests(dataset) == before


def test_changed_crops_make_everything_stale(dataset: str) -> None:
    run(config(dataset))
    tree = {**toys.config(dataset), "crops": {"size": 32}}
    store = open_store(dataset)
    plan = make_plan(store, read_manifest(store), Config(**tree))
    assert {m for u in plan.units() for m in u.makes} == {"crop_settings", "depth", "det", "semseg", "tok_depth"}


def test_object_whose_record_was_never_written_is_adopted_not_recomputed(tmp_path: Path, dataset: str) -> None:
    calls = tmp_path / "calls"
    options = {"calls": str(calls)}
    run(config(dataset, **options))
    store, made = open_store(dataset), len(calls.read_text().split())
    before = digests(dataset)
    for info in list(store.list("depth/")):
        if info.name.endswith(".json"):
            store.delete(info.name)
    report = run(config(dataset, **options), recheck=True)
    assert report.plan.num_units == 4
    assert len(calls.read_text().split()) == made
    assert digests(dataset) == before


def test_sample_that_raises_is_quarantined_alone(dataset: str) -> None:
    report = run(config(dataset, fail=["000000007"]))
    depths = values_of(dataset, "depth")
    assert [k for k, v in depths.items() if v is None] == ["000000007"]
    reasons = [s.quarantine for s in shards_of(dataset, "depth")]
    assert reasons == [{}, {"000000007": "RuntimeError: cannot stand 000000007"}, {}, {}]
    assert report.quarantined["depth"] == {"RuntimeError": 1}
    assert values_of(dataset, "tok_depth")["000000007"] is None  # no depth, no tokens; every other row is there
    assert sum(v is None for v in values_of(dataset, "tok_depth").values()) == 1


def test_out_of_memory_halves_the_batch_and_says_so(tmp_path: Path, dataset: str) -> None:
    calls = tmp_path / "calls"
    report = run(config(dataset, memory=2, calls=str(calls)))
    assert calls.read_text().split()[:4] == ["4", "2", "2", "2"]
    assert not report.quarantined
    assert "bright: batch of 4 split after MemoryError" in report.notes[0]


def test_failure_that_a_component_returns_carries_its_reason(tmp_path: Path) -> None:
    dark = toys.Image.new("RGB", (32, 32))
    dark.paste((60, 60, 60), (0, 0, 16, 32))
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "d"), damaged={3: toys.jpeg(dark)})
    run(config(dataset))
    assert shards_of(dataset, "semseg")[0].quarantine == {"000000003": "all dark: nothing is above 100"}


def test_constant_output_is_quarantined_once_and_what_reads_it_is_null(tmp_path: Path) -> None:
    black = {3: toys.jpeg(toys.Image.new("RGB", (32, 32)))}
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "d"), damaged=black)
    run(config(dataset))
    assert shards_of(dataset, "depth")[0].quarantine == {"000000003": "constant output: every value is 0"}
    assert shards_of(dataset, "semseg")[0].value(3) is None
    assert shards_of(dataset, "semseg")[0].quarantine == {}


def test_unusable_output_is_quarantined(dataset: str) -> None:
    run(config(dataset, gain=1e9))
    reasons = set(shards_of(dataset, "depth")[0].quarantine.values())
    assert len(reasons) == 6
    assert all(r.startswith("unusable output: the map reaches") for r in reasons)


def test_truncated_empty_and_foreign_pictures_are_exactly_what_is_quarantined(tmp_path: Path) -> None:
    good = toys.jpeg(toys.picture(4))
    damaged = {4: good[:-200], 9: b"", 20: b"this is text, not a picture"}
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "d"), damaged=damaged)
    report = run(config(dataset))
    quarantined = {k: r.split(":")[0] for s in shards_of(dataset, "rgb") for k, r in s.quarantine.items()}
    assert quarantined == {"000000004": "truncated or corrupt", "000000009": "empty", "000000020": "not an image"}
    assert report.ok
    for name in ("depth", "tok_depth", "crop_settings"):
        missing = [k for k, v in values_of(dataset, name).items() if v is None]
        assert missing == ["000000004", "000000009", "000000020"]
    assert values_of(dataset, "alt_text")["000000020"] == "number 20"


def test_run_stops_when_the_failure_budget_is_spent_and_keeps_what_is_done(dataset: str) -> None:
    tree = {**toys.config(dataset, fail=["000000001", "000000002"]), "max_failures": 0.05}
    with pytest.raises(BudgetExceededError, match=r"2 of 24 rows of depth .* max_failures=0.05 allows 1"):
        run(Config(**tree))
    assert read_manifest(open_store(dataset)).num_shards("depth") == 1


def test_several_crops_make_several_columns_and_share_one_decode(dataset: str) -> None:
    tree = {**toys.config(dataset), "crops": {"size": 16, "count": 3, "seed": 5}}
    run(Config(**tree))
    shard = shards_of(dataset, "depth")[0]
    assert shard.table.column_names == ["key", "crop_0", "crop_1", "crop_2"]
    first, second = shard.value(0, 0), shard.value(0, 1)
    assert not np.array_equal(first, second)
    crops = shards_of(dataset, "crop_settings")[0]
    top, left, height, width, flip = crops.value(0, 1).tolist()
    image = toys.picture(0).resize((16, 16), 3, box=(left, top, left + width, top + height))
    expected = np.asarray(image, dtype=np.float32).mean(-1)
    expected = expected[:, ::-1] if flip else expected
    assert np.abs(second - expected).max() < 6


def test_stage_with_a_view_of_other_samples_is_refused() -> None:
    batch = Batch(["a", "b", "c"], np.zeros((3, 3, 2, 2), np.uint8), {"depth": [1, 2, 3]})
    assert batch.select([2, 0]).keys == ["c", "a"]
    assert batch.select([2, 0]).views == {"depth": [3, 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {"a": {"labelers": ["brigth"]}}}, "did you mean 'bright'"),
        ({"stages": {"a": {"labelers": ["threshold"]}}}, "reads 'depth', but nothing makes it"),
        ({"stages": {"a": {"labelers": ["bright"]}, "b": {"labelers": ["bright"]}}}, "depth is made twice"),
        (
            {"stages": {"a": {"labelers": ["bright"], "store": []}, "b": {"labelers": ["threshold"]}}},
            "reads 'depth', but it is made but not stored",
        ),
        ({"labelers": {"depth": {"checkpoint": "nowhere"}}, "stages": {}}, "labelers.depth"),
        ({"labelers": {"dpeth": {}}, "stages": {}}, "did you mean 'depth'"),
    ],
)
def test_configuration_that_does_not_fit_is_refused_with_the_place(
    dataset: str, change: dict[str, Any], message: str
) -> None:
    store = open_store(dataset)
    with pytest.raises(ConfigError, match=message):
        make_plan(store, read_manifest(store), Config(**{**toys.config(dataset), **change}))


def test_lost_object_is_made_again_only_when_the_store_is_asked(dataset: str) -> None:
    run(config(dataset))
    store, before = open_store(dataset), digests(dataset)
    name = next(i.name for i in store.list("depth/") if i.name.endswith(".arrow"))
    held = store.get(name)
    store.delete(name)
    assert not run(config(dataset)).plan.num_units  # the manifest is believed
    report = run(config(dataset), recheck=True)
    assert [u.makes for u in report.plan.units()] == [{"depth": name.split(".")[1]}]
    assert report.plan.totals["labels"].reasons == {"depth: lost: the manifest names it, the store does not have it": 1}
    assert store.get(name) == held
    assert digests(dataset) == before


def test_records_that_no_snapshot_names_are_found_and_published(dataset: str) -> None:
    done = run(config(dataset))
    store = open_store(dataset)
    for number in range(2, done.manifest.snapshot + 1):  # as if the driver had died before its first snapshot
        store.delete(f"manifest/snapshot-{number:06d}.json")
    again = run(config(dataset))
    assert (again.plan.num_units, len(again.plan.unpublished)) == (0, 5 * 4)
    assert [r.digest for r in all_records(again.manifest)] == [r.digest for r in all_records(done.manifest)]


def test_finished_job_is_told_from_the_root_alone(dataset: str) -> None:
    run(config(dataset))
    store = open_store(dataset)
    for info in [*store.list("manifest/records/"), *store.list("depth/")]:
        store.delete(info.name)
    assert not run(config(dataset)).plan.num_units


def test_plan_is_the_same_for_machines(dataset: str) -> None:
    plan = run(config(dataset)).plan
    assert plan.to_json()["units"] == 3 * 4
    assert plan.to_json()["stages"]["labels"] == {
        "components": ["bright", "boxes"],
        "makes": ["depth", "det"],
        "stores": ["depth", "det"],
        "shards_to_do": 4,
        "samples_to_do": 24,
        "shards_done": 0,
        "reasons": {"depth: missing": 4, "det: missing": 4},
    }


def test_what_a_shard_took_is_divided_among_its_modalities(dataset: str) -> None:
    run(config(dataset, seconds=0.05))
    manifest = read_manifest(open_store(dataset))
    depth, boxes = manifest.totals("depth").spent, manifest.totals("det").spent
    assert depth["attempts"] == boxes["attempts"] == 4
    assert depth["seconds"] > 4 * 2 * 0.05 > boxes["seconds"]  # two batches a shard, each of 50 ms
    assert depth["gpu_seconds"] == 0


def test_new_modality_touches_no_other_object(dataset: str) -> None:
    stages = {"labels": {"labelers": ["bright", "boxes"]}}
    run(config(dataset, stages=stages))
    store = open_store(dataset)
    before = {info.name: store.get(info.name) for info in store.list()}
    run(config(dataset, stages={**stages, "later": {"labelers": ["threshold"]}}))
    assert {name: store.get(name) for name in before} == before
    fresh = {info.name.split("/")[0] for info in store.list() if info.name not in before}
    assert fresh == {"semseg", "manifest"}
    blocks = read_manifest(store).blocks
    assert {m for m, infos in blocks.items() if infos != read_manifest(store, 2).blocks.get(m)} == {"semseg"}


@pytest.mark.parametrize(
    ("licence", "bound"),
    [
        ("cc-by-nc-4.0", True),
        ("CC-BY-NC-SA 4.0", True),
        ("apple-amlr (research)", True),
        ("NVIDIA non-commercial", True),
        ("apache-2.0", False),
        ("mit", False),
        ("agency-licence-2.0", False),
        ("unknown", False),
    ],
)
def test_non_commercial_licences_are_known_by_their_name(licence: str, bound: bool) -> None:
    assert is_non_commercial(licence) is bound
