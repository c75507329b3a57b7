"""Labels whose parts a network codes, as text and back: points with masks, people; and whatever a model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sequences import BINS, Quarters, build, instance, iou, square, star, write_vocabulary
from tiny_tokenizers import checkpoint_config, write_checkpoint

from fourmill.pipeline import masks
from fourmill.pipeline.fingerprints import content_of
from fourmill.tokenizers.sam_instance import grid_box, inside, placed
from fourmill.tokenizers.sequences import people, points
from fourmill.tokenizers.sequences.points import CodedMask, Query
from fourmill.tokenizers.text import MARKERS

SAM, POSES = (
    "fourmill.tokenizers.sam_instance:SamInstanceTokenizer",
    "fourmill.tokenizers.human_poses:HumanPosesTokenizer",
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("words"))


# Points with masks.

IDS = (*range(15), 1023)


def test_points_are_4ms_words() -> None:
    queries = [Query(3, 200, [CodedMask((0, 10, 5, 224), IDS), CodedMask((1, 2, 3, 4), IDS)]), Query(0, 223)]
    ids = "v0=0 v0=1 v0=2 v0=3 v0=4 v0=5 v0=6 v0=7 v0=8 v0=9 v0=10 v0=11 v0=12 v0=13 v0=14 v1=511"
    phrases = points.serialise(queries, BINS)
    assert phrases == [
        f"point v0=200 v1=3 polygon v0=0 v1=10 v2=5 v3=224 {ids}",
        f"polygon v0=1 v1=2 v2=3 v3=4 {ids}",
        "point v0=223 v1=0 none",
    ]
    assert points.parse(" ".join(phrases), BINS, 1024) == (queries, [])


def test_broken_points_are_named_and_the_whole_ones_kept() -> None:
    ids = " ".join(["v0=1"] * 16)
    good = f"polygon v0=0 v1=0 v2=9 v3=9 {ids}"
    cases = {
        f"cone {good} point v0=1 v1=2 none": ["'cone': no point before it", "v0=1' … (21 words): no point"],
        f"point v0=1 {good}": ["'point v0=1': not a point v0 v1", "no point before it"],
        "point v0=1 v1=225 none": ["coordinate 225 is above 224", "'none': no point before it"],
        "point v0=1 v1=2 point v0=2 v1=2 none none": [
            "nothing is said of the point",
            "'none': neither point nor polygon",
        ],
        f"point v0=1 v1=2 polygon v0=5 v1=0 v2=5 v3=9 {ids}": ["the box is empty"],
        f"point v0=1 v1=2 polygon v0=5 v1=9 v2=6 v3=9 {ids}": ["the box is empty"],
        f"point v0=1 v1=2 polygon v0=5 v1=0 v2=4 v3=9 {ids}": ["the box is inside out"],
        "point v0=1 v1=2 polygon v0=5 v1=0 v2=9 v3=9 v0=1": ["not the 16 numbers of a code"],
        f"point v0=1 v1=2 polygon v0=5 v1=0 v2=9 v3=9 {ids[:-1]}600": ["a code that is not below 1024"],
        "point v0=1 v1=2": ["'point v0=1 v1=2': nothing is said of the point"],
    }
    for text, wanted in cases.items():
        queries, problems = points.parse(text, BINS, 1024)
        assert len(problems) == len(wanted), (text, problems)
        assert all(part in problem for part, problem in zip(wanted, problems, strict=True)), (text, problems)
        assert not any(query.masks for query in queries)


@pytest.fixture(scope="module")
def mask_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with 4M's sizes of a mask and its code."""
    config = checkpoint_config("mask", 1, size=64, patch_size=16, codebook_size=1024)
    return write_checkpoint(tmp_path_factory.mktemp("masks") / "network", config)


def test_masks_at_points_come_back_once_each_in_their_boxes(vocabulary: Path, mask_network: Path) -> None:
    label = [
        instance("", square(0, 0, 224, 224)),
        instance("", square(56, 56, 112, 224)),
        instance("", square(0, 0, 4, 224)),
    ]
    tokenizer = build("tok_sam_instance", vocabulary, SAM, masks=str(mask_network), query="instances", points=3)
    tokenizer.codec = Quarters()
    row = tokenizer.encode([label])[0]
    text = tokenizer.text(row)
    ids = " ".join(["v1=511"] * 16)
    whole, inner = f"polygon v0=0 v1=0 v2=224 v3=224 {ids}", f"polygon v0=56 v1=56 v2=168 v3=168 {ids}"
    assert text.startswith(f"point v0=111 v1=111 {whole} {inner} point v0=111 v1=111 {whole} {inner} point")
    (found,) = tokenizer.decode([row])
    assert [o["box"] for o in found] == [[0, 0, 1, 1], [0.25, 0.25, 0.75, 0.75]]  # 4 x 4 pixels: too small to be read
    assert [masks.decode(o["mask"]).sum() for o in found] == [224 * 224, 112 * 112]
    assert [o["area"] for o in found] == [224 * 224, 112 * 112]
    assert found[0]["point"] == [round(111.5 / 224, 6)] * 2
    assert {o["score"] for o in found} == {1.0}


def test_masks_of_any_side_are_told_on_4ms_grid(vocabulary: Path, mask_network: Path) -> None:
    rows = []
    for size in (56, 112, 448):
        label = [instance("", square(size // 4, size // 4, size // 2, size))]
        tokenizer = build("tok_sam_instance", vocabulary, SAM, masks=str(mask_network), query="instances", size=size)
        tokenizer.codec = Quarters()
        rows.append(tokenizer.text(tokenizer.encode([label])[0]).split("polygon")[1])
        (found,) = tokenizer.decode(tokenizer.encode([label]))
        assert iou(masks.decode(found[0]["mask"]), masks.decode(label[0]["mask"])) == 1.0
    assert len(set(rows)) == 1


def test_points_of_a_label_are_spread_stay_the_same_and_say_none_outside_of_masks(
    vocabulary: Path, mask_network: Path
) -> None:
    tokenizer = build("tok_sam_instance", vocabulary, SAM, masks=str(mask_network), points=64, max_tokens=5000)
    tokenizer.codec = Quarters()
    label = [instance("", square(0, 0, 112, 224))]  # a quarter of the picture
    queries, problems = points.parse(tokenizer.text(tokenizer.encode([label])[0]), BINS, 1024)
    hit = [bool(query.masks) for query in queries]
    assert [query.x < 112 and query.y < 112 for query in queries] == hit
    assert (len(queries), problems) == (64, [])
    assert 8 <= sum(hit) <= 24
    assert max(query.x for query in queries) > 200
    again, empty = tokenizer.encode([label, []])
    assert again.tolist() == tokenizer.encode([label])[0].tolist()
    assert tokenizer.text(empty).count("none") == 64
    assert tokenizer.decode([empty]) == [[]]


def test_a_row_of_masks_is_cut_between_two_and_never_ends_in_a_bare_point(vocabulary: Path, mask_network: Path) -> None:
    label = [instance("", square(0, 0, 224, 224)), instance("", square(0, 0, 220, 224))]
    for most, wanted in ((23, 0), (24, 1), (44, 1), (45, 2), (48, 2)):  # 3 for a point, 21 for each mask
        tokenizer = build(
            "tok_sam_instance", vocabulary, SAM, masks=str(mask_network), query="instances", max_tokens=most
        )
        tokenizer.codec = Quarters()
        row = tokenizer.encode([label])[0]
        found, problems = tokenizer.parse(row)
        assert (len(found), problems) == (wanted, [])


def test_only_the_first_masks_of_a_label_are_used(vocabulary: Path, mask_network: Path) -> None:
    label = [instance("", square(0, 0, 112, 224)), instance("", square(112, 112, 112, 224))]
    for most, wanted in ((1, [[0, 0, 0.5, 0.5]]), (2, [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])):
        settings_ = {"masks": str(mask_network), "query": "instances", "max_instances": most}
        tokenizer = build("tok_sam_instance", vocabulary, SAM, **settings_)
        tokenizer.codec = Quarters()
        assert [o["box"] for o in tokenizer.decode(tokenizer.encode([label]))[0]] == wanted


@given(st.lists(st.floats(0.1, 0.45), min_size=5, max_size=12), st.sampled_from([64, 128, 224]))
@settings(max_examples=60, deadline=None)
def test_a_mask_survives_the_64_cells_of_its_box(radii: list[float], size: int) -> None:
    mask = star(radii, size)
    again = placed(inside(mask, 64), grid_box(masks.box_of(mask)), size)
    assert iou(mask, again) > 0.9


def test_random_mask_network_gives_masks_inside_the_told_boxes(vocabulary: Path, mask_network: Path) -> None:
    label = [instance("", square(20, 30, 60, 128)), instance("", square(70, 80, 40, 128))]
    tokenizer = build("tok_sam_instance", vocabulary, SAM, masks=str(mask_network), query="instances", size=128)
    rows = tokenizer.encode([label, label[:1]])
    assert rows[0].dtype == np.uint16
    assert tokenizer.encode([label[:1]])[0].tolist() == rows[1].tolist()
    found, problems = tokenizer.parse(rows[0])
    assert len(found) + len(problems) == 2  # a random network may say that a mask is empty
    for item in found:
        assert masks.decode(item["mask"]).sum() == item["area"]
        assert any(
            all(a <= b + 0.01 for a, b in zip(o["box"][:2], item["box"][:2], strict=True))
            and all(a >= b - 0.01 for a, b in zip(o["box"][2:], item["box"][2:], strict=True))
            for o in label
        )


def test_both_checkpoints_count_in_the_fingerprint(vocabulary: Path, mask_network: Path, tmp_path: Path) -> None:
    config = checkpoint_config("mask", 1, size=64, patch_size=16, codebook_size=1024, heads=4)
    other = write_checkpoint(tmp_path / "other", config)
    (other / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    lineages = [build("tok_sam_instance", vocabulary, SAM, masks=str(m)).lineage() for m in (mask_network, other)]
    assert content_of(lineages[0])["checkpoint"] != content_of(lineages[1])["checkpoint"]
    assert "masks" not in lineages[0]["config"]
    assert "size" not in lineages[0]["config"]
    assert lineages[1]["checkpoint"]["reference"] == str(vocabulary)
    assert lineages[1]["checkpoint"]["masks"]["reference"] == str(other)
    assert lineages[1]["checkpoint"]["licence"] == "unknown and cc-by-nc-4.0"


def test_a_network_whose_codes_the_vocabulary_cannot_say_is_refused(mask_network: Path) -> None:
    with pytest.raises(ValueError, match=r"masks has 1024 codes; the number words of the vocabulary, 100 of each kind"):
        build("tok_sam_instance", "demo:text", SAM, masks=str(mask_network))


# People.

PERSON = {
    "box": [0.1, 0.0, 0.5, 1.0],
    "orientation": [1, 0, 0, 0, -1, 0, 0, 0, 0.25],
    "pose": [0.0] * 207,
    "camera": [0.9, -2.0, 19.0],
    "shape": [0.5, -3.0, 3.0, 4.0, 0, 0, 0, 0, 0, 0],
}
WORDS = (
    "human v0=100 v1=0 v2=500 v3=999 pose v0=0 v0=511 v1=0 v1=511 v0=1 v0=2 v0=3 v0=4 "
    "global v0=999 v0=500 v0=500 v0=500 v0=0 v0=500 v0=500 v0=500 v0=624 "  # 499.5 is rounded to the even 500
    "camera v0=95 v0=0 v0=999 shape v0=583 v0=0 v0=999 v0=999 v0=500 v0=500 v0=500 v0=500 v0=500 v0=500"
)
POSE = [0, 511, 512, 1023, 1, 2, 3, 4]


def test_a_person_is_4ms_39_words() -> None:
    assert people.serialise([PERSON], [POSE], BINS) == [WORDS]
    assert len(WORDS.split()) == 39
    assert people.serialise([], [], BINS) == ["none"]


def test_people_come_back_within_half_a_bin_whatever_the_order_of_their_parts() -> None:
    words = WORDS.split()
    shuffled = " ".join([*words[:5], *words[28:], *words[24:28], *words[14:24], *words[5:14]])
    for text in (WORDS, shuffled):
        (found,), problems = people.parse(text, BINS, 1024)
        assert problems == []
        assert found["code"] == POSE
        assert np.abs(np.subtract(found["box"], PERSON["box"])).max() <= 0.5 / 999 + 1e-9
        assert np.abs(np.subtract(found["orientation"], PERSON["orientation"])).max() <= 1 / 999 + 1e-9
        assert np.abs(np.subtract(found["camera"], [0.9, -1, 19])).max() <= 10 / 999 + 1e-9
        assert np.abs(np.subtract(found["shape"], [0.5, -3, 3, 3, 0, 0, 0, 0, 0, 0])).max() <= 3 / 999 + 1e-9
    assert people.parse("none", BINS, 1024) == ([], [])
    assert people.parse("", BINS, 1024) == ([], [])


def test_a_person_is_whole_although_the_next_ones_first_word_is_lost() -> None:
    found, problems = people.parse(f"{WORDS} {WORDS.removeprefix('human ')} {WORDS}", BINS, 1024)
    assert len(found) == 2
    assert len(problems) == 1
    assert problems[0].endswith("… (38 words): no person")


def test_broken_people_are_named_and_the_whole_ones_kept() -> None:
    cases = {
        "cone": "no person",
        "none none": "no person",
        "human v0=1 v1=1 v2=2": "not the four coordinates",
        WORDS.replace("v2=500", "v2=50"): "the box is inside out",
        WORDS.replace(" camera v0=95 v0=0 v0=999", ""): "not one each of pose, global, camera, shape",
        WORDS.replace("camera v0=95", "camera"): "camera: not 3 numbers v0",
        WORDS.replace("camera v0=95", "camera v1=95"): "camera: not 3 numbers v0",
        WORDS.replace("v0=624", "v0=1624"): "global: number 1624 is not below 1000",
        WORDS.replace("v1=511", "v2=511"): "pose: a code that is not below 1024",
        WORDS.replace("pose v0=0", "pose red"): "pose: not the 8 numbers of a code",
    }
    for text, wanted in cases.items():
        found, problems = people.parse(f"{text} {WORDS}", BINS, 1024)
        assert len(found) == 1, text
        assert wanted in problems[0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("shape", [0.0] * 9, "bad shape of a person"), ("camera", [0, 0, float("inf")], "3 finite numbers are needed")],
)
def test_a_person_with_other_numbers_is_refused(field: str, value: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        people.serialise([{**PERSON, field: value}], [POSE], BINS)


@pytest.fixture(scope="module")
def pose_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = checkpoint_config("human_pose", 207, architecture="mlp", num_codebooks=8, codebook_size=1024)
    return write_checkpoint(tmp_path_factory.mktemp("poses") / "network", config)


def test_people_as_tokens_with_a_random_pose_network(vocabulary: Path, pose_network: Path) -> None:
    tokenizer = build("tok_human_poses", vocabulary, POSES, poses=str(pose_network), max_tokens=80)
    rng = np.random.default_rng(0)
    crowd = [{**PERSON, "pose": rng.normal(size=207).tolist()} for _ in range(3)]
    rows = tokenizer.encode([crowd, [], crowd[:1]])
    assert [len(row) for row in rows] == [78, 1, 39]
    assert tokenizer.take_notes() == ["tok_human_poses: 1 rows cut at 80 tokens (1 objects left out)"]
    assert rows[0].tolist()[:39] == rows[2].tolist()
    found = tokenizer.decode(rows)
    assert [len(people_) for people_ in found] == [2, 0, 1]
    assert {name: len(found[0][1][name]) for name in found[0][1]} == {
        "box": 4, "orientation": 9, "pose": 207, "camera": 3, "shape": 10
    }  # fmt: skip
    codes = tokenizer.code([np.array(p["pose"], np.float32) for p in crowd])
    assert len(set(codes)) == 3
    assert tokenizer.parse(rows[1]) == ([], [])


# Whatever a model writes.

_WORDS = [*MARKERS, "cone", "wine glass", "[EOS]", "[S_1]", "[UNK]", "red"]
_WORDS += [f"v{kind}={value}" for kind in range(4) for value in (0, 1, 2, 3, 49, 224, 255, 999)]


@pytest.fixture(scope="module")
def tokenizers(vocabulary: Path, mask_network: Path, pose_network: Path) -> dict[str, Any]:
    plain = ("tok_det", "tok_instance", "tok_color_palette", "tok_metadata", "tok_caption")
    made = {name: build(name, vocabulary) for name in plain}
    made["tok_sam_instance"] = build("tok_sam_instance", vocabulary, SAM, masks=str(mask_network))
    made["tok_human_poses"] = build("tok_human_poses", vocabulary, POSES, poses=str(pose_network))
    made["tok_sam_instance"].codec = Quarters()
    return made


@given(st.lists(st.sampled_from(_WORDS), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_words_parse_as_any_modality_and_nothing_is_lost_silently(
    tokenizers: dict[str, Any], words: list[str]
) -> None:
    for name, tokenizer in tokenizers.items():
        row = np.array([tokenizer._tokenizer.token_to_id(word) for word in words if word != "red"], dtype=np.int64)
        value, problems = tokenizer.parse(row)
        said = tokenizer.text(row)
        assert bool(value or problems) == bool(said) or said == "none" or "none" in said, name
        assert tokenizer.decode([row]) == [value]


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_damage_to_a_whole_row_leaves_the_untouched_objects(
    tokenizers: dict[str, Any], data: st.DataObject
) -> None:
    crowd = [{**PERSON, "box": [i / 10, 0, 1, 1]} for i in range(3)]
    objects = [instance("cone", square(8 * i, 8 * i, 8), 1.0) for i in range(3)]
    for name, label in (("tok_human_poses", crowd), ("tok_instance", objects), ("tok_det", objects)):
        tokenizer = tokenizers[name]
        row = tokenizer.encode([label])[0].astype(np.int64)
        length = len(row) // 3
        # Not where two objects meet: a lost border may make the neighbour's name another.
        place = data.draw(st.integers(length + 1, 2 * length - 2))
        row[place] = data.draw(st.integers(0, 2) | st.integers(4, tokenizer.vocabulary - 1))  # 3: [EOS] ends the row
        found, _ = tokenizer.parse(row)
        whole = tokenizer.decode(tokenizer.encode([label]))[0]
        assert whole[0] == found[0], name
        assert whole[2] in found, name
