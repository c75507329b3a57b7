"""The bootstrap's figures: for samples that count once they are those of the measures, for others those of a dataset in
which the samples stand as often. Retrieval and intervals on literal values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np
import pytest

from fourmill.evaluate.dense import DepthMeasure, NormalMeasure, SemsegMeasure
from fourmill.evaluate.measure import Measure
from fourmill.evaluate.model.features import own_caption, own_picture, pooled, recalls
from fourmill.evaluate.model.spread import Spread, draws, spread_of
from fourmill.evaluate.model.tallies import chosen_places, interval
from fourmill.evaluate.objects import DetMeasure
from fourmill.evaluate.panoptic import PanopticMeasure
from fourmill.evaluate.results import Place
from fourmill.evaluate.truth import TrueObject, Truth, TruthSource
from fourmill.evaluate.words import CaptionMeasure
from fourmill.pipeline.shards import Spec

RANDOM = np.random.default_rng(7)
CLASSES = ("box", "cone", "floor")


class Source(TruthSource):
    """Truth that is given to measures."""

    kind = "literals"
    classes = CLASSES
    things = frozenset({"box", "cone"})
    stuff = frozenset({"floor"})

    def __init__(self, closed: bool = True) -> None:
        super().__init__("literals")
        self.closed_captions = closed

    def find(self, key: str, source: Mapping[str, Any], parts: Set[str]) -> Truth | None:
        raise AssertionError


def depth_pair() -> tuple[np.ndarray, Truth]:
    truth = RANDOM.uniform(1, 9, (8, 8)).astype(np.float32)
    return (truth * RANDOM.uniform(0.6, 1.5, (8, 8))).astype(np.float32), Truth(depth=truth)


def normal_pair() -> tuple[np.ndarray, Truth]:
    truth = RANDOM.normal(size=(3, 8, 8))
    value = truth + RANDOM.normal(size=truth.shape) * RANDOM.uniform(0.1, 2)
    return value.astype(np.float32), Truth(normal=(truth / np.linalg.norm(truth, axis=0)).astype(np.float32))


def semseg_pair() -> tuple[np.ndarray, Truth]:
    truth = RANDOM.integers(0, 3, (8, 8)).astype(np.uint8)
    wrong = RANDOM.random((8, 8)) < 0.3
    return np.where(wrong, RANDOM.integers(0, 3, (8, 8)), truth).astype(np.uint8), Truth(semseg=truth)


def box(low: float, high: float) -> list[float]:
    return [low, low, high, high]


def det_pair() -> tuple[list[dict[str, Any]], Truth]:
    """One to three objects; most are found, some a little off, some of the wrong class, and some are made up."""
    there, found = [], []
    for _ in range(RANDOM.integers(1, 4)):
        low, name = RANDOM.uniform(0, 0.6), str(RANDOM.choice(["box", "cone"]))
        there.append(TrueObject(name, tuple(box(low, low + 0.3))))  # type: ignore[arg-type]
        said = name if RANDOM.random() < 0.8 else "box"
        off = RANDOM.uniform(0, 0.12)
        if RANDOM.random() < 0.9:
            found.append({"class_name": said, "box": box(low + off, low + 0.3 + off), "score": RANDOM.random()})
    if RANDOM.random() < 0.4:
        found.append({"class_name": "cone", "box": box(0.7, 0.9), "score": RANDOM.random()})
    return sorted(found, key=lambda o: -o["score"]), Truth(objects=tuple(there))


def caption_pair() -> tuple[str, Truth]:
    colours, shapes = ["red", "blue", "green"], ["box", "cone", "sphere"]
    texts = [f"a {RANDOM.choice(colours)} {RANDOM.choice(shapes)} and a {RANDOM.choice(colours)} box" for _ in "ab"]
    return texts[0], Truth(captions=(texts[1],))


METRIC, CLASSED = Spec(convention="metric"), Spec(classes=CLASSES)
CASES: dict[str, tuple[Callable[[], Measure], Callable[[], tuple[Any, Truth]]]] = {
    "depth": (lambda: DepthMeasure(METRIC, Source(), 8), depth_pair),
    "inverse depth": (lambda: DepthMeasure(Spec(convention="inverse"), Source(), 8), depth_pair),
    "normal": (lambda: NormalMeasure(Spec(convention="opencv"), Source(), 8), normal_pair),
    "semseg": (lambda: SemsegMeasure(CLASSED, Source(), 8), semseg_pair),
    "det": (lambda: DetMeasure(Spec(), Source(), 64), det_pair),
    "phrases": (lambda: CaptionMeasure(Spec(), Source(), 8), caption_pair),
    "free text": (lambda: CaptionMeasure(Spec(), Source(closed=False), 8), caption_pair),
}
# Angles are binned, 0.05 degrees here and 0.005 there; of captions BLEU has no spread.
TOLERANCE = {"median": 0.06}
EXPECTED = {"det": {"ap", "ap50", "f1_50"}, "free text": {"rouge_l"}}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("times", [(1,) * 9, (2, 0, 1, 3, 1, 0, 0, 1, 1)], ids=["each once", "drawn again"])
def test_drawn_samples_have_the_figures_of_a_dataset_that_holds_them_as_often(
    case: str, times: tuple[int, ...]
) -> None:
    make, pair = CASES[case]
    pairs = [pair() for _ in times]
    spread = spread_of(make())
    assert spread is not None
    for value, truth in pairs:
        spread.add(value, truth)
    found = spread.figures(np.array([(1,) * len(times), times], np.float32))
    repeated = make()
    for (value, truth), count in zip(pairs, times, strict=True):
        for _ in range(count):
            repeated.add(value, truth)
    expected = repeated.figures()
    assert set(found) == EXPECTED.get(case, set(expected) - {"coverage"})
    for name, values in found.items():
        if name in expected:
            assert values[1] == pytest.approx(expected[name], abs=TOLERANCE.get(name, 2e-6)), name
        assert values.shape == (2,)


def add_all(spread: Spread | None, *pairs: tuple[Any, Truth]) -> dict[str, float]:
    assert spread is not None
    for value, truth in pairs:
        spread.add(value, truth)
    return {name: float(values[0]) for name, values in spread.figures(np.ones((1, len(pairs)), np.float32)).items()}


def test_f1_counts_boxes_that_are_said_whatever_their_rank() -> None:
    truth = Truth(objects=(TrueObject("box", (0, 0, 0.5, 0.5)), TrueObject("cone", (0.5, 0.5, 1, 1))))
    said = [
        {"class_name": "box", "box": [0, 0, 0.5, 0.4], "score": 0.5},  # IoU 0.8
        {"class_name": "cone", "box": [0, 0, 0.5, 0.5], "score": 1.0},  # nothing of that class is there
        {"class_name": "cone", "box": [0.5, 0.5, 1, 1], "score": 0.49},  # right, but not said
    ]
    found = add_all(spread_of(DetMeasure(Spec(), Source(), 64)), (said, truth))
    assert found["f1_50"] == pytest.approx(2 * 1 / (2 + 2))
    assert add_all(spread_of(DetMeasure(Spec(), Source(), 64)), ([], truth))["f1_50"] == 0.0


def test_modalities_without_a_spread_have_figures_without_intervals() -> None:
    assert spread_of(PanopticMeasure(Spec(classes=CLASSES), Source(), 8)) is None
    assert interval(None) is None
    assert interval(np.array([np.nan, np.nan])) is None


def test_draws_are_of_as_many_samples_and_follow_from_the_seed() -> None:
    found = draws(50, 400, seed=3)
    assert found.shape == (400, 50)
    assert (found.sum(axis=1) == 50).all()
    np.testing.assert_array_equal(found, draws(50, 400, seed=3))
    assert (found != draws(50, 400, seed=4)).any()


def test_interval_of_a_mean_has_the_width_that_statistics_give() -> None:
    spread = spread_of(CaptionMeasure(Spec(), Source(closed=False), 8))
    assert spread is not None
    values = RANDOM.random(400)
    spread.rows = values.tolist()  # type: ignore[attr-defined]
    found = interval(spread.figures(draws(400, 2000, seed=0))["rouge_l"])
    half = 1.96 * values.std() / 20  # of a mean of 400
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 8)


def test_retrieval_of_literal_similarities_shares_ranks_between_equals() -> None:
    similar = np.array([[0.9, 0.1, 0.1], [0.5, 0.5, 0.5], [0.8, 0.7, 0.6]])
    found = recalls(similar)
    np.testing.assert_allclose(found[1], [1, 1 / 3, 0])
    np.testing.assert_allclose(found[5], [1, 1, 1])


def test_constant_features_find_pictures_and_captions_at_chance() -> None:
    teachers = [pooled(RANDOM.normal(size=(16, 3, 3))) for _ in range(40)]
    constant = [teachers[0]] * 40
    texts = np.stack([pooled(RANDOM.normal(size=16)) for _ in range(40)])
    for figures in (own_picture(constant, teachers), own_caption(constant, texts)):
        for name, hits in figures.items():
            assert hits.mean() == pytest.approx(int(name.rpartition("r")[2]) / 40), name
    assert all(hits.mean() == 1 for hits in own_picture(teachers, teachers).values())
    assert own_caption(teachers, np.stack(teachers))["text_to_image_r1"].mean() == 1


def test_pooling_weighs_cells_by_direction_only() -> None:
    features = np.zeros((2, 1, 2), np.float32)
    features[:, 0, 0], features[:, 0, 1] = (100, 0), (0, 0.01)
    np.testing.assert_allclose(pooled(features), [0.5**0.5] * 2, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_pictured_samples_are_the_worst_the_middle_and_the_best_without_repeats(count: int) -> None:
    places = [Place(f"k{i}", 0, i, 0, float(i)) for i in RANDOM.permutation(count)]
    found = chosen_places(places)
    rows = [place.row for part in found.values() for place in part]
    assert len(set(rows)) == len(rows)
    assert found["worst"][0].row == count - 1
    if count == 10:
        assert [[p.row for p in part] for part in found.values()] == [[9, 8, 7], [6, 5, 4], [2, 1, 0]]
