"""Export and import whatever the layout: what goes out and what stays behind, resuming, refusing, lineage, and that
what comes back is what went out, on a folder and on an S3 server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import exchange_toys as toys
import numpy as np
import pytest
import toys as pipeline_toys
from typer.testing import CliRunner

import fourmill.cli.manifest_export
import fourmill.cli.manifest_import  # noqa: F401
from fourmill.cli import app
from fourmill.config import Config
from fourmill.pipeline.exchange import (
    ExportOptions,
    ExportReport,
    ImportOptions,
    WrongDataError,
    export_dataset,
    import_dataset,
)
from fourmill.pipeline.exchange.selection import in_parallel
from fourmill.pipeline.manifest import Update, read_manifest, update_manifest
from fourmill.pipeline.manifest.verify import Options as VerifyOptions
from fourmill.pipeline.manifest.verify import verify
from fourmill.pipeline.runner import run as run_pipeline
from fourmill.pipeline.shards import producer_id
from fourmill.pipeline.store import join_uri, open_store

LOSSLESS = ("webdataset", "parquet")


def export(dataset: str, out: str | Path, layout: str = "webdataset", **options: Any) -> ExportReport:
    return export_dataset(dataset, str(out), ExportOptions(layout, workers=2, **options))


def bring_in(src: str | Path, dataset: str | Path) -> str:
    import_dataset(str(src), str(dataset), ImportOptions(workers=2))
    return str(dataset)


def contents(uri: str | Path) -> dict[str, bytes]:
    store = open_store(uri)
    return {info.name: store.get(info.name) for info in store.list()}


def keys_in(uri: str | Path) -> list[list[str]]:
    """Keys by output shard, brought back through an import."""
    found = toys.read_keys(str(uri))
    return [list(found[shard]) for shard in sorted(found)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toys.make(str(tmp_path_factory.mktemp("toys") / "dataset"))


def expected(dataset: str) -> dict[str, dict[str, list[Any]]]:
    """A shard that lacks a modality comes back with nulls in it."""
    values = toys.values_of(dataset)
    values["clip"].update({key: [None, None] for key in toys.KEYS[2]})
    return values


@pytest.mark.parametrize("layout", LOSSLESS)
def test_what_comes_back_is_what_went_out_with_nulls_reasons_and_odd_keys(
    dataset: str, tmp_path: Path, layout: str
) -> None:
    report = export(dataset, tmp_path / "out", layout)
    assert (report.samples, report.shards, report.dropped) == (12, 3, {})
    back = bring_in(tmp_path / "out", tmp_path / "back")
    toys.assert_equal(toys.values_of(back), expected(dataset))
    assert toys.reasons_of(back, "depth") == {"dark": "constant output: 0"}
    assert [toys.reasons_of(back, name) for name in ("rgb", "alt_text", "tok_depth")] == [{}, {}, {}]
    mine, theirs = read_manifest(open_store(back)), read_manifest(open_store(dataset))
    for name in theirs.modalities:
        specs = [[r.spec for r in m.records(name)] for m in (mine, theirs)]
        assert specs[0][0] == specs[1][0]


@pytest.mark.parametrize("layout", LOSSLESS)
def test_dataset_export_and_import_on_an_s3_server(s3_uri: str, layout: str) -> None:
    names = ("rgb", "crop_settings", "det", "depth", "tok_rgb")
    uri = toys.make(join_uri(s3_uri, "dataset"), names)
    report = export(uri, join_uri(s3_uri, "out"), layout)
    assert (report.samples, report.resumed) == (12, 0)
    assert export(uri, join_uri(s3_uri, "out"), layout).resumed == 3
    back = bring_in(join_uri(s3_uri, "out"), join_uri(s3_uri, "back"))
    toys.assert_equal(toys.values_of(back, names), toys.values_of(uri))


def test_a_sample_without_any_value_keeps_its_row(tmp_path: Path) -> None:
    uri = toys.make(str(tmp_path / "dataset"), ("tok_depth", "depth"), (("a", "dark", "c"), ("dark2", "k" * 80)))
    export(uri, tmp_path / "out", keep=True)
    back = bring_in(tmp_path / "out", tmp_path / "back")
    toys.assert_equal(toys.values_of(back, ("depth", "tok_depth")), toys.values_of(uri))


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "ml4m", "ml4m-files"])
def test_the_same_snapshot_gives_the_same_bytes(dataset: str, tmp_path: Path, layout: str) -> None:
    export(dataset, tmp_path / "one", layout)
    export_dataset(dataset, str(tmp_path / "two"), ExportOptions(layout, workers=1))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_incomplete_samples_are_dropped_and_counted_by_the_first_reason(dataset: str, tmp_path: Path) -> None:
    names = ("clip", "depth", "alt_text", "rgb")
    report = export(dataset, tmp_path / "out", modalities=names, keep=False)
    assert report.dropped == {"alt_text: absent": 1, "clip: not made yet": 4, "depth: constant output": 1}
    assert report.samples == 6
    assert keys_in(tmp_path / "out") == [["cat", "a/b.c", "100%"], ["k" * 70, "e", "f"]]
    assert json.loads((tmp_path / "out" / "fourmill.json").read_text())["dropped"] == report.dropped


def test_output_shards_have_the_size_asked_for_and_no_gaps_in_their_numbers(dataset: str, tmp_path: Path) -> None:
    report = export(dataset, tmp_path / "out", modalities=("depth", "rgb"), keep=False, shard_size=5)
    assert (report.samples, report.shards) == (11, 3)
    assert keys_in(tmp_path / "out") == [
        ["cat", "a/b.c", "sötnos", "100%", "k" * 70],
        ["e", "f", "g", "h", "i"],
        ["j"],
    ]
    assert sorted(p.name for p in (tmp_path / "out" / "shards").iterdir()) == [f"shard-00000{n}.tar" for n in range(3)]


def test_a_shard_with_no_complete_sample_leaves_no_gap(tmp_path: Path) -> None:
    uri = toys.make(str(tmp_path / "dataset"), ("rgb", "depth"), (("a", "b"), ("dark",), ("c",)))
    export(uri, tmp_path / "out", keep=False)
    assert keys_in(tmp_path / "out") == [["a", "b"], ["c"]]


def test_only_the_shards_asked_for(dataset: str, tmp_path: Path) -> None:
    report = export(dataset, tmp_path / "out", modalities=("rgb",), start=1, stop=2)
    assert (report.samples, keys_in(tmp_path / "out")) == (4, [["k" * 70, "dark", "e", "f"]])


class KilledError(Exception):
    pass


@pytest.mark.parametrize("layout", ["webdataset", "ml4m-files"])
def test_an_interrupted_export_goes_on_where_it_stopped(dataset: str, tmp_path: Path, layout: str) -> None:
    def kill(shards: int, samples: int) -> None:
        raise KilledError

    out = tmp_path / "out"
    with pytest.raises(KilledError):
        export_dataset(dataset, str(out), ExportOptions(layout, workers=1), kill)
    assert not (out / "fourmill.json").exists()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")}
    (out / ".fourmill" / "part-000000.json").unlink()  # killed between an object and its part file
    report = export(dataset, out, layout)
    assert report.shards == 3
    assert {p: p.stat().st_mtime_ns for p in before} == before
    export(dataset, tmp_path / "whole", layout)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_export_writes_nothing_again(dataset: str, tmp_path: Path) -> None:
    first = export(dataset, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert export(dataset, tmp_path / "out") == replace(first, resumed=3)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_two_exports_into_one_place_at_once_are_one(dataset: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda _: export(dataset, tmp_path / "out"), range(3)))
    assert [replace(report, resumed=0) for report in reports] == [replace(reports[0], resumed=0)] * 3
    export(dataset, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_no_more_shards_are_begun_than_are_waited_for() -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            begun.append(item)
            yield item

    for result in in_parallel(lambda item: item * 10, items(), 3):
        assert len(begun) <= result // 10 + 4
    assert begun == list(range(100))


def test_another_export_into_the_same_place_is_refused_and_touches_nothing(dataset: str, tmp_path: Path) -> None:
    export(dataset, tmp_path / "out", modalities=("rgb",))
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="holds another export, of snapshot 1"):
        export(dataset, tmp_path / "out", modalities=("rgb", "depth"))
    assert contents(tmp_path / "out") == before


def test_a_place_that_is_not_empty_is_refused(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty \(mine.txt\)"):
        export(dataset, tmp_path / "out")
    assert contents(tmp_path / "out") == {"mine.txt": b"mine"}


def test_what_cannot_be_exported_is_refused_with_the_reason(dataset: str, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("tarballs", {}, "unknown export format 'tarballs'"),
        ("webdataset", {"modalities": ("dpeth",)}, "did you mean 'depth'"),
        ("ml4m", {"modalities": ("depth",)}, "depth has no place in ml4m: it is a map of a crop"),
        ("ml4m", {"modalities": ("tok_caption",)}, "ml-4m tokenizes caption itself"),
        ("ml4m", {"modalities": ("det",)}, "det needs rgb"),
        ("ml4m", {"keep": True}, "no place for incomplete samples"),
        ("webdataset", {"start": 7}, "has no shards from 7"),
    ]
    for layout, options, message in cases:
        with pytest.raises(ValueError, match=message):
            export(dataset, tmp_path / "out", layout, **options)
    assert not (tmp_path / "out").exists()


def test_mixed_generations_need_an_explicit_choice(tmp_path: Path) -> None:
    uri = toys.make(str(tmp_path / "dataset"), ("rgb", "semseg"))
    redo(uri, "semseg", 0, toys.KEYS[0])
    with pytest.raises(ValueError, match=r"semseg mixes 2 generations .* in snapshot 2"):
        export(uri, tmp_path / "out")
    assert export(uri, tmp_path / "rgb", modalities=("rgb",)).samples == 12
    assert export(uri, tmp_path / "old", at=1).snapshot == 1
    assert export(uri, tmp_path / "mixed", mixed=True).samples == 12


def redo(uri: str, name: str, shard: int, keys: Sequence[str]) -> None:
    """Another generation of one shard, as the next snapshot."""
    store = open_store(uri)
    record = toys.write(store, name, shard, keys, version=2)
    lineage = toys.producer(name, 2)
    update_manifest(store, lambda old: Update([record], {producer_id(toys.content_of(lineage)): lineage}))


def test_a_later_snapshot_with_the_same_objects_goes_on_with_the_same_export(tmp_path: Path) -> None:
    uri = toys.make(str(tmp_path / "dataset"), ("rgb", "semseg"))
    export(uri, tmp_path / "out", modalities=("rgb",))
    (tmp_path / "out" / "fourmill.json").unlink()
    redo(uri, "semseg", 0, toys.KEYS[0])
    report = export(uri, tmp_path / "out", modalities=("rgb",))
    assert (report.snapshot, report.resumed) == (2, 3)
    assert json.loads((tmp_path / "out" / "fourmill.json").read_text())["snapshot"] == 1


def test_modalities_whose_rows_do_not_match_are_never_put_together(tmp_path: Path) -> None:
    uri = toys.make(str(tmp_path / "dataset"), ("rgb", "depth"))
    redo(uri, "depth", 1, [*toys.KEYS[1][:2], "f", "e"])
    with pytest.raises(WrongDataError, match="shard 1: depth does not hold the keys of rgb"):
        export(uri, tmp_path / "out", modalities=("rgb", "depth"), mixed=True)


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_a_harmed_shard_is_named_and_not_exported(tmp_path: Path, harm: str) -> None:
    uri = toys.make(str(tmp_path / "dataset"), ("rgb", "tok_rgb"))
    victim = sorted((tmp_path / "dataset" / "tok_rgb").glob("*.arrow"))[1]
    data = bytearray(victim.read_bytes())
    at = data.index(toys.value("tok_rgb", 4, 0).astype(np.uint16).tobytes())
    data[at] ^= 1  # a whole object still, with another token
    victim.unlink()
    if harm != "delete":
        victim.write_bytes(data[: len(data) // 2] if harm == "cut" else data)
    with pytest.raises(WrongDataError, match=victim.name):
        export(uri, tmp_path / "out")
    assert run("export", uri, str(tmp_path / "out"), "-f", "webdataset")[0] == 1


def test_an_object_that_changed_since_an_interrupted_export_is_not_taken_for_ours(tmp_path: Path) -> None:
    uri = toys.make(str(tmp_path / "dataset"), ("rgb",))
    export(uri, tmp_path / "out")
    for name in ("fourmill.json", ".fourmill/part-000001.json"):
        (tmp_path / "out" / name).unlink()
    victim = tmp_path / "out" / "shards" / "shard-000001.tar"
    data = bytearray(victim.read_bytes())
    data[600] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ValueError, match=r"shards/shard-000001\.tar .* is there already with other content"):
        export(uri, tmp_path / "out")


def test_licences_stand_in_the_card_and_survive_the_way_back(dataset: str, tmp_path: Path) -> None:
    export(dataset, tmp_path / "out", modalities=("rgb", "depth", "caption"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "NON-COMMERCIAL: not for commercial use, by the licence of the weights of owner/depth (cc-by-nc-4.0)" in card
    assert "license_name: non-commercial" in card
    assert "owner/caption | Apache-2.0 | mit |" in card
    assert f"| owner/depth | cc-by-nc-4.0 | {toys.digest('depth')[:16]} |" in card
    assert "shards/shard-{000000..000002}.tar" in card
    manifest = read_manifest(open_store(bring_in(tmp_path / "out", tmp_path / "back")))
    made = manifest.producers[manifest.generations("depth")[0]]
    assert (made["class"], made["checkpoint"]["licence"]) == ("import", "cc-by-nc-4.0")
    original = manifest.producers[made["inputs"]["depth"]]
    assert original == toys.producer("depth")
    assert manifest.corpus["format"] == "import webdataset"
    assert manifest.corpus["sources"] == [str(tmp_path / "out")]
    assert manifest.corpus["imported"]["export"]["snapshot"] == 1
    assert manifest.sample_tables[0]["rows"] == 12


def test_no_folder_of_anyone_ends_up_in_imported_objects(dataset: str, tmp_path: Path) -> None:
    export(dataset, tmp_path / "out", modalities=("rgb", "depth"))
    back = bring_in(tmp_path / "out", tmp_path / "back")
    objects = [data for name, data in contents(back).items() if name.endswith(".arrow")]
    assert objects
    assert not any(str(tmp_path).encode() in data for data in objects)


def test_a_dataset_without_sources_is_told_where_its_samples_came_from(dataset: str, tmp_path: Path) -> None:
    export(dataset, tmp_path / "out", modalities=("rgb", "depth"))
    sources = toys.values_of(bring_in(tmp_path / "out", tmp_path / "back"))["source"]
    assert sources["cat"][0]["origin"] == "cat"
    assert (sources["cat"][0]["width"], sources["cat"][0]["height"]) == (48, 40)


@pytest.mark.parametrize("layout", LOSSLESS)
def test_a_picture_that_is_null_stays_null_with_its_reason(tmp_path: Path, layout: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toys, "MISSING", {"rgb": {"cat": "truncated or corrupt: at byte 3"}})
        uri = toys.make(str(tmp_path / "dataset"), ("rgb", "caption"))
    export(uri, tmp_path / "out", layout)
    back = bring_in(tmp_path / "out", tmp_path / "back")
    toys.assert_equal(toys.values_of(back, ("rgb", "caption")), toys.values_of(uri))
    assert toys.reasons_of(back, "rgb") == {"cat": "truncated or corrupt: at byte 3"}
    assert export(uri, tmp_path / "whole", layout, keep=False).dropped == {"rgb: truncated or corrupt": 1}


def test_reasons_in_the_card_are_escaped(tmp_path: Path) -> None:
    lost = {"depth": {"dark": "<script>alert(1)</script>|x: y"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toys, "MISSING", lost)
        uri = toys.make(str(tmp_path / "dataset"), ("rgb", "depth"))
    export(uri, tmp_path / "out", keep=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card
    assert "&lt;script>alert(1)&lt;/script>\\|x" in card


def test_importing_again_changes_nothing_and_another_source_is_refused(dataset: str, tmp_path: Path) -> None:
    export(dataset, tmp_path / "one", modalities=("rgb", "depth"))
    export(dataset, tmp_path / "two", modalities=("rgb", "depth"), stop=2)
    back = bring_in(tmp_path / "one", tmp_path / "back")
    before = contents(back)
    bring_in(tmp_path / "one", back)
    assert contents(back) == before
    with pytest.raises(ValueError, match=r"holds another corpus|already holds the corpus"):
        bring_in(tmp_path / "two", back)
    assert read_manifest(open_store(back)).snapshot == 1


@pytest.mark.parametrize("layout", [*LOSSLESS, "ml4m", "ml4m-files"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_an_export_that_was_harmed_is_not_imported(dataset: str, tmp_path: Path, layout: str, harm: str) -> None:
    export(dataset, tmp_path / "out", layout, modalities=("rgb", "crop_settings", "tok_rgb"))
    victim = sorted(p for p in (tmp_path / "out").rglob("*") if p.suffix in (".tar", ".parquet", ".npy"))[1]
    data = bytearray(victim.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    victim.unlink()
    if harm != "delete":
        victim.write_bytes(data[:-600] if harm == "cut" and len(data) > 600 else data[:-1] if harm == "cut" else data)
    with pytest.raises(WrongDataError, match=victim.parent.name):
        bring_in(tmp_path / "out", tmp_path / "back")
    assert not list((tmp_path / "back").glob("manifest/snapshot*"))


def test_what_is_no_export_is_not_imported(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is empty or does not exist"):
        bring_in(tmp_path / "nothing", tmp_path / "back")
    with pytest.raises(ValueError, match="is a dataset of Fourmill's own"):
        bring_in(dataset, tmp_path / "back")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "00000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="a raw corpus goes through `fourmill ingest`"):
        bring_in(tmp_path / "raw", tmp_path / "back")


def test_an_export_of_a_later_format_is_refused_with_both_numbers(dataset: str, tmp_path: Path) -> None:
    export(dataset, tmp_path / "out", modalities=("rgb",))
    summary = tmp_path / "out" / "fourmill.json"
    summary.write_text(summary.read_text().replace('"format": 1', '"format": 2', 1))
    with pytest.raises(ValueError, match="has format 2; this Fourmill reads format 1"):
        bring_in(tmp_path / "out", tmp_path / "back")


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["manifest", *arguments], standalone_mode=False)
    if isinstance(done.exception, ValueError):
        return 2, str(done.exception)
    return int(done.return_value), done.stdout


def test_the_commands_say_what_they_did_and_exit_by_it(dataset: str, tmp_path: Path) -> None:
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    code, text = run("export", dataset, out, "-f", "webdataset", "--modality", "rgb, depth", "--incomplete", "drop")
    assert code == 0
    assert "dropped: depth: constant output" in text
    code, text = run(
        "export", dataset, out, "-f", "webdataset", "--modality", "rgb,depth", "--incomplete", "drop", "--json"
    )
    assert (code, json.loads(text)["samples"], json.loads(text)["resumed"]) == (0, 11, 3)
    code, text = run("import", out, back, "--json")
    assert (code, json.loads(text)["samples"], json.loads(text)["ok"]) == (0, 11, True)
    assert run("export", dataset, out, "-f", "parquet")[0] == 2
    assert run("export", dataset, str(tmp_path / "x"), "-f", "parquet", "--shards", "2") == (
        2,
        "bad --shards '2': A:B is needed, such as 0:100, :100 or 100:",
    )
    assert run("export", dataset, str(tmp_path / "x"), "-f", "parquet", "--incomplete", "maybe")[0] == 2


def test_an_export_of_nothing_and_an_import_of_harmed_data_exit_with_1(dataset: str, tmp_path: Path) -> None:
    uri = toys.make(str(tmp_path / "dataset"), ("rgb", "depth"), (("dark",),))
    code, text = run("export", uri, str(tmp_path / "none"), "-f", "webdataset", "--incomplete", "drop", "--json")
    assert (code, json.loads(text)["dropped"]) == (1, {"depth: constant output": 1})
    run("export", dataset, str(tmp_path / "out"), "-f", "webdataset", "--modality", "rgb")
    next((tmp_path / "out" / "shards").iterdir()).unlink()
    assert run("import", str(tmp_path / "out"), str(tmp_path / "back"))[0] == 1


def test_a_long_import_publishes_on_the_way_and_is_finished_by_its_corpus_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourmill.pipeline.exchange.imports._TOGETHER", 2)
    keys = [[f"{shard}-{row}" for row in range(2)] for shard in range(5)]
    uri = toys.make(str(tmp_path / "dataset"), ("rgb", "tok_rgb"), keys)
    export(uri, tmp_path / "out")

    def kill(shards: int, samples: int) -> None:
        if shards == 3:
            raise KilledError

    with pytest.raises(KilledError):
        import_dataset(str(tmp_path / "out"), str(tmp_path / "back"), progress=kill)
    half = read_manifest(open_store(tmp_path / "back"))
    assert (half.num_shards("rgb"), half.num_shards("tok_rgb"), half.corpus) == (2, 2, {})
    other = toys.make(str(tmp_path / "other"), ("rgb", "tok_rgb"), [["x"], ["y"]])
    export(other, tmp_path / "other-out")
    with pytest.raises(ValueError, match="an unfinished import"):
        bring_in(tmp_path / "other-out", tmp_path / "back")
    bring_in(tmp_path / "out", tmp_path / "back")
    whole = read_manifest(open_store(tmp_path / "back"))
    assert (whole.num_shards("rgb"), whole.corpus["samples"], whole.sample_tables[0]["rows"]) == (5, 10, 10)
    toys.assert_equal(toys.values_of(str(tmp_path / "back"), ("rgb", "tok_rgb")), toys.values_of(uri))
    bring_in(tmp_path / "out", tmp_path / "direct")
    objects = [{n: d for n, d in contents(tmp_path / b).items() if n.endswith(".arrow")} for b in ("back", "direct")]
    assert objects[0] == objects[1]


def test_what_the_pipeline_made_goes_out_and_comes_back_and_verifies(tmp_path: Path) -> None:
    uri = pipeline_toys.make_dataset(tmp_path, str(tmp_path / "dataset"))
    assert run_pipeline(Config(**pipeline_toys.config(uri))).ok
    export(uri, tmp_path / "out", "parquet")
    back = bring_in(tmp_path / "out", tmp_path / "back")
    toys.assert_equal(toys.values_of(back), toys.values_of(uri))
    assert verify(open_store(back), read_manifest(open_store(back)), VerifyOptions(deep=True)).ok
    report = export(uri, tmp_path / "4m", "ml4m", modalities=("rgb", "det", "tok_depth"))
    assert (report.samples, report.notes) == (24, {})
    assert (tmp_path / "4m" / "tok_depth@16" / "shard-00003.tar").exists()  # by the size that the lineage tells
    assert (tmp_path / "4m" / "crop_settings" / "shard-00003.tar").exists()  # not asked for, but ml-4m wants it
