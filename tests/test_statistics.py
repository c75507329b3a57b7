"""Statistics of shards: what is counted of each kind of value, and that sums do not depend on the order of adding."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.counting import ROWS_READ
from fourmill.pipeline.distributions import bins, count_halves, mean, of_halves, of_numbers, quantile
from fourmill.pipeline.shards import Spec, canonical, open_shard, record_of, write_shard
from fourmill.pipeline.statistics import (
    add,
    brief,
    code_counts,
    compute,
    entropy_bits,
    merged,
    pack_counts,
    subtract,
    unpack_counts,
)


def statistics_of(name: str, *columns: Sequence[Any], spec: Spec | None = None, raw: bool = False) -> dict[str, Any]:
    """The statistics of a shard of these values, None for null; one column a crop. `raw`: they are encoded already."""
    entry = modality(name)
    stored = [[v if v is None or raw else codecs.encode(entry, v) for v in column] for column in columns]
    keys = [f"k{i}" for i in range(len(columns[0]))]
    data = write_shard(name, 0, "0" * 16, keys, stored, spec or Spec(crops=len(columns)), {"class": "X"}, {})
    found = compute(open_shard(pa.py_buffer(data), "it"))
    assert record_of(data).statistics == found
    assert json.loads(canonical(found)) == found
    assert bool(brief(found)) == bool(found)  # the manifest looks at the brief ones to know whether there are any
    return found


# Distributions


def test_bins_are_the_leading_bits_of_a_float() -> None:
    found = of_numbers([0.5, 0.6, 0.625, 0.0, -0.0, -3.4, 1e-3, 7.9], bits=2)
    assert found["bins"] == {"0.5": 2, "0.625": 1, "0": 2, "-3": 1, "0.0009765625": 1, "7": 1}
    assert (found["count"], found["min"], found["max"]) == (8, -3.4, 7.9)
    assert bins(found)[0] == (-3.5, -3, 1)
    assert bins(found)[-1] == (7, 8, 1)


def test_whole_numbers_below_32_have_bins_of_their_own() -> None:
    found = of_numbers([0, 1, 7, 31, 32, 33, 1000], whole=True)
    assert bins(found) == [(0, 0, 1), (1, 1, 1), (7, 7, 1), (31, 31, 1), (32, 33, 2), (992, 1023, 1)]


def test_what_no_float_holds_is_counted_apart() -> None:
    found = of_numbers([math.nan, math.inf, 1e39, 2.0])
    assert (found["not_finite"], found["count"], found["bins"]) == (3, 1, {"2": 1})
    halves = of_halves(count_halves(np.array([math.nan, -math.inf, 2.0], np.float16)))
    assert (halves["not_finite"], halves["count"], halves["max"]) == (2, 1, 2.0)


def test_mean_is_exact_where_a_running_sum_would_not_be() -> None:
    values = np.array([65504.0] * 999 + [2.0**-24], np.float16)
    found = of_halves(count_halves(values))
    assert found["scaled_sum"] == 999 * 65504 * 2**24 + 1
    assert mean(found) == (999 * 65504 * 2**24 + 1) / 2**24 / 1000
    assert mean({}) is None


def test_quantiles_lie_in_the_bin_of_the_true_one() -> None:
    values = np.random.default_rng(3).lognormal(size=5000)
    found = of_numbers(values, bits=2)
    for share in (0.01, 0.25, 0.5, 0.75, 0.99):
        true = float(np.quantile(values, share))
        assert quantile(found, share) == pytest.approx(true, rel=0.25)
    assert (quantile(found, 0), quantile(found, 1)) == (values.min(), values.max())
    assert quantile({}, 0.5) is None
    assert quantile(of_numbers([3, 5, 5, 9], whole=True), 0.5) == 5


@given(st.lists(st.floats(width=16, allow_nan=False), max_size=30))
def test_maps_and_single_numbers_are_counted_alike(values: list[float]) -> None:
    halves = of_halves(count_halves(np.array(values, np.float16)), bits=2)
    assert {k: v for k, v in halves.items() if v} == {k: v for k, v in of_numbers(values, bits=2).items() if v}


# Adding


numbers = st.lists(st.integers(0, 2000) | st.floats(-1e4, 1e4), max_size=6)
# Names of classes are a stranger's: those that mean something elsewhere must not.
names = st.dictionaries(st.sampled_from(["dog", "min", "max", "bits", "count", "bins"]), st.integers(1, 9), max_size=4)
ids = st.lists(st.integers(0, 40), max_size=12)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Statistics as `compute` gives them, of a modality that has a little of everything."""
    found: dict[str, Any] = {"classes": draw(names), "empty": draw(st.integers(0, 3)), "vocabulary": 64}
    for name in ("scores", "areas"):
        found[name] = of_numbers(draw(numbers))
    found["facts"] = {name: of_numbers(draw(numbers), bits=2) for name in ("brightness", "entropy")}
    if drawn := draw(ids):
        counts = np.bincount(drawn)
        found |= {"tokens": len(drawn), "min": min(drawn), "max": max(drawn), "histogram": pack_counts(counts)}
    return merged([found])


@given(st.lists(trees(), max_size=5), st.randoms(use_true_random=False))
def test_sums_do_not_depend_on_the_order(parts: list[dict[str, Any]], random: Any) -> None:
    shuffled = random.sample(parts, len(parts))
    one_by_one: dict[str, Any] = {}
    for part in shuffled:
        one_by_one = add(one_by_one, part)
    assert merged(parts) == merged(shuffled) == one_by_one
    half = len(parts) // 2
    assert add(merged(parts[:half]), merged(parts[half:])) == one_by_one


@given(trees(), trees())
def test_what_was_added_can_be_taken_away(one: dict[str, Any], other: dict[str, Any]) -> None:
    left = subtract(add(one, other), other)
    assert without_bounds(left) == without_bounds(one)
    assert subtract(add(one, other), add(other, one)) == {}


def without_bounds(tree: Any) -> Any:
    """A tree without its bounds; in counts by name "min" is a name."""
    if not isinstance(tree, dict):
        return tree
    named = ("classes", "bins")
    return {k: v if k in named else without_bounds(v) for k, v in tree.items() if k not in ("min", "max")}


def test_a_bound_is_unknown_once_its_shard_was_taken_away() -> None:
    low, high = of_numbers([1, 5]), of_numbers([3, 9])
    both = add({"objects": low}, {"objects": high})
    left = subtract(both, {"objects": high})["objects"]
    assert (left["min"], left["max"]) == (1, None)
    again = add({"objects": left}, {"objects": of_numbers([100])})["objects"]
    assert (again["min"], again["max"]) == (1, None)  # the true one could have been above 100
    assert quantile(again, 1) == pytest.approx(100, rel=1 / 16)


def test_histograms_of_different_lengths_and_large_counts_add_up() -> None:
    one = {"tokens": 1, "histogram": pack_counts(np.array([2**33, 0, 1]))}
    two = {"tokens": 1, "histogram": pack_counts(np.array([2**33, 5, 0, 0, 7, 0]))}
    assert unpack_counts(add(one, two)["histogram"]).tolist() == [2**34, 5, 1, 0, 7]
    assert code_counts({**two, "vocabulary": 6}).tolist() == [2**33, 5, 0, 0, 7, 0]
    assert code_counts({}).tolist() == []


def test_entropy_is_that_worked_out_by_hand() -> None:
    assert entropy_bits(np.array([8, 4, 2, 2, 0])) == 1.75
    assert entropy_bits(np.array([5])) == entropy_bits(np.zeros(3)) == 0


def test_brief_statistics_are_scalars() -> None:
    whole = {"tokens": 3, "max": 7, "histogram": "x", "lengths": of_numbers([1, 2]), "classes": {"bins": 3}}
    assert brief(whole) == {"tokens": 3, "max": 7, "mean_lengths": 1.5}


# What is counted


def test_tokens_of_a_grid() -> None:
    spec = Spec(crops=2, vocabulary=10, length=3)
    found = statistics_of("tok_rgb", [[1, 2, 2], None, [9, 9, 9]], [[0, 1, 2], [4, 4, 4], [3, 3, 1]], spec=spec)
    assert unpack_counts(found.pop("histogram")).tolist() == [1, 3, 3, 2, 3, 0, 0, 0, 0, 3]
    assert found == {"values": 5, "tokens": 15, "min": 0, "max": 9, "vocabulary": 10, "constant": 2}


def test_tokens_of_sequences() -> None:
    found = statistics_of("tok_caption", [[5, 6, 7], [], None, [5]], spec=Spec(vocabulary=100))
    assert (found["values"], found["tokens"], found["min"], found["max"]) == (3, 4, 5, 7)
    assert found["lengths"]["bins"] == {"0": 1, "1": 1, "3": 1}
    assert "constant" not in found


def test_ids_outside_of_the_vocabulary_are_counted_and_take_no_memory() -> None:
    found = statistics_of("tok_caption", [[1, 4_000_000_000], [2]], spec=Spec(vocabulary=70_000))
    assert (found["beyond"], found["max"]) == (1, 4_000_000_000)
    assert unpack_counts(found["histogram"]).tolist() == [0, 1, 1]
    unnamed = statistics_of("tok_caption", [[1, 60_000]], spec=Spec())
    assert (unnamed["max"], "vocabulary" in unnamed) == (60_000, False)


def test_a_shard_without_tokens_has_no_statistics() -> None:
    assert statistics_of("tok_rgb", [None, None], spec=Spec(vocabulary=8, length=2)) == {}
    assert statistics_of("tok_rgb", [], spec=Spec(vocabulary=8, length=2)) == {}


def test_depth() -> None:
    flat, steps = np.full((2, 2), 3.0), np.array([[0.0, 1.0], [1.5, 2.5]])
    found = statistics_of("depth", [flat, None, steps], spec=Spec(convention="metric"))
    values = found.pop("values")
    assert found == {"rows_read": 2, "shapes": {"2x2": 2}, "constant": 1, "pixels": 8, "invalid": 1}
    assert values["bins"] == {"0": 1, "1": 1, "1.5": 1, "2.5": 1, "3": 4}
    assert (values["min"], values["max"], mean(values)) == (0, 3, 17 / 8)


def test_normals_by_axis() -> None:
    field = np.zeros((3, 2, 2))
    field[2, 0] = -1  # two pixels that face the camera, two without a normal
    found = statistics_of("normal", [field], spec=Spec(convention="opencv"))
    assert (found["pixels"], found["invalid"], found["x"]["bins"], found["z"]["bins"]) == (
        4, 2, {"0": 4}, {"-1": 2, "0": 2},
    )  # fmt: skip


def test_features_of_any_shape() -> None:
    found = statistics_of("clip_global", [np.array([0.5, -0.5, 1.0])])
    assert (found["shapes"], found["values"]["bins"]) == ({"3": 1}, {"-0.5": 1, "0.5": 1, "1": 1})


def test_class_maps_by_pixels_and_by_maps() -> None:
    spec = Spec(classes=("floor", "min"))
    found = statistics_of("semseg", [np.array([[0, 0], [1, 255]]), np.zeros((1, 2)), np.array([[7, 7]])], spec=spec)
    assert found == {
        "rows_read": 3,
        "shapes": {"2x2": 1, "1x2": 2},
        "constant": 2,
        "pixels": 8,
        "void": 1,
        "classes": {"floor": 4, "min": 1, "id 7": 2},
        "maps": {"floor": 2, "min": 1, "id 7": 1},
    }


def test_edges() -> None:
    lines = np.zeros((4, 4), np.uint8)
    lines[0] = 255
    found = statistics_of("canny_edge", [lines, np.zeros((4, 4))])
    assert (found["pixels"], found["edges"], found["constant"]) == (32, 4, 1)
    assert found["shares"]["bins"] == {"0": 1, "0.25": 1}


def test_maps_are_read_of_evenly_spaced_rows_and_the_number_is_told() -> None:
    maps = [None] + [np.array([[float(i), 0.5]]) for i in range(2 * ROWS_READ)]
    found = statistics_of("depth", maps, [np.array([[3000.0, 0.5]])] * len(maps), spec=Spec(crops=2))
    assert found["rows_read"] == ROWS_READ
    assert found["values"]["count"] == 4 * ROWS_READ  # two pixels of two crops
    assert found["values"]["min"] == 0
    first_crop = sum(range(0, 2 * ROWS_READ, 2))
    assert mean(found["values"]) == (first_crop + 3000 * ROWS_READ + ROWS_READ) / (4 * ROWS_READ)


def test_texts() -> None:
    found = statistics_of("caption", ["two words", " ", None, "löwe"])
    assert (found["characters"]["bins"], found["words"]["bins"]) == ({"9": 1, "1": 1, "4": 1}, {"2": 1, "0": 1, "1": 1})
    assert found["empty"] == 1


def test_captions_of_several_sources() -> None:
    texts = [{"text": "a", "source": "alt_text"}, {"text": "b c", "source": "blip"}]
    found = statistics_of("captions", [texts, [texts[1]], []])
    assert (found["texts"]["bins"], found["sources"]) == ({"2": 1, "1": 1, "0": 1}, {"alt_text": 1, "blip": 2})
    assert (found["words"]["bins"], "empty" in found) == ({"1": 1, "2": 2}, False)


def test_objects() -> None:
    dog = {"class_name": "dog", "score": 0.5, "box": [0.25, 0.25, 0.75, 0.75]}
    found = statistics_of("det", [[dog, {**dog, "score": 0.25}], [], None, [{**dog, "class_name": "max"}]])
    assert found["objects"]["bins"] == {"2": 1, "0": 1, "1": 1}
    assert (found["scores"]["bins"], found["areas"]["bins"]) == ({"0.5": 2, "0.25": 1}, {"0.25": 3})
    assert (found["classes"], found["empty"]) == ({"dog": 2, "max": 1}, 1)


def test_people_have_no_class_and_no_score() -> None:
    found = statistics_of("human_poses", [[{"box": [0, 0, 1, 0.5]}]])
    assert (found["objects"]["count"], found["areas"]["max"]) == (1, 0.5)
    assert {"classes", "scores"}.isdisjoint(found) or found["classes"] == {}


def test_palettes_facts_and_crops() -> None:
    palette = {"1": [[10, 20, 30]], "2": [[0, 0, 0], [255, 255, 255]]}
    found = statistics_of("color_palette", [palette])
    assert (found["colours"]["max"], found["red"]["max"], found["blue"]["max"]) == (2, 10, 30)
    facts = statistics_of("metadata", [{"n_humans": 3, "brightness": 100.5, "unheard of": 1}])["facts"]
    assert facts["n_humans"]["bins"] == {"3": 1}
    assert (facts["brightness"]["bins"], set(facts)) == ({"96": 1}, {"n_humans", "brightness"})
    crops = statistics_of("crop_settings", [np.array([0, 4, 128, 100, 1]), np.array([0, 0, 64, 64, 0])])
    assert (crops["crops"], crops["flipped"], crops["height"]["max"], crops["width"]["min"]) == (2, 1, 128, 64)


def test_pictures_and_where_they_came_from() -> None:
    assert statistics_of("rgb", [b"12345", None, b"1"])["bytes"]["bins"] == {"5": 1, "1": 1}
    known = {"width": 640, "height": 480, "format": "JPEG"}
    found = statistics_of("source", [known, {**known, "width": None, "height": None, "format": None}])
    assert (found["short_side"]["max"], found["width"]["max"], found["formats"]) == (480, 640, {"JPEG": 1})


# Strangers


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("depth", codecs.encode(modality("depth"), np.ones((1, 2))), b"\x02not a map"),
        ("normal", codecs.encode(modality("normal"), np.ones((3, 1, 2))), codecs.encode(modality("normal"), 0.5)),
        ("semseg", codecs.encode(modality("semseg"), np.ones((1, 2))), b"not a picture"),
        ("det", "[]", '[{"score": "high"}]'),
        ("det", "[]", "[" * 100_000),
        ("det", "[]", '[{"box": [0, 1]}]'),
        ("source", '{"width": 3, "height": 3}', '{"width": [], "height": 1}'),
        ("captions", "[]", '"text"'),
        ("color_palette", '{"1": [[1, 2, 3]]}', '{"1": [[1, 2]]}'),
        ("metadata", '{"n_humans": 1}', '{"n_humans": null}'),
        ("metadata", '{"n_humans": 1}', '{"n_humans": 1' + "0" * 400 + "}"),
    ],
)
def test_values_that_cannot_be_read_are_counted(name: str, good: Any, bad: Any) -> None:
    assert statistics_of(name, [good, bad, good], raw=True)["unreadable"] == 1
    assert "unreadable" not in statistics_of(name, [good, good], raw=True)


def test_names_that_no_vocabulary_announces_are_bounded() -> None:
    strange = [[{"class_name": f"class {i:04}"}] for i in range(1500)] + [[{"class_name": "x" * 5000}]] * 3
    found = statistics_of("det", strange)["classes"]
    assert len(found) == 1001
    assert found["(other names)"] == 501
    assert found["x" * 60 + "…"] == 3
    announced = Spec(classes=tuple(f"class {i:04}" for i in range(1500)))
    assert len(statistics_of("det", strange, spec=announced)["classes"]) == 1501
