"""Text tokenizers: vocabularies in 4M's layout, boxes and captions as text and ids, rows cut between objects."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from fourmill.labelers.coco import THINGS
from fourmill.pipeline.fingerprints import content_of
from fourmill.scenes import render
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.sequences.bins import draws, id_words, level, plain, read_ids, value_of
from fourmill.tokenizers.sequences.boxes import parse, serialise
from fourmill.tokenizers.text import MARKERS, open_tokenizer, train_text_tokenizer

CAPTIONS = ["A red sphere before a blue box", "two red spheres and a green box", "three blue boxes, a red cone"] * 3
unit = st.floats(0, 1, allow_nan=False)


def build(name: str, folder: Path | str, **options: Any) -> Any:
    tokenizer = TOKENIZERS.build(name, {"kind": "text", "checkpoint": str(folder), **options})
    tokenizer.load("cpu")
    return tokenizer


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    data = train_text_tokenizer(CAPTIONS, 400, num_sentinels=3, coordinate_bins=5, class_names=["box", "wine glass"])
    (folder / "tokenizer.json").write_bytes(data)
    return folder


# Numbers.


def test_bytes_are_themselves_in_256_bins_and_rounded_to_the_nearest_of_100() -> None:
    assert [level(v, 255, 256) for v in (0, 127, 255)] == [0, 127, 255]
    assert [level(v, 255, 1000) for v in (0, 127, 255, 300, -1)] == [0, 127, 255, 255, 0]
    assert [level(v, 255, 100) for v in (0, 127, 128, 255)] == [0, 49, 50, 99]  # 127 x 99 / 255 = 49.3
    assert max(abs(value_of(level(v, 255, 100), 255, 100) - v) for v in range(256)) <= 255 / 99 / 2


def test_ids_of_networks_are_split_at_512_and_come_back() -> None:
    assert id_words([0, 511, 512, 1023, 2047], 1000) == ["v0=0", "v0=511", "v1=0", "v1=511", "v3=511"]
    assert id_words([99, 100, 399], 100) == ["v0=99", "v1=0", "v3=99"]  # small vocabularies divide by their bins
    assert read_ids(["v0=511", "v1=511"], 2, 1024, 1000) == [511, 1023]
    assert read_ids(["v0=511"], 2, 1024, 1000) == "not the 2 numbers of a code"
    assert read_ids(["v0=511", "cone"], 2, 1024, 1000) == "not the 2 numbers of a code"
    assert read_ids(["v0=512", "v0=0"], 2, 1024, 1000) == "a code that is not below 1024"
    assert read_ids(["v0=1", "v2=0"], 2, 1024, 1000) == "a code that is not below 1024"


def test_draws_depend_on_the_content_alone() -> None:
    first = draws({"a": 1, "b": [2, 3]}, 400, 7)
    assert first == draws({"b": [2, 3], "a": 1}, 400, 7)
    assert first != draws({"a": 1, "b": [2, 4]}, 400, 7)
    assert set(first) == set(range(7))


# Boxes.


def test_objects_are_ordered_from_the_corner_rounded_half_to_even_and_the_unsure_left_out() -> None:
    objects = [
        {"box": [0.5, 0.5, 0.75, 1.0], "class_name": "wine glass", "score": 0.9},
        {"box": [0.0, 0.125, 0.375, 0.625], "class_name": "cone", "score": 0.6},
        {"box": [0.0, 0.0, 1.0, 1.0], "class_name": "box", "score": 0.59},
    ]
    # 4 x 0.125 = 0.5 -> 0, 4 x 0.375 = 1.5 -> 2, 4 x 0.625 = 2.5 -> 2: Python rounds halves to even, as 4M does.
    assert serialise(objects, bins=5) == ["v0=0 v1=0 v2=2 v3=2 cone", "v0=2 v1=2 v2=3 v3=4 wine glass"]


def test_objects_in_the_three_orders_of_4m() -> None:
    objects = [
        {"box": [0.5, 0.0, 0.75, 0.25], "class_name": "far", "score": 0.7},
        {"box": [0.25, 0.25, 1.0, 1.0], "class_name": "large", "score": 0.8},
        {"box": [0.25, 0.25, 0.5, 0.5], "class_name": "sure", "score": 0.9},
    ]
    found = {
        order: [p.split()[-1] for p in serialise(objects, 5, 0.6, order)] for order in ("distance", "score", "area")
    }
    assert found["distance"] == ["large", "sure", "far"]  # as far from the corner: in the order given
    assert found["score"] == ["sure", "large", "far"]
    assert found["area"] == ["large", "far", "sure"]


def test_parsing_keeps_whole_objects_and_names_the_broken_pieces() -> None:
    text = "v1=3 v0=0 v1=1 v2=2 v3=4 wine glass v0=1 v1=1 v2=2 v0=3 v1=3 v2=1 v3=3 box v0=0 v1=0 v2=5 v3=4 cone red"
    objects, problems = parse(text, bins=5)
    assert objects == [{"box": [0.0, 0.25, 0.5, 1.0], "class_name": "wine glass", "score": 1.0}]
    assert problems == [
        "'v1=3': not the four coordinates v0 v1 v2 v3",
        "'v0=1 v1=1 v2=2': not the four coordinates v0 v1 v2 v3",
        "'v0=3 v1=3 v2=1 v3=3 box': the box is inside out",
        "'v0=0 v1=0 v2=5 v3=4 cone red': coordinate 5 is not below 5",
    ]


def test_sentence_of_a_long_piece_is_short() -> None:
    assert parse(" ".join(["cone"] * 100), 5)[1] == [
        f"'{' '.join(['cone'] * 12)}' … (100 words): not the four coordinates v0 v1 v2 v3"
    ]


@given(st.lists(st.tuples(unit, unit, unit, unit, st.sampled_from(["box", "wine glass"])), max_size=8))
@settings(max_examples=100, deadline=None)
def test_any_boxes_come_back_within_half_a_bin(drawn: list[tuple[float, float, float, float, str]]) -> None:
    objects: list[dict[str, Any]] = [
        {"box": [min(a, c), min(b, d), max(a, c), max(b, d)], "class_name": name, "score": 1.0}
        for a, b, c, d, name in drawn
    ]
    tokenizer = build("tok_det", "demo:text")
    found, problems = tokenizer.parse(tokenizer.encode([objects])[0])
    wanted = sorted(objects, key=lambda o: o["box"][0] ** 2 + o["box"][1] ** 2)
    assert tokenizer.bins == 100
    assert problems == []
    assert [o["class_name"] for o in found] == [o["class_name"] for o in wanted]
    away = [np.subtract(f["box"], w["box"]) for f, w in zip(found, wanted, strict=True)]
    assert np.abs(away or 0).max() <= 0.5 / 99 + 1e-9


@given(st.lists(st.sampled_from(["v0=1", "v1=2", "v2=3", "v3=4", "v3=99", "v4=1", "box", "[EOS]", "v0=", "é"])))
@settings(max_examples=100, deadline=None)
def test_any_soup_of_tokens_parses_and_loses_nothing_silently(words: list[str]) -> None:
    objects, problems = parse(" ".join(words), bins=10)
    assert len(objects) + len(problems) >= words.count("v0=1")
    assert bool(objects or problems) == bool(words)


@pytest.mark.parametrize("box", [[0, 0, 1], [0, 0, 1, float("nan")]])
def test_a_box_without_four_finite_numbers_is_refused(box: list[float]) -> None:
    with pytest.raises(ValueError, match="bad box"):
        serialise([{"box": box, "class_name": "a", "score": 1}], 10)


@pytest.mark.parametrize("name", ["", " ", "v0=3", "red v3=44 cone"])
def test_a_class_name_that_would_read_as_numbers_or_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="bad class name"):
        serialise([{"box": [0, 0, 1, 1], "class_name": name, "score": 1}], 10)


# The vocabulary.


def test_vocabulary_begins_with_the_layout_of_4m(text_folder: Path) -> None:
    vocabulary = open_tokenizer((text_folder / "tokenizer.json").read_bytes(), "here")
    layout = [vocabulary.id_to_token(i) for i in range(29)]
    assert layout[:7] == ["[PAD]", "[UNK]", "[SOS]", "[EOS]", "[S_0]", "[S_1]", "[S_2]"]
    assert layout[7:17] == ["v0=0", "v0=1", "v0=2", "v0=3", "v0=4", "v1=0", "v1=1", "v1=2", "v1=3", "v1=4"]
    assert layout[17:27] == ["v2=0", "v2=1", "v2=2", "v2=3", "v2=4", "v3=0", "v3=1", "v3=2", "v3=3", "v3=4"]
    assert layout[27:] == ["box", "wine glass"]


def test_same_texts_in_another_order_learn_the_same_vocabulary() -> None:
    assert train_text_tokenizer(CAPTIONS, 400, 3, 5) == train_text_tokenizer(CAPTIONS[::-1], 400, 3, 5)


def test_fixed_tokens_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary_size 20 is less than the 28 fixed tokens"):
        train_text_tokenizer(CAPTIONS, 20, 3, 5, ["box"])


def test_markers_are_one_token_each_behind_the_class_names_and_change_no_text() -> None:
    data = train_text_tokenizer(CAPTIONS, 400, 3, 5, ["box"], MARKERS)
    vocabulary = open_tokenizer(data, "here")
    assert [vocabulary.id_to_token(i) for i in range(27, 36)] == ["box", *MARKERS]
    found = vocabulary.encode("Polygon pose shapes none", add_special_tokens=False).tokens
    assert found == ["polygon", "pose", "shape", "##s", "none"]
    assert train_text_tokenizer(CAPTIONS, 400, 3, 5, ["box"]) == train_text_tokenizer(CAPTIONS, 400, 3, 5, ["box"], ())


@pytest.mark.parametrize(("names", "markers"), [(["Box"], []), (["box", "box"], []), (["box"], ["box"]), ([" "], [])])
def test_names_that_cannot_be_one_token_are_refused(names: list[str], markers: list[str]) -> None:
    with pytest.raises(ValueError, match="bad class name"):
        train_text_tokenizer(CAPTIONS, 400, 3, 5, names, markers)


def test_vocabulary_in_another_layout_is_refused(tmp_path: Path, text_folder: Path) -> None:
    data = (text_folder / "tokenizer.json").read_text().replace("[SOS]", "<s>")
    (tmp_path / "tokenizer.json").write_text(data)
    with pytest.raises(ValueError, match="not in 4M's layout"):
        build("tok_caption", tmp_path)


def test_padding_and_truncation_in_a_vocabulary_file_have_no_effect(tmp_path: Path, text_folder: Path) -> None:
    vocabulary = Tokenizer.from_file(str(text_folder / "tokenizer.json"))
    vocabulary.enable_padding()
    vocabulary.enable_truncation(2)
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    texts = ["a red sphere", "two"]
    rows = build("tok_caption", tmp_path).encode(texts)
    assert [r.tolist() for r in rows] == [r.tolist() for r in build("tok_caption", text_folder).encode(texts)]
    assert [len(row) for row in rows] == [3, 1]


# 4M's published vocabulary: its layout and settings, with few word pieces.


@pytest.fixture(scope="module")
def folder_4m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BertNormalizer, BertPreTokenizer, no post-processor, no decoder; numbers and sentinels are added tokens that are
    not normalised, the 80 names of COCO, in alphabetical order, are."""
    control = ["[PAD]", "[UNK]", "[SOS]", "[EOS]"]
    exact = [f"[S_{i}]" for i in range(200)] + [f"v{kind}={i}" for kind in range(4) for i in range(1000)]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    pieces = [*letters, *(f"##{c}" for c in letters), "point", "poly", "##gon", "none", "human", "a", "photo", "of"]
    words = list(dict.fromkeys([*control, *exact, *sorted(THINGS), *pieces]))
    vocabulary = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    vocabulary.normalizer = normalizers.BertNormalizer(lowercase=True)
    vocabulary.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    vocabulary.add_special_tokens(control)
    vocabulary.add_special_tokens([AddedToken(word, single_word=True, normalized=False) for word in exact])
    vocabulary.add_special_tokens([AddedToken(word, single_word=True, normalized=True) for word in sorted(THINGS)])
    folder = tmp_path_factory.mktemp("4m")
    vocabulary.save(str(folder / "tokenizer.json"))
    return folder


def test_layout_of_4m_has_its_published_ids(folder_4m: Path) -> None:
    vocabulary = Tokenizer.from_file(str(folder_4m / "tokenizer.json"))
    wanted = {"[S_199]": 203, "v0=0": 204, "v1=0": 1204, "v2=0": 2204, "v3=999": 4203, "airplane": 4204, "zebra": 4283}
    assert {word: vocabulary.token_to_id(word) for word in wanted} == wanted
    found = json.loads((folder_4m / "tokenizer.json").read_text())
    assert (found["post_processor"], found["decoder"]) == (None, None)


def test_rows_are_those_of_the_tokenizers_library_on_4ms_text(folder_4m: Path) -> None:
    vocabulary = Tokenizer.from_file(str(folder_4m / "tokenizer.json"))
    objects = [
        {"box": [0.5, 0.5, 1.0, 0.9985], "class_name": "wine glass", "score": 0.61},
        {"box": [0.1, 0.0005005, 0.3, 0.4], "class_name": "person", "score": 1.0},
    ]
    palette = {"2": [[0, 128, 255], [7, 8, 9]]}
    facts = {"original_width": 640, "colorfulness": 75.0, "aesthetic_score": 5.0}
    caption = "A photo of a Wine Glass, o'clock."
    texts = {
        "tok_det": (objects, "v0=100 v1=0 v2=300 v3=400 person v0=500 v1=500 v2=999 v3=998 wine glass"),
        "tok_color_palette": (palette, "v1=2 v0=0 v0=128 v0=255 v0=7 v0=8 v0=9"),
        "tok_metadata": (facts, "v1=0 v0=20 v1=9 v0=24 v1=20 v0=1"),
        "tok_caption": (caption, caption),
    }
    for name, (value, text) in texts.items():
        tokenizer = build(name, folder_4m)
        row = tokenizer.encode([value])[0].tolist()
        assert row == vocabulary.encode(text, add_special_tokens=False).ids, name
        assert tokenizer.decode([np.array([*row, 3])]) == tokenizer.decode([np.array(row)])  # 3: 4M's [EOS]
    person, glass = 4204 + sorted(THINGS).index("person"), 4204 + sorted(THINGS).index("wine glass")
    row = build("tok_det", folder_4m).encode([objects])[0].tolist()
    assert row == [304, 1204, 2504, 3604, person, 704, 1704, 3203, 4202, glass]


def test_vocabulary_may_be_a_file_of_any_name(folder_4m: Path, tmp_path: Path) -> None:
    file = tmp_path / "text_tokenizer_4m_wordpiece_30k.json"
    file.write_bytes((folder_4m / "tokenizer.json").read_bytes())
    named, folder = (
        build("tok_caption", place).encode(["a photo of a dog"])[0].tolist() for place in (file, folder_4m)
    )
    assert named == folder
    assert len(folder) == 5
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"wordpiece_30k\.json' is not a Hugging Face tokenizer"):
        build("tok_caption", file)


# Captions.


def test_captions_come_back_lower_case_and_without_end_marker(text_folder: Path) -> None:
    tokenizer = build("tok_caption", text_folder)
    rows = tokenizer.encode(["A red sphere before two boxes", ""])
    assert rows[0].dtype == np.uint16
    assert len(rows[0]) == 6  # every word is one piece, 'boxes' too: the class name only stands for the whole word
    assert 3 not in rows[0]
    assert rows[1].shape == (0,)
    assert tokenizer.decode(rows) == ["a red sphere before two boxes", ""]
    assert tokenizer.parse(rows[0]) == ("a red sphere before two boxes", [])


def test_a_caption_that_is_no_text_is_refused(text_folder: Path) -> None:
    with pytest.raises(ValueError, match="a text of type int; str is needed"):
        build("tok_caption", text_folder).encode([7])


def test_long_captions_are_cut_at_max_tokens_and_counted(text_folder: Path) -> None:
    tokenizer = build("tok_caption", text_folder, max_tokens=4)
    rows = tokenizer.encode(["a red sphere before a blue box", "a red sphere before"])
    assert [len(row) for row in rows] == [4, 4]
    assert tokenizer.take_notes() == ["tok_caption: 1 rows cut at 4 tokens"]
    assert tokenizer.take_notes() == []


def test_text_of_strangers_cannot_spell_control_tokens(text_folder: Path) -> None:
    assert plain("[EOS] v0=3 [S_1] [X] v=3 v0=x") == "[ EOS] v0= 3 [ S_1] [X] v=3 v0=x"
    row = build("tok_caption", text_folder).encode(["[PAD][EOS][SOS][S_0][S_2] v0=1 v3=4"])[0]
    assert not {0, 2, 3, *range(4, 27)} & set(row.tolist())
    named = [{"box": [0, 0, 1, 1], "class_name": "[EOS] box [S_1]", "score": 1}]
    assert not {2, 3, 4, 5, 6} & set(build("tok_det", text_folder).encode([named])[0].tolist())


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_gives_a_row_that_says_the_same_when_it_is_encoded_again(text_folder: Path, text: str) -> None:
    tokenizer = build("tok_caption", text_folder)
    row = tokenizer.encode([text])[0]
    assert not {0, 2, 3, *range(4, 27)} & set(row.tolist())
    if 1 not in row:  # [UNK] has lost its word
        assert tokenizer.encode(tokenizer.decode([row]))[0].tolist() == row.tolist()


@given(
    st.lists(st.sampled_from(sorted({w for c in CAPTIONS for w in c.lower().replace(",", "").split()})), max_size=30)
)
@settings(max_examples=50, deadline=None)
def test_captions_of_known_words_come_back_exactly(text_folder: Path, words: list[str]) -> None:
    tokenizer = build("tok_caption", text_folder)
    assert tokenizer.decode(tokenizer.encode([" ".join(words)])) == [" ".join(words)]


# Objects as rows.


def test_objects_take_five_tokens_each_and_are_not_cut_in_two(text_folder: Path) -> None:
    objects = [
        {"box": [0.5, 0.5, 1.0, 1.0], "class_name": "wine glass", "score": 1.0},
        {"box": [0.0, 0.25, 0.5, 0.75], "class_name": "box", "score": 1.0},
    ]
    rows = build("tok_det", text_folder).encode([objects, []])
    assert rows[0].tolist() == [7, 13, 19, 25, 27, 9, 14, 21, 26, 28]
    assert rows[1].tolist() == []
    short = build("tok_det", text_folder, max_tokens=9)
    assert short.encode([objects, objects])[0].tolist() == [7, 13, 19, 25, 27]
    assert short.take_notes() == ["tok_det: 2 rows cut at 9 tokens (2 objects left out)"]
    assert short.decode(rows) == [objects[::-1], []]
    none = build("tok_det", text_folder, max_tokens=4)
    assert none.encode([objects])[0].tolist() == []
    assert none.take_notes() == ["tok_det: 1 rows cut at 4 tokens (2 objects left out)"]


@given(st.lists(st.integers(0, 40), max_size=30))
@settings(max_examples=50, deadline=None)
def test_any_ids_decode_to_objects(text_folder: Path, ids: list[int]) -> None:
    for item in build("tok_det", text_folder).decode([np.array(ids)])[0]:
        assert all(0 <= value <= 1 for value in item["box"])


def test_ids_beyond_the_vocabulary_are_refused(text_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"ids 7\.\.9999"):
        build("tok_caption", text_folder).decode([np.array([7, 9999])])


# The component.


def test_a_source_without_a_text_format_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(ValueError, match=r"tok_rgb: no text format for rgb; there are some for alt_text, caption, det"):
        TOKENIZERS.build("tok_rgb", {"kind": "text", "checkpoint": "demo:text"})


def test_settings_without_effect_draw_a_warning(text_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build("tok_caption", text_folder, min_score=0.5, max_tokens=3)
    assert [r.getMessage() for r in caplog.records] == ["tok_caption: min_score has no effect on caption"]


def test_fingerprint_has_only_settings_that_the_rows_depend_on(text_folder: Path) -> None:
    def content(name: str, **options: Any) -> dict[str, Any]:
        return content_of(build(name, text_folder, **options).lineage())["config"]

    first = {"kind": "text", "max_tokens": 256, "min_score": 0.6}  # as it was before there were other settings
    assert content("tok_caption") == content("tok_det") == content("tok_instance", size=64) == first
    assert content("tok_det", order="score") == {**first, "order": "score"}
    assert content("tok_color_palette", colors=3) == {**first, "colors": 3}


def test_tokenizer_travels_to_a_worker_without_its_vocabulary(text_folder: Path) -> None:
    tokenizer = build("tok_caption", text_folder)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert len(pickle.dumps(tokenizer)) < 5_000
    assert again.encode(["a red box"])[0].tolist() == tokenizer.encode(["a red box"])[0].tolist()


def test_demo_text_restores_captions_and_objects() -> None:
    unseen = [render(9, index, 128) for index in range(1000, 1032)]
    captions = [scene.caption for scene in unseen]
    tokenizer = build("tok_caption", "demo:text")
    rows = tokenizer.encode(captions)
    assert tokenizer.decode(rows) == captions
    assert not any(1 in row for row in rows)
    boxes = [
        [{"box": [v / 128 for v in o.box], "class_name": o.class_name, "score": 1.0} for o in scene.objects]
        for scene in unseen
    ]
    found = build("tok_det", "demo:text").encode(boxes)
    assert [len(row) for row in found] == [5 * len(objects) for objects in boxes]
