"""`fourmill evaluate tokens`: each figure on literal values, codes and bits on literal histograms, and the whole path.

A tokenizer that loses nothing must come out perfect, one that keeps nothing must have the figures worked out by hand.
"""

from __future__ import annotations

import json
import math
import re
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import token_toys
from token_toys import Literal, bits, config_of

from fourmill.evaluate.command import run_evaluate_tokens
from fourmill.evaluate.tokens import run as tokens_module
from fourmill.evaluate.tokens.codes import code_use
from fourmill.evaluate.tokens.dense import EdgeFidelity, FeatureFidelity
from fourmill.evaluate.tokens.measure import Fidelity, Setting
from fourmill.evaluate.tokens.objects import MaskFidelity, ObjectFidelity, PoseFidelity, SamFidelity
from fourmill.evaluate.tokens.results import TokenEvaluation, TokenScore
from fourmill.evaluate.tokens.rgb import FrechetDistance, RgbFidelity, frechet, psnr, ssim
from fourmill.evaluate.tokens.rows import chosen_rows
from fourmill.evaluate.tokens.run import evaluate_tokens
from fourmill.evaluate.tokens.sources import SOURCES
from fourmill.evaluate.tokens.words import MetadataFidelity, PaletteFidelity, TextFidelity, edit_distance, words
from fourmill.modalities import CATALOGUE, Kind
from fourmill.pipeline import masks
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.splits import held_out_rank, is_held_out
from fourmill.pipeline.store import open_store
from fourmill.scenes import CLASSES, render

KEYS = [f"key{number}" for number in range(6)]


def setting(tokenizer: Any = None) -> Setting:
    """What a measure knows; by default a tokenizer without settings."""
    found: Any = tokenizer or SimpleNamespace(config=None)
    return Setting(Spec(), found)


def figures(measure: Fidelity, *pairs: tuple[Any, Any]) -> dict[str, float]:
    """What a measure says of pairs of a reconstruction and its label."""
    for restored, label in pairs:
        measure.add(restored, label)
    return measure.figures()


def by_modality(evaluation: TokenEvaluation) -> dict[str, TokenScore]:
    return {score.modality: score for score in evaluation.scores}


# Measures of single modalities


def test_every_source_of_a_token_modality_is_measured() -> None:
    sources = {m.source for m in CATALOGUE.values() if m.is_tokens}
    assert sources == set(SOURCES)
    undrawn = {name for name, kind in SOURCES.items() if kind.draw is None}
    assert undrawn == {"caption", "alt_text", "clip_global", "dinov2_global", "imagebind_global"}
    assert all(CATALOGUE[name].kind is not Kind.MAP for name in undrawn)


def test_psnr_of_a_grey_level_error_and_of_a_perfect_copy() -> None:
    grey = np.full((16, 16, 3), 100, np.uint8)
    assert psnr(grey + 28, grey) == pytest.approx(20 * math.log10(255 / 28))
    assert psnr(grey, grey) == pytest.approx(88.13, abs=0.01)


def test_ssim_is_one_for_a_copy_and_low_for_noise_of_the_same_mean() -> None:
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert ssim(picture, picture) == pytest.approx(1.0)
    assert abs(ssim(random.permutation(picture.ravel()).reshape(picture.shape), picture)) < 0.1


def test_frechet_distance_of_literal_gaussians() -> None:
    mean, cov = np.array([1.0, 0.0]), np.diag([4.0, 1.0])
    assert frechet(mean, cov, mean, cov) == pytest.approx(0.0, abs=1e-12)
    # |m|^2 = 9; for diagonal covariances the trace is the sum of (sqrt a - sqrt b)^2 = (2 - 1)^2 + (1 - 3)^2.
    assert frechet(mean, cov, np.array([1.0, 3.0]), np.diag([1.0, 9.0])) == pytest.approx(9 + 1 + 4)
    # Covariances that do not commute: tr (AB)^1/2 by the eigenvalues of AB, here 2 and 8.
    a, b = np.array([[2.0, 0.0], [0.0, 4.0]]), np.array([[2.0, 0.0], [0.0, 2.0]])
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    expected = 6 + 4 - 2 * (math.sqrt(4) + math.sqrt(8))
    assert frechet(mean, turn @ a @ turn.T, mean, b) == pytest.approx(expected)


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny timm network, saved as timm's `local-dir:` reads it."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    save_file(model.state_dict(), str(folder / "model.safetensors"))
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    described = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": sizes, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


def test_frechet_distance_of_a_local_network_is_named_for_it_and_zero_for_copies(timm_folder: str) -> None:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(4)]
    same, other = FrechetDistance(timm_folder), FrechetDistance(timm_folder)
    for picture in pictures:
        same.add(picture, picture)
        other.add(picture // 4, picture)
    assert same.name == "frechet_vit_tiny_patch16_224"
    assert same.distance() == pytest.approx(0.0, abs=1e-6)
    assert other.distance() > 0.1
    assert other.notes() == [
        "frechet_vit_tiny_patch16_224: 4 pictures for features of 12 numbers: too high, compare equal counts only"
    ]
    with pytest.raises(ValueError, match="no timm network at 'nowhere'"):
        FrechetDistance("nowhere")


def test_what_cannot_be_measured_on_pictures_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    notes = RgbFidelity(setting()).notes()
    assert notes == [
        "LPIPS not measured: the package `lpips` is not installed",
        "rFID-like distance not measured: no local network was given (--rfid-network)",
    ]
    (tmp_path / "lpips.py").write_text(
        "class LPIPS:\n"
        "    def __init__(self, net, verbose): assert net == 'alex'\n"
        "    def eval(self): return self\n"
        "    def __call__(self, a, b): return (a - b).abs().mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "nothing is downloaded" in RgbFidelity(setting()).notes()[0]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert figures(RgbFidelity(setting()), (black, white))["lpips"] == pytest.approx(2.0)  # of the range -1..1
    monkeypatch.delitem(sys.modules, "lpips")


def test_features_have_the_cosines_worked_out_by_hand() -> None:
    label = np.zeros((2, 4, 5), np.float32)
    label[0] = 3.0
    restored = label.copy()
    restored[:, 0, 0] = (0.0, 7.0)  # one cell of twenty at a right angle
    found = figures(FeatureFidelity(setting()), (restored, label))
    assert found["cosine"] == pytest.approx(0.95)
    assert found["cosine_p5"] == pytest.approx(0.0, abs=1e-3)
    assert figures(FeatureFidelity(setting()), (np.array([1.0, 1.0]), np.array([0.0, 2.0])))["cosine"] == pytest.approx(
        math.sqrt(0.5)
    )


def test_edges_beside_the_right_pixel_count_only_in_the_tolerant_figure() -> None:
    label = np.zeros((8, 8), np.uint8)
    label[:, 3] = 255
    restored = np.zeros((8, 8), np.uint8)
    restored[:4, 3], restored[4:, 4] = 255, 200
    found = figures(EdgeFidelity(setting()), (restored, label))
    assert found == {"f1": 0.5, "iou": pytest.approx(1 / 3), "f1_at_1px": 1.0}
    far = figures(EdgeFidelity(setting()), (np.roll(label, 3, axis=1), label))
    assert (far["f1"], far["iou"]) == (0.0, 0.0)
    faint = figures(EdgeFidelity(setting()), (label // 2, label))  # 127 is no edge
    assert faint["f1"] == 0.0


def test_boxes_are_paired_by_overlap_and_the_unsure_are_not_asked_for() -> None:
    sure = SimpleNamespace(config=SimpleNamespace(min_score=0.6))
    label = [
        {"class_name": "cat", "box": [0.0, 0.0, 0.5, 0.5], "score": 0.9},
        {"class_name": "dog", "box": [0.5, 0.5, 1.0, 1.0], "score": 0.8},
        {"class_name": "dog", "box": [0.0, 0.0, 0.1, 0.1], "score": 0.5},
    ]
    restored = [
        {"class_name": "Cat", "box": [0.0, 0.0, 0.5, 0.4]},  # IoU 0.8
        {"class_name": "cat", "box": [0.5, 0.5, 1.0, 1.0]},  # the other class
        {"class_name": "dog", "box": [0.8, 0.0, 0.9, 0.1]},  # nothing is there
    ]
    measure = ObjectFidelity(setting(sure))
    assert figures(measure, (restored, label)) == pytest.approx(
        {"recall": 1.0, "matched_iou": 0.9, "class_agreement": 0.5, "precision": 2 / 3}
    )
    assert measure.per_class() == {"cat": {"recall": 1.0, "objects": 1.0}, "dog": {"recall": 1.0, "objects": 1.0}}
    assert figures(ObjectFidelity(setting()), (restored, label))["recall"] == pytest.approx(2 / 3)


def test_masks_decoded_at_another_size_are_compared_at_the_labels() -> None:
    small, large = np.zeros((8, 8), bool), np.zeros((16, 16), bool)
    small[:4, :4], large[:8, :8] = True, True
    label = [{"class_name": "box", "mask": masks.encode(small)}]
    restored = [{"class_name": "box", "mask": masks.encode(large)}]
    assert figures(MaskFidelity(setting()), (restored, label))["matched_iou"] == 1.0
    half = [{"mask": masks.encode(large & (np.arange(16) < 4))}]
    found = figures(SamFidelity(setting()), (half, [{"mask": masks.encode(small)}, {"mask": masks.encode(~small)}]))
    assert found == {"mask_iou": 0.5, "labels_kept": 0.5}


def test_people_are_paired_by_boxes_and_their_joints_turned_by_known_angles() -> None:
    upright = np.eye(3).ravel().tolist()
    quarter = [0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    person = {"box": [0.0, 0.0, 0.5, 1.0], "orientation": upright, "pose": upright * 23}
    label = {**person, "camera": [0.0, 0.0, 5.0], "shape": [0.0] * 10}
    restored = {**person, "orientation": quarter, "camera": [0.0, 0.0, 8.0], "shape": [0.5] * 10}
    found = figures(PoseFidelity(setting()), ([restored], [label, {**label, "box": [0.6, 0.0, 1.0, 1.0]}]))
    assert found == pytest.approx(
        {"recall": 0.5, "joint_angle": 90 / 24, "matched_iou": 1.0, "camera_error": 1.0, "shape_error": 0.5}
    )


def test_texts_differ_by_words_not_by_case_accents_or_spaces() -> None:
    assert words("Un Café,  s'il te plaît.") == ["un", "cafe", ",", "s", "'", "il", "te", "plait", "."]
    assert edit_distance(["a", "red", "box"], ["the", "red", "big", "box"]) == 2
    found = figures(TextFidelity(setting()), ("a red box .", "A red box."), ("a red", "a red cone and a box"))
    assert found == {"exact": 0.5, "word_errors": 4 / 10}


def test_palettes_are_compared_colour_by_colour_where_they_came_back() -> None:
    label = {"1": [[10, 10, 10]], "2": [[0, 0, 0], [255, 255, 255]]}
    measure = PaletteFidelity(setting())
    assert measure.add({"2": [[0, 3, 4], [255, 255, 235]]}, label) == pytest.approx(12.5)
    assert measure.figures() == {"colour_distance": pytest.approx(12.5), "near": 0.5}
    with pytest.raises(ValueError, match="a palette of 3 colours came back; the label has 1, 2"):
        measure.add({"3": [[0, 0, 0]] * 3}, label)
    with pytest.raises(ValueError, match="no palette came back"):
        measure.add({}, label)


def test_facts_are_in_their_bin_if_they_are_tokenized_alike(tmp_path: Path) -> None:
    tokenizer = token_toys.build("tok_metadata", kind="text", checkpoint=token_toys.vocabulary(tmp_path))
    measure = MetadataFidelity(setting(tokenizer))
    label = {"original_width": 640, "n_humans": 2, "brightness": 100.0, "contrast": 50.0}
    # Widths have bins of 32 pixels; 47 steps of 255 / 49 are a brightness of 244.
    found = figures(measure, ({"original_width": 656, "n_humans": 2, "brightness": 244.0}, label))
    assert found == {"in_bin": 0.5, "exact": 0.25, "lost": 0.25}
    assert measure.per_class()["brightness"] == {"in_bin": 0.0, "mean_error": 144.0, "entries": 1.0}
    assert math.isnan(measure.per_class()["contrast"]["mean_error"])


# Codes and bits


def tokens_of(folder: Path, rows: Sequence[Sequence[int] | None], name: str = "tok_depth", **spec: Any) -> Any:
    data = Literal(str(folder), [f"k{i}" for i in range(len(rows))], shards=2)
    data.put(name, [None if r is None else np.array(r, np.uint16) for r in rows], spec=Spec(**spec))
    data.done()
    found = read_manifest(open_store(data.uri)).statistics(name)
    return code_use(next(iter(found.values()), {}))


def test_codes_and_bits_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    rows = [[0] * 4, [0] * 4, [1, 1, 1, 1], [2, 2, 3, 3], None]  # 8, 4, 2 and 2 of 16 tokens
    use = tokens_of(tmp_path, rows, vocabulary=8, length=4, grid=(2, 2))
    assert (use.values, use.tokens, use.used, use.usage) == (4, 16, 4, 0.5)
    assert use.entropy == pytest.approx(1.75)  # 1/2 x 1 + 1/4 x 2 + 2 x 1/8 x 3 bits
    assert use.perplexity == pytest.approx(2**1.75)
    assert (use.tokens_per_value, use.coded_bits, use.stored_bits) == (4, pytest.approx(7.0), 64)
    assert use.bars == (0.5, 0.25, 0.125, 0.125, 0, 0, 0, 0)


def test_sequences_count_their_mean_length_and_large_vocabularies_four_bytes(tmp_path: Path) -> None:
    use = tokens_of(tmp_path / "a", [[5], [6, 7, 8]], "tok_caption", vocabulary=100)
    assert (use.values, use.tokens_per_value, use.stored_bits) == (2, 2, 32)
    assert tokens_of(tmp_path / "b", [[5]], "tok_caption", vocabulary=70_000).stored_bits == 32


def test_modality_without_any_token_has_no_bits(tmp_path: Path) -> None:
    use = tokens_of(tmp_path, [None, None], vocabulary=8, length=4, grid=(2, 2))
    assert (use.values, use.tokens, use.used, use.entropy, use.bars) == (0, 0, 0, 0.0, ())
    assert math.isnan(use.coded_bits)


# The whole path


def scene_maps(count: int = 6, size: int = 48) -> list[Any]:
    return [render(11, index, size) for index in range(count)]


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return scene_maps()


def maps_of(scene: Any) -> dict[str, np.ndarray]:
    edges = np.zeros(scene.semantic.shape, np.uint8)
    edges[:, 5] = 255
    features = np.stack([scene.depth[::8, ::8], np.ones_like(scene.depth[::8, ::8])])
    normal = np.ascontiguousarray(scene.normals.transpose(2, 0, 1))
    labels = {"depth": scene.depth, "normal": normal, "semseg": scene.semantic, "canny_edge": edges}
    return {**labels, "clip": features, "dinov2_global": features.ravel()}


SPECS = {"depth": Spec(convention="metric"), "normal": Spec(convention="opencv"), "semseg": Spec(classes=CLASSES)}


def dataset_of(
    folder: Path,
    scenes: Sequence[Any],
    constant: float | None = None,
    stored: bool = True,
    shards: int = 2,
    names: Sequence[str] = ("rgb", "depth", "normal", "semseg", "canny_edge", "clip", "dinov2_global"),
) -> tuple[str, Any]:
    """Scenes said as labels and tokenized by toys; the configuration that names these."""
    checkpoint = token_toys.folder(folder / "weights")
    data = Literal(str(folder / "dataset"), KEYS[: len(scenes)], size=48, shards=shards)
    origins = [{"metadata": {"scene": {"seed": 11, "index": i, "size": 48}}} for i in range(len(scenes))]
    data.pictures([s.image for s in scenes], origins)
    values = {"rgb": [s.image for s in scenes]}
    for name in maps_of(scenes[0]):
        values[name] = [maps_of(s)[name] for s in scenes]
        if stored:
            data.put(name, values[name], spec=SPECS.get(name))
    toys = [bits(f"tok_{name}", checkpoint, np.shape(values[name][0]), constant) for name in names]
    for toy in toys:
        data.tokens(toy, values[toy.source])
    uri = data.done()
    return uri, config_of(uri, *toys)


PERFECT = {
    "tok_rgb": {"psnr_db": 88.13, "ssim": 1.0},
    "tok_depth": {"absrel": 0, "delta1": 1, "absrel_fitted": 0, "delta1_fitted": 1},
    "tok_normal": {"mean": 0, "median": 0, "below_11.25": 1, "below_30": 1},
    "tok_semseg": {"miou": 1, "pixel_accuracy": 1},
    "tok_canny_edge": {"f1": 1, "iou": 1, "f1_at_1px": 1},
    "tok_clip": {"cosine": 1, "cosine_p5": 1},
    "tok_dinov2_global": {"cosine": 1, "cosine_p5": 1},
}


def test_tokenizer_that_loses_nothing_is_perfect(tmp_path: Path, scenes: list[Any]) -> None:
    dataset, config = dataset_of(tmp_path, scenes)
    found = evaluate_tokens(dataset, config=config)
    scores = by_modality(found)
    assert set(scores) == set(PERFECT)
    for name, expected in PERFECT.items():
        assert scores[name].figures == pytest.approx(expected, abs=0.03 if name == "tok_normal" else 5e-3), name
        assert (scores[name].compared, scores[name].unusable, scores[name].missing) == (6, {}, 0)
    assert (found.samples, found.rows, found.ok) == (6, 6, True)
    # What loses nothing is as good as its label against truth.
    for name in ("tok_depth", "tok_normal", "tok_semseg"):
        truth = scores[name].truth
        assert truth is not None
        assert (truth.compared, truth.decoded) == (6, pytest.approx(truth.label, nan_ok=True))
    assert scores["tok_depth"].truth is not None
    assert scores["tok_depth"].truth.decoded["absrel"] == pytest.approx(0, abs=1e-3)
    assert scores["tok_rgb"].truth is None
    coded = sum(s.use.coded_bits for s in found.scores)
    assert found.bits == (pytest.approx(coded), sum(s.use.tokens for s in found.scores) * 16 / 6)


def test_tokenizer_that_keeps_nothing_has_the_figures_worked_out_by_hand(tmp_path: Path, scenes: list[Any]) -> None:
    names = ("rgb", "depth", "normal", "semseg", "canny_edge")
    dataset, config = dataset_of(tmp_path, scenes, constant=2.0, names=names)
    scores = {name: s.figures for name, s in by_modality(evaluate_tokens(dataset, config=config)).items()}
    errors = [10 * math.log10(255**2 / np.mean((s.image.astype(float) - 2) ** 2)) for s in scenes]
    assert scores["tok_rgb"]["psnr_db"] == pytest.approx(np.mean(errors))
    depths = [s.depth.astype(np.float16).astype(float) for s in scenes]
    assert scores["tok_depth"]["absrel"] == pytest.approx(np.mean([np.mean(np.abs(2 - d) / d) for d in depths]))
    means = [np.mean(np.abs(d.mean() - d) / d) for d in depths]  # the best constant is the mean
    assert scores["tok_depth"]["absrel_fitted"] == pytest.approx(np.mean(means), rel=1e-4)
    shares = [(s.semantic == 2).sum() for s in scenes]
    assert scores["tok_semseg"]["pixel_accuracy"] == pytest.approx(sum(shares) / (6 * 48 * 48))
    ones = [np.degrees(np.arccos(s.normals.sum(axis=-1) / math.sqrt(3))) for s in scenes]
    assert scores["tok_normal"]["mean"] == pytest.approx(np.mean(ones), abs=0.05)
    assert scores["tok_canny_edge"] == pytest.approx({"f1": 0.0, "iou": 0.0, "f1_at_1px": float("nan")}, nan_ok=True)


def test_depth_known_up_to_scale_and_shift_is_fitted_and_told(tmp_path: Path) -> None:
    depth = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32).repeat(2, 0).repeat(2, 1)
    data = Literal(str(tmp_path / "d"), ["a"])
    data.put("depth", [depth], spec=Spec(convention="relative"))
    toy = bits("tok_depth", token_toys.folder(tmp_path / "w"), (4, 4))
    data.tokens(toy, [(depth - depth.mean()) / depth.std()])
    (score,) = evaluate_tokens(data.done(), config=config_of(data.uri, toy)).scores
    assert score.figures["absrel_fitted"] == pytest.approx(0, abs=1e-3)
    assert score.figures["absrel"] > 0.5
    assert "1 of 1 decoded maps hold depths of 0 or less" in score.notes[0]


def test_missing_tokens_labels_and_bad_rows_are_counted_each_by_itself(tmp_path: Path) -> None:
    maps = [np.full((4, 4), number, np.uint8) for number in range(5)]
    data = Literal(str(tmp_path / "d"), KEYS[:5])
    data.put("semseg", [maps[0], maps[1], None, maps[3], np.zeros((8, 8), np.uint8)], spec=Spec(classes=CLASSES))
    toy = bits("tok_semseg", token_toys.folder(tmp_path / "w"), (4, 4))
    data.tokens(toy, [maps[0], None, maps[2], np.full((4, 4), 13), maps[4]])
    (score,) = evaluate_tokens(data.done(), config=config_of(data.uri, toy)).scores
    assert (score.compared, score.missing, score.without_label) == (1, 1, 1)
    assert score.unusable == {"13 brings bad luck": 1, "decoded as (4, 4), where the label is (8, 8)": 1}
    assert "no label is stored for 1 values: code use and truth only" in score.notes
    assert score.use.values == 4
    assert [p.key for p in score.worst] == ["key0"]


def test_labels_of_other_rows_are_refused(tmp_path: Path) -> None:
    maps = [np.full((4, 4), number, np.uint8) for number in range(2)]
    data, other = (Literal(str(tmp_path / "d"), keys) for keys in (["a", "b"], ["b", "a"]))
    other.put("semseg", maps, spec=Spec(classes=CLASSES))
    toy = bits("tok_semseg", token_toys.folder(tmp_path / "w"), (4, 4))
    data.tokens(toy, maps)
    other.done()
    with pytest.raises(ValueError, match=r"semseg/shard-000000.* does not hold the same keys .*manifest verify"):
        evaluate_tokens(data.done(), config=config_of(data.uri, toy))


def test_malformed_pieces_are_counted_by_what_is_wrong(tmp_path: Path) -> None:
    toy = token_toys.build("tok_det", kind="text", checkpoint=token_toys.vocabulary(tmp_path / "v"))
    cat = {"class_name": "cat", "box": [0.1, 0.2, 0.5, 0.6], "score": 0.9}
    (row,) = toy.encode([[cat]])
    data = Literal(str(tmp_path / "d"), KEYS[:3])
    data.put("det", [[cat], [cat], []])
    data.tokens(toy, [row, np.concatenate([row, row[:3], row[:2]]), row[:0]], raw=True)
    (score,) = evaluate_tokens(data.done()).scores
    assert (score.compared, sum(score.malformed.values())) == (3, 2)
    assert list(score.malformed) == ["not the four coordinates v0 v1 v2 v3"]
    assert (score.figures["recall"], score.figures["precision"]) == (1.0, 1.0)
    assert score.notes == ()  # rebuilt from the manifest alone


def test_tokens_without_stored_labels_meet_truth_alone(tmp_path: Path, scenes: list[Any]) -> None:
    dataset, config = dataset_of(tmp_path, scenes, stored=False, names=("depth", "normal", "semseg"))
    scores = by_modality(evaluate_tokens(dataset, config=config))
    assert all((s.compared, s.without_label, s.figures) == (0, 6, {}) for s in scores.values())
    depth, normal, semseg = (scores[f"tok_{name}"].truth for name in ("depth", "normal", "semseg"))
    assert depth is not None
    assert normal is not None
    assert semseg is not None
    assert depth.decoded["absrel"] == pytest.approx(0, abs=1e-3)
    assert "medians aligned" in depth.notes[0]
    assert normal.decoded["mean"] == pytest.approx(0, abs=0.03)
    assert (depth.label, normal.label) == ({}, {})
    assert semseg.notes == ("not compared: semseg states no class names",)
    named = config.model_copy(update={"labelers": {"toy": {"kind": "scene_labels:SceneLabels"}}})
    again = by_modality(evaluate_tokens(dataset, config=named))["tok_semseg"].truth
    assert again is not None
    assert again.decoded["pixel_accuracy"] == 1.0
    assert again.notes == ("no label is stored; taken for toy's of the configuration",)


def test_every_crop_counts_and_modalities_without_crops_once(tmp_path: Path) -> None:
    maps = [np.full((4, 4), 1, np.uint8), np.full((4, 4), 2, np.uint8)]
    data = Literal(str(tmp_path / "d"), KEYS[:2], crops=2)
    data.put("semseg", maps, maps[::-1], spec=Spec(classes=CLASSES))
    toy = bits("tok_semseg", token_toys.folder(tmp_path / "w"), (4, 4))
    data.tokens(toy, maps, maps)  # the second crop's tokens are the other sample's
    (score,) = evaluate_tokens(data.done(), config=config_of(data.uri, toy)).scores
    assert (score.compared, score.use.values, score.figures["pixel_accuracy"]) == (4, 4, 0.5)
    assert {(p.key, p.crop) for p in score.worst[:2]} == {("key0", 1), ("key1", 1)}


# Which samples


def test_samples_are_chosen_by_their_keys_whatever_the_shards(tmp_path: Path) -> None:
    keys = [f"sample-{number}" for number in range(40)]
    chosen = []
    for shards in (1, 7):
        data = Literal(str(tmp_path / str(shards)), keys, shards=shards)
        data.put("alt_text", keys)
        store = open_store(data.done())
        rows = chosen_rows(store, read_manifest(store), 10)
        starts = [part[0] for part in data.parts]
        chosen.append([keys[starts[number] + row] for number, found in rows.items() for row in found])
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) == set(sorted(keys, key=held_out_rank)[:10])
    # Those that training holds out come first.
    held_out = [key for key in keys if is_held_out(key, 0.2)]
    assert 0 < len(held_out) <= 10
    assert set(held_out) <= set(chosen[0])
    assert set(sorted(keys, key=held_out_rank)[: len(held_out)]) == set(held_out)


def test_memory_does_not_hold_earlier_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"k{number}" for number in range(40)]
    data = Literal(str(tmp_path / "d"), keys)
    data.put("semseg", [np.full((4, 4), 1, np.uint8)] * 40, spec=Spec(classes=CLASSES))
    toy = bits("tok_semseg", token_toys.folder(tmp_path / "w"), (4, 4))
    data.tokens(toy, [np.full((4, 4), 1, np.uint8)] * 40)
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    decode = token_toys.Bits._value

    def watched(self: Any, row: np.ndarray) -> np.ndarray:
        nonlocal most
        value = decode(self, row).copy()
        alive.append(weakref.ref(value))
        most = max(most, sum(r() is not None for r in alive))
        return value

    monkeypatch.setattr(token_toys.Bits, "_value", watched)
    monkeypatch.setattr(tokens_module, "_CHUNK", 4)
    evaluate_tokens(data.done(), config=config_of(data.uri, toy))
    assert len(alive) == 40
    assert most <= 8  # the batch at hand and the one before


# The command


@pytest.fixture(scope="module")
def demo_like(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Captions and objects by real tokenizers that the manifest names; a hostile caption among them."""
    folder = tmp_path_factory.mktemp("words")
    vocabulary = token_toys.vocabulary(folder / "vocabulary")
    caption = token_toys.build("tok_caption", kind="text", checkpoint=vocabulary)
    det = token_toys.build("tok_det", kind="text", checkpoint=vocabulary)
    data = Literal(str(folder / "dataset"), ["a", "b"], size=16)
    data.pictures([np.full((16, 16, 3), 90, np.uint8)] * 2)
    captions = ["a red box", "<script>alert(1)</script>"]
    objects = [[{"class_name": "cat", "box": [0.1, 0.2, 0.5, 0.6], "score": 0.9}], []]
    data.put("caption", captions)
    data.put("det", objects)
    data.tokens(caption, captions)
    data.tokens(det, objects)
    return data.done()


def test_command_prints_a_table_and_writes_json_and_a_page(
    demo_like: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, report = tmp_path / "out" / "t.json", tmp_path / "out" / "t.html"
    assert run_evaluate_tokens(demo_like, json_file=str(figures), html_file=str(report)) == 0
    printed = capsys.readouterr().out
    for text in ("tok_caption", "recall 1.000", "matched IoU 0.99", "TextTokenizer v1", "2 of 2 samples"):
        assert text in printed
    tree = json.loads(figures.read_text())
    scores = {s["modality"]: s for s in tree["scores"]}
    assert scores["tok_det"]["figures"]["class_agreement"] == 1.0
    assert scores["tok_det"]["use"]["values"] == 2
    assert tree["stored_bits"] == pytest.approx(sum(s["use"]["stored_bits"] for s in tree["scores"]))
    page = report.read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    assert "<svg" in page
    # Image, label and decoded boxes of one sample; a list of nothing came back whole and is not among the worst.
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_json_can_be_printed_and_holds_no_nan(demo_like: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_evaluate_tokens(demo_like, modalities=["tok_det"], count=1, json_file="-") == 0
    tree = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert (tree["samples"], [s["modality"] for s in tree["scores"]]) == (1, ["tok_det"])


def test_nothing_to_compare_is_exit_code_1_and_codes_are_told_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Literal(str(tmp_path / "d"), ["a"])
    row = np.arange(4, dtype=np.uint16)
    maker = {"class": "Foreign", "version": 3, "config": {"kind": "elsewhere:Thing"}}
    data.put("tok_depth", [row], spec=Spec(vocabulary=8, length=4, grid=(2, 2)), producer=maker)
    assert run_evaluate_tokens(data.done()) == 1
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "not decoded: tok_depth was made by Foreign of kind 'elsewhere:Thing'" in printed
    assert "4/8 (50 %), perplexity 4" in printed


def test_unknown_modality_is_refused_with_the_nearest(demo_like: str) -> None:
    with pytest.raises(ValueError, match="unknown token modality 'tok_dte'; did you mean 'tok_det'"):
        run_evaluate_tokens(demo_like, modalities=["tok_dte"])
