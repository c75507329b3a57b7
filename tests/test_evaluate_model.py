"""`fourmill evaluate model` on scenes, a real dataset, the demo's tokenizers and a checkpoint of random weights:
nothing that is fitted has seen an evaluated sample, and every column is what other evaluations say of the same ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from chromium import chromium
from PIL import Image
from test_evaluate_model_spread import Source
from token_toys import Literal
from typer.testing import CliRunner

from fourmill.checkpoints import resolve
from fourmill.cli import _exit_code
from fourmill.cli.evaluate_model import evaluate_model as command
from fourmill.config import Config
from fourmill.evaluate.labels import evaluate_labels
from fourmill.evaluate.model.constants import fit_depth
from fourmill.evaluate.model.forced import Forced, context_of, forced
from fourmill.evaluate.model.page import page_of
from fourmill.evaluate.model.predictors import ranked
from fourmill.evaluate.model.results import ModelEvaluation, Row
from fourmill.evaluate.model.run import Evaluated, Settings, evaluate_model
from fourmill.evaluate.model.samples import Sample
from fourmill.evaluate.model.sheet import sheet_of
from fourmill.evaluate.model.split import Training, training_of
from fourmill.evaluate.model.tallies import TruthComparison
from fourmill.evaluate.results import Place
from fourmill.evaluate.tokens.rows import keys_of
from fourmill.evaluate.tokens.run import evaluate_tokens
from fourmill.evaluate.truth import Truth
from fourmill.model.config import Architecture, ModalityInfo
from fourmill.model.network import FourM
from fourmill.model.predict import load_model, predict
from fourmill.model.weights import save_model
from fourmill.pipeline import codecs
from fourmill.pipeline.ingest import IngestConfig, ingest
from fourmill.pipeline.manifest import Update, read_manifest, update_manifest
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import Spec, commit, producer_id, read_shard, write_shard
from fourmill.pipeline.splits import is_held_out
from fourmill.pipeline.store import open_store
from fourmill.scenes import write_corpus

SIDE, HELD_OUT = 64, 0.3
SPATIAL = ("tok_depth", "tok_normal", "tok_semseg")
TEXTS = {"tok_det": 40, "tok_caption": 63}


def make_dataset(folder: Path, lies: tuple[str, ...] = (), count: int = 24) -> str:
    """Scenes, labelled by the toys of `scene_labels`, tokenized by the demo's tokenizers."""
    write_corpus(folder / "corpus", count=count, size=80, seed=11, truth=True, shard_size=16)
    dataset = str(folder / "dataset")
    ingest(str(folder / "corpus"), dataset, IngestConfig(shard_size=16))
    spatial = {name: {"kind": "spatial", "checkpoint": f"demo:{name}", "size": SIDE} for name in SPATIAL}
    texts = {name: {"kind": "text", "checkpoint": "demo:text", "max_tokens": n} for name, n in TEXTS.items()}
    config: dict[str, Any] = {
        "dataset": dataset,
        "crops": {"size": SIDE},
        "labelers": {
            "maps": {"kind": "scene_labels:SceneLabels", "lies": lies, "size": SIDE},
            "words": {"kind": "scene_labels:SceneCaptions"},
        },
        "tokenizers": {**spatial, **texts},
        "stages": {"all": {"labelers": ["maps", "words"], "tokenizers": [*spatial, *texts]}},
        "ray": {"address": "none"},
    }
    assert run(Config(**config)).ok
    return dataset


def make_checkpoint(folder: Path, dataset: str, held_out: float = HELD_OUT, trained_on: str | None = None) -> str:
    """A model of random weights that says it was trained on a dataset."""
    manifest = read_manifest(open_store(dataset))
    infos = {"rgb": ModalityInfo(kind="pixels", tokens=16, grid=(4, 4))}
    for name in (*SPATIAL, *TEXTS):
        spec = next(manifest.records(name)).spec
        kind: dict[str, Any] = {"kind": "grid", "tokens": 16, "grid": (4, 4)}
        kind = kind if name in SPATIAL else {"kind": "sequence", "tokens": TEXTS[name] + 1}
        infos[name] = ModalityInfo(vocabulary=spec["vocabulary"], **kind)
    torch.manual_seed(0)
    domains = {"domains_in": ("rgb", "tok_depth", "tok_caption"), "domains_out": (*SPATIAL, *TEXTS)}
    shape: dict[str, Any] = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "image_size": SIDE}
    store = open_store(str(folder))
    save_model(FourM(Architecture(**shape, **domains, modalities=infos)), store)
    told = {"dataset": trained_on or dataset, "dataset_digest": "0", "config": {"held_out": held_out}}
    store.create("pretrain.json", json.dumps(told).encode())
    return str(folder)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus, dataset and checkpoint; labels are the truth."""
    folder = tmp_path_factory.mktemp("evaluate-model")
    make_checkpoint(folder / "model", make_dataset(folder))
    return folder


def evaluate(folder: Path, truth: str | None = "corpus", **changes: Any) -> Evaluated:
    settings = Settings(**{"resamples": 50, "fit": 100, **changes})
    place = str(folder / truth) if truth else None
    return evaluate_model(str(folder / "model"), str(folder / "dataset"), place, settings)


@pytest.fixture(scope="module")
def found(scenes: Path) -> Evaluated:
    return evaluate(scenes)


def rows_of(evaluation: ModelEvaluation, modality: str) -> dict[str, Row]:
    (score,) = (score for score in evaluation.scores if score.modality == modality)
    return {row.figure: row for row in score.rows}


def all_keys(dataset: str) -> list[str]:
    store = open_store(dataset)
    manifest = read_manifest(store)
    return [key for number in manifest.shards.tolist() for key in keys_of(store, manifest, number)]


# Which samples


def test_only_what_training_held_out_is_evaluated(scenes: Path, found: Evaluated) -> None:
    keys = all_keys(str(scenes / "dataset"))
    wanted = [key for key in keys if is_held_out(key, HELD_OUT)]
    assert 3 <= len(wanted) < len(keys)
    assert found.reader.keys(found.chosen) == wanted
    assert found.evaluation.samples == len(wanted)
    assert all(score.compared == len(wanted) for score in found.evaluation.scores)
    assert found.evaluation.fitted_on == len(keys) - len(wanted)


def test_samples_that_were_trained_on_are_refused(scenes: Path) -> None:
    with pytest.raises(ValueError, match=r"were trained on \(in .*--split held-out") as refused:
        evaluate(scenes, split="all")
    assert _exit_code(refused.value) == 2


def test_a_model_that_held_nothing_out_is_refused(scenes: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", str(scenes / "dataset"), held_out=0)
    with pytest.raises(ValueError, match="trained with held_out: 0"):
        evaluate_model(model, str(scenes / "dataset"), str(scenes / "corpus"))


def test_all_of_another_dataset_is_evaluated_and_the_constant_is_of_the_one_trained_on(
    scenes: Path, tmp_path: Path
) -> None:
    other = make_trained_elsewhere(scenes, tmp_path)
    model = make_checkpoint(tmp_path / "model", str(scenes / "dataset"), trained_on=other)
    settings = Settings(split="all", targets=("depth",), resamples=10, tokenizers=_tokenizers(("depth",)))
    found = evaluate_model(model, str(scenes / "dataset"), str(scenes / "corpus"), settings).evaluation
    assert found.samples == len(all_keys(str(scenes / "dataset")))
    assert not found.notes
    assert float(rows_of(found, "depth")["rmse"].constant) > 3.0  # fitted on depths that are all 9 metres
    with pytest.raises(ValueError, match="were trained on"):
        evaluate_model(model, other, None, settings)


def make_trained_elsewhere(scenes: Path, folder: Path) -> str:
    """A dataset of other keys, whose depth is 9 metres everywhere."""
    keys = [key for key in (f"elsewhere{i}" for i in range(99)) if not is_held_out(key, HELD_OUT)][:4]
    made = Literal(str(folder / "elsewhere"), keys, size=SIDE)
    made.pictures([np.zeros((SIDE, SIDE, 3), np.uint8)] * len(keys))
    store = open_store(str(scenes / "dataset"))
    spec = next(read_manifest(store).records("depth")).spec
    made.put("depth", [np.full((SIDE, SIDE), 9.0, np.float32)] * len(keys), spec=Spec.from_json(spec))
    return made.done()


def test_what_is_not_known_of_the_training_is_said(scenes: Path, tmp_path: Path) -> None:
    model = shutil.copytree(scenes / "model", tmp_path / "model")
    dataset, corpus = str(scenes / "dataset"), str(scenes / "corpus")
    (model / "pretrain.json").write_text(json.dumps({"dataset": "/gone", "config": {"held_out": 0.01}}))
    assert training_of(str(model)) == Training(True, 0.01, ("/gone",))
    settings = Settings(targets=("depth",), count=2, resamples=10, tokenizers=_tokenizers(("depth",)))
    gone = evaluate_model(str(model), dataset, corpus, replace(settings, split="all")).evaluation
    assert [note.partition(":")[0] for note in gone.notes] == [
        "it cannot be told which samples were trained on",
        "no constants",
    ]
    absrel = rows_of(gone, "depth")["absrel"]
    assert np.isnan([absrel.constant, absrel.gain, absrel.share]).all()
    assert json.loads(json.dumps(gone.to_json(), allow_nan=False))["scores"][0]["rows"][0]["constant"] is None
    (model / "pretrain.json").write_text(json.dumps({"dataset": "/gone"}))
    with pytest.raises(ValueError, match="does not say what was held out"):
        training_of(str(model))
    (model / "pretrain.json").unlink()
    assert training_of(str(model)) == Training(known=False)
    (note,) = evaluate_model(str(model), dataset, corpus, settings).evaluation.notes
    assert "no pretrain.json" in note


def test_shares_of_a_mixture_are_all_looked_at(scenes: Path, tmp_path: Path) -> None:
    model = shutil.copytree(scenes / "model", tmp_path / "model")
    shares = [{"uri": "/first", "weight": 1}, {"uri": str(scenes / "dataset"), "weight": 1}]
    told = {"dataset": "/first", "config": {"held_out": HELD_OUT, "datasets": shares}}
    (model / "pretrain.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="were trained on"):
        evaluate_model(str(model), str(scenes / "dataset"), None, Settings(split="all"))


# Nothing fitted has seen an evaluated sample


def test_constants_do_not_change_when_all_held_out_labels_do(scenes: Path, found: Evaluated, tmp_path: Path) -> None:
    """Labels of held-out samples are replaced by lies; the constants' figures against truth must stay what they are."""
    lying = poisoned(scenes / "dataset", tmp_path / "dataset")
    model = str(shutil.copytree(scenes / "model", tmp_path / "model"))
    targets = ("depth", "semseg", "caption")
    settings = Settings(targets=targets, resamples=50, fit=100, tokenizers=_tokenizers(targets))
    other = evaluate_model(model, lying, str(scenes / "corpus"), settings).evaluation
    for name in targets:
        before, after = rows_of(found.evaluation, name), rows_of(other, name)
        for figure, row in before.items():
            assert after[figure].constant == pytest.approx(row.constant, abs=1e-9, nan_ok=True), (name, figure)
    assert rows_of(other, "depth")["rmse"].teacher > rows_of(found.evaluation, "depth")["rmse"].teacher + 1


def _tokenizers(names: tuple[str, ...]) -> tuple[str, ...]:
    places = {"depth": "tok_depth", "semseg": "tok_semseg", "caption": "text"}
    return tuple(f"{name}={resolve(f'demo:{places[name]}').location}" for name in names)


def poisoned(dataset: Path, to: Path) -> str:
    """The dataset with other labels, and no tokens, for held-out samples."""
    store, there = open_store(str(dataset)), open_store(str(to))
    manifest, records = read_manifest(store), []
    wrong = {"depth": np.full((SIDE, SIDE), 19.0, np.float32), "caption": "a purple torus"}
    wrong["semseg"] = np.full((SIDE, SIDE), 3, np.uint8)
    lineage = {"class": "Poison", "version": 1, "config": {"crops": {"size": SIDE}}}
    for name in ("rgb", "source", "crop_settings", *wrong):
        for record in manifest.records(name):
            shard = read_shard(store, record.name)
            values = [
                wrong[name] if name in wrong and is_held_out(key, HELD_OUT) else shard.value(row)
                for row, key in enumerate(shard.keys)
            ]
            stored = [codecs.encode(shard.entry, value) for value in values]
            spec = replace(shard.spec, crops=1)
            data = write_shard(name, int(shard.meta["shard"]), "0" * 16, shard.keys, [stored], spec, lineage, {})
            records.append(commit(there, data))
    update_manifest(there, lambda _: Update(records, {producer_id(lineage): lineage}))
    return str(to)


# The table


def test_columns_are_what_the_other_evaluations_say_of_the_same_samples(scenes: Path, found: Evaluated) -> None:
    def held_out(key: str) -> bool:
        return is_held_out(key, HELD_OUT)

    dataset, corpus = str(scenes / "dataset"), str(scenes / "corpus")
    labels = {s.modality: s for s in evaluate_labels(dataset, corpus, wanted=held_out).scores}
    tokens = {s.modality: s for s in evaluate_tokens(dataset, corpus, wanted=held_out).scores}
    for score in found.evaluation.scores:
        decoded = tokens[score.tokens].truth
        assert decoded is not None
        for row in score.rows:
            expected = labels[score.modality].figures.get(row.figure)
            if expected is not None:
                assert row.teacher == pytest.approx(expected, abs=1e-9, nan_ok=True), (score.modality, row.figure)
                assert row.round_trip == pytest.approx(decoded.decoded[row.figure], abs=1e-6, nan_ok=True)


def test_truth_as_teacher_is_perfect_and_the_constant_is_between_it_and_random_weights(found: Evaluated) -> None:
    depth, semseg = rows_of(found.evaluation, "depth"), rows_of(found.evaluation, "semseg")
    det, caption = rows_of(found.evaluation, "det"), rows_of(found.evaluation, "caption")
    assert depth["absrel"].teacher == pytest.approx(0, abs=1e-3)
    assert [row.teacher for row in (semseg["miou"], det["ap"], det["f1_50"], caption["phrase_f1"])] == [1, 1, 1, 1]
    for row in (depth["rmse"], semseg["miou"], semseg["pixel_accuracy"]):
        assert row.gain < 0
        assert row.sign * row.constant < row.sign * row.round_trip
        assert row.share == pytest.approx((row.model - row.constant) / (row.teacher - row.constant))
        assert row.model_interval is not None
        assert row.model_interval[0] <= row.model <= row.model_interval[1]
    assert depth["absrel"].constant_is == "1/depth-weighted median"


def test_json_has_every_row_with_what_is_needed_to_read_it(found: Evaluated) -> None:
    tree = json.loads(json.dumps(found.evaluation.to_json(), allow_nan=False))
    assert {"checkpoint", "dataset", "snapshot", "truth", "split", "samples", "fitted_on", "inputs"} < set(tree)
    drawn = {"steps": 1, "temperature": 0.0, "seed": 0, "resamples": 50}
    assert tree["parameters"] == {"count": None, "fit": 100, "device": "cpu", **drawn}
    assert [s["modality"] for s in tree["scores"]] == ["depth", "normal", "semseg", "det", "caption"]
    names = "figure constant constant_is model model_interval gain gain_interval share_of_the_way round_trip teacher"
    for score in tree["scores"]:
        assert score["constant_samples"] > 0
        assert set(score["places"]) <= {"worst", "median", "best"}
        for row in score["rows"]:
            assert set(row) == {*names.split(), "higher_is_better"}
    lower = {r["figure"] for s in tree["scores"] for r in s["rows"] if not r["higher_is_better"]}
    assert {"absrel", "rmse", "rmse_median", "mean", "median"} < lower
    assert not lower & {"delta1", "miou", "below_30", "ap", "f1_50", "phrase_recall"}
    assert {t["name"] for t in tree["tokens"]} == {*SPATIAL, *TEXTS}
    depth = next(t for t in tree["tokens"] if t["name"] == "tok_depth")
    assert depth["tokens"] == 16 * tree["samples"]
    assert depth["loss"] > depth["frequency_loss"]  # random weights


def test_the_same_command_gives_the_same_figures(scenes: Path, found: Evaluated) -> None:
    again = evaluate(scenes)
    assert again.evaluation.to_json() == found.evaluation.to_json()


def test_samples_that_a_count_leaves_are_those_of_lowest_rank_and_truth_may_be_rendered(scenes: Path) -> None:
    some = evaluate(scenes, truth=None, count=2, targets=("depth", "tok_det"))
    assert (some.evaluation.samples, some.evaluation.truth) == (2, "scenes, rendered again")
    assert [score.modality for score in some.evaluation.scores] == ["depth", "det"]
    more = evaluate(scenes, count=3, targets=("depth",))
    assert set(some.ids) < set(more.ids)


def test_other_inputs_are_read_from_the_dataset(scenes: Path) -> None:
    some = evaluate(scenes, given=("depth",), targets=("semseg",), count=2).evaluation
    assert (some.inputs, some.samples) == (("tok_depth",), 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"given": ("depht",)}, "depth"),
        ({"targets": ("clip",)}, "target"),
        ({"given": ("tok_depth",), "targets": ("depth",)}, "it is an input"),
    ],
)
def test_modalities_that_are_not_there_are_named(scenes: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate(scenes, **changes)


# What the model says


def test_the_model_finds_what_it_says_itself_the_likeliest(scenes: Path) -> None:
    """Greedy predictions of `predict`, asked for again: every token must be the likeliest one at its place."""
    model = load_model(str(scenes / "model"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, SIDE, SIDE), dtype=np.uint8)
    words = [np.array(ids) for ids in ([300], [301, 302, 303], list(range(300, 363)))]
    said = predict(model, {"rgb": pixels, "tok_caption": words}, ["tok_depth", "tok_det"])
    context, valid = context_of(model, {"rgb": list(pixels), "tok_caption": words})
    grids = forced(model, context, valid, "tok_depth", [row.numpy() for row in said["tok_depth"]])
    assert all(found is not None and found.likeliest.all() for found in grids)
    texts = [row.numpy() for row in said["tok_det"]]
    for row, found in zip(texts, forced(model, context, valid, "tok_det", texts), strict=True):
        assert found is not None
        assert found.likeliest[: len(row)].all()
        assert (found.log_probability <= 0).all()
    assert forced(model, context, valid, "tok_depth", [None] * 3) == [None] * 3


def test_boxes_are_ranked_by_the_probabilities_of_their_tokens(found: Evaluated) -> None:
    rebuilt = next(output.rebuilt for output in found.outputs if output.source == "det")
    objects = [{"class_name": n, "box": [0.0, 0.0, 0.5, 0.5], "score": 1.0} for n in ("box", "cone")]
    ids = rebuilt.tokenizer.encode([objects])[0]
    half = len(ids) // 2
    sure = Forced(np.log(np.repeat([0.25, 0.81], half)).astype(np.float32), np.ones(len(ids), bool))
    ((value, _),) = rebuilt.restore([ids])
    scores = [item["score"] for item in ranked(value, ids, sure, rebuilt)]
    assert scores == pytest.approx([0.5 + 0.5 * 0.25, 0.5 + 0.5 * 0.81])
    assert ranked([], ids[:0], sure, rebuilt) == []


def test_a_value_that_cannot_be_used_counts_as_the_constant_and_is_told(scenes: Path, found: Evaluated) -> None:
    output = next(output for output in found.outputs if output.source == "depth")
    depth = np.full((8, 8), 4.0, np.float32)
    constant = fit_depth([depth * 1.5], Spec(convention="metric"), Source())
    comparison = TruthComparison(output, constant, Spec(convention="metric"), Source(), 8)
    sample = Sample(Place("k", 0, 0, 0, 0.0), np.zeros((8, 8, 3), np.uint8), labels={"depth": depth})
    sample.truth = Truth(depth=depth)
    comparison.add(sample, None, depth)
    comparison.add(replace(sample, truth=Truth()), depth, depth)
    comparison.add(replace(sample, labels={}), depth, None)
    score = comparison.score({1: np.ones((2, 1), np.float32)})
    assert (score.compared, score.no_truth, score.no_label) == (1, 1, 1)
    assert score.unusable == {"model: tokens cannot be decoded": 1}
    assert {row.figure: row.model for row in score.rows}["absrel"] == pytest.approx(0.5)
    assert {row.figure: row.teacher for row in score.rows}["absrel"] == 0


def test_what_cannot_be_used_counts_as_nothing_said_where_there_is_no_constant(found: Evaluated) -> None:
    output = next(output for output in found.outputs if output.source == "caption")
    comparison = TruthComparison(output, None, Spec(), Source(), 8)
    sample = Sample(Place("k", 0, 0, 0, 0.0), np.zeros((8, 8, 3), np.uint8), labels={"caption": "a red box"})
    sample.truth = Truth(captions=("a red box",))
    comparison.add(sample, None, "a red box")
    figures = {row.figure: row for row in comparison.score({1: np.ones((2, 1), np.float32)}).rows}
    assert (figures["phrase_f1"].model, figures["phrase_f1"].round_trip, figures["phrase_f1"].teacher) == (0, 1, 1)


# The command


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(arguments), standalone_mode=False)


def test_command_writes_table_json_page_and_picture(scenes: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / "new" / name for name in ("found.json", "page.html", "sheet.png")}
    places = ("--json", "found.json"), ("-o", "page.html"), ("--picture", "sheet.png")
    options = [part for option, name in places for part in (option, str(files[name]))]
    where = [str(scenes / name) for name in ("model", "dataset")]
    done = invoke(*where, "--truth", str(scenes / "corpus"), "--count", "4", "--to", "depth,det", *options)
    assert done.exception is None
    assert done.return_value == 0
    assert "AbsRel" in done.stdout
    assert "better than the constant by" in done.stdout
    assert json.loads(files["found.json"].read_text())["samples"] == 4
    page = files["page.html"].read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("<img") >= 4 * 2
    sheet = Image.open(files["sheet.png"])
    assert sheet.size == ((112 + 4) * 7 + 4, 22 + 4 * (112 + 4))


def test_exit_code_is_one_if_nothing_could_be_compared_and_two_for_misuse(scenes: Path, tmp_path: Path) -> None:
    where = [str(scenes / "model"), str(scenes / "dataset")]
    (tmp_path / "captions_none.json").write_text(json.dumps({"images": [], "annotations": []}))
    nothing = invoke(*where, "--truth", str(tmp_path), "--to", "caption", "--json", "-", "--count", "2")
    assert nothing.exception is None, nothing.exception
    assert nothing.return_value == 1
    assert json.loads(nothing.stdout)["scores"][0]["no_truth"] == 2
    misused = invoke(*where, "--split", "all")
    assert _exit_code(misused.exception) == 2


def test_page_shows_worst_median_and_best_and_escapes(found: Evaluated) -> None:
    page = page_of(found)
    for word in ("worst", "median", "best", "The model against truth", "share of the way", "AbsRel"):
        assert word in page
    assert sheet_of(found, rows=2).height == 22 + 2 * 116


def test_page_asks_the_network_for_nothing(found: Evaluated, tmp_path: Path) -> None:
    hostile = replace(found.evaluation, checkpoint="<img src=http://tracker/x.png onerror=alert(1)>")
    file = tmp_path / "page.html"
    file.write_text(page_of(replace(found, evaluation=hostile)), encoding="utf-8")
    with chromium(tmp_path / "profile") as browser:
        page = browser.open(file, width=390, dark=True)
        assert (page.requests, page.complaints) == ([], [])
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("document.querySelectorAll('img').length") > 12
