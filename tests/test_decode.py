"""`fourmill decode`, and the tokenizers that a manifest's lineage brings back for it: what is trusted, and what not."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import token_toys
from PIL import Image
from token_toys import Literal, bits, config_of
from typer.testing import CliRunner

from fourmill.cli import app
from fourmill.evaluate.tokens.decode import decode_sample
from fourmill.evaluate.tokens.rebuild import RebuildError, checkpoints_of, producers_of, rebuild
from fourmill.pipeline.manifest import Manifest, Update, read_manifest, update_manifest
from fourmill.pipeline.pictures import class_picture
from fourmill.pipeline.report import write_report
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.store import LocalStore, open_store
from fourmill.scenes import CLASSES

GREY = np.full((16, 16, 3), 90, np.uint8)
CAT: dict[str, Any] = {"class_name": "cat", "box": [0.1, 0.2, 0.5, 0.6], "score": 0.9}
FACTS = {"original_width": 640, "n_humans": 2}
PALETTE = {"1": [[10, 200, 30]]}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return token_toys.vocabulary(tmp_path_factory.mktemp("vocabulary") / "text")


@pytest.fixture
def dataset(words: str, tmp_path: Path) -> str:
    """Two samples: text modalities that the manifest brings back; the second lacks a caption's tokens."""
    return make(str(tmp_path / "dataset"), words)


def make(uri: str, words: str) -> str:
    values: dict[str, list[Any]] = {
        "caption": ["a red box", "two cats"],
        "det": [[CAT], []],
        "color_palette": [PALETTE, PALETTE],
        "metadata": [FACTS, FACTS],
    }
    data = Literal(uri, ["000000001", "000000002"], size=16)
    data.pictures([GREY, GREY])
    for name, labels in values.items():
        data.put(name, labels)
        tokenizer = token_toys.build(f"tok_{name}", kind="text", checkpoint=words)
        quarantine = {"000000002": "no words: the caption is blank"} if name == "caption" else {}
        data.tokens(tokenizer, [labels[0], None if quarantine else labels[1]], quarantine=quarantine)
    return data.done()


def test_each_modality_comes_back_as_picture_and_value_beside_its_label(dataset: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = {d.modality: d for d in decode_sample(dataset, "000000001", str(out))}
    assert {name: d.files for name, d in found.items()} == {
        "tok_caption": ("tok_caption.txt", "tok_caption.label.txt"),
        "tok_color_palette": ("tok_color_palette.png", "tok_color_palette.json", "tok_color_palette.label.png"),
        "tok_det": ("tok_det.png", "tok_det.json", "tok_det.label.png"),
        "tok_metadata": ("tok_metadata.png", "tok_metadata.json", "tok_metadata.label.png"),
    }
    assert {p.name for p in out.iterdir()} == {"image.png", *(f for d in found.values() for f in d.files)}
    assert (out / "tok_caption.txt").read_text() == "a red box\n"
    assert json.loads((out / "tok_color_palette.json").read_text()) == PALETTE
    assert json.loads((out / "tok_metadata.json").read_text()) == {"original_width": 656, "n_humans": 2}
    (box,) = json.loads((out / "tok_det.json").read_text())
    assert box["class_name"] == "cat"
    np.testing.assert_allclose(box["box"], CAT["box"], atol=0.5 / 999)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "image.png")), GREY)
    assert Image.open(out / "tok_det.png").size == (32, 32)  # boxes are drawn at twice the size
    assert (found["tok_det"].tokens, found["tok_det"].malformed) == (5, ())


def test_label_and_reconstruction_are_drawn_in_the_same_colours(tmp_path: Path) -> None:
    depth = np.linspace(1, 4, 16, dtype=np.float32).reshape(4, 4)
    ids = np.arange(16, dtype=np.uint8).reshape(4, 4) % 5
    data = Literal(str(tmp_path / "d"), ["a"])
    data.put("depth", [depth], spec=Spec(convention="metric"))
    data.put("semseg", [ids], spec=Spec(classes=CLASSES))
    checkpoint = token_toys.folder(tmp_path / "w")
    toys = [bits("tok_depth", checkpoint, (4, 4)), bits("tok_semseg", checkpoint, (4, 4))]
    for toy, value in zip(toys, (depth + 1.0, ids), strict=True):
        data.tokens(toy, [value])
    out = tmp_path / "out"
    decode_sample(data.done(), "a", str(out), config=config_of(data.uri, *toys))
    pictures = {p.name: np.asarray(Image.open(p)) for p in out.glob("*.png")}
    assert set(pictures) == {"tok_depth.png", "tok_depth.label.png", "tok_semseg.png", "tok_semseg.label.png"}
    np.testing.assert_array_equal(pictures["tok_semseg.png"], class_picture(ids))
    # One metre farther is another colour, as the label's range holds for both.
    assert (pictures["tok_depth.png"] != pictures["tok_depth.label.png"]).any(axis=-1).mean() > 0.9
    np.testing.assert_allclose(np.load(out / "tok_depth.npy"), depth + 1, rtol=1e-3)


def test_boxes_lie_on_the_decoded_picture_where_the_dataset_has_none(words: str, tmp_path: Path) -> None:
    data = Literal(str(tmp_path / "d"), ["a"])
    det = token_toys.build("tok_det", kind="text", checkpoint=words)
    rgb = bits("tok_rgb", token_toys.folder(tmp_path / "w"), (24, 24, 3))
    data.tokens(det, [[]])
    decode_sample(data.done(), "a", str(tmp_path / "grey"))
    assert Image.open(tmp_path / "grey" / "tok_det.png").size == (448, 448)
    data.tokens(rgb, [np.full((24, 24, 3), 200, np.uint8)])
    decode_sample(data.done(), "a", str(tmp_path / "out"), config=config_of(data.uri, rgb))
    drawn = np.asarray(Image.open(tmp_path / "out" / "tok_det.png"))
    assert drawn.shape == (48, 48, 3)
    assert set(drawn.ravel()) == {150}  # box_picture dims 200 to 150


def test_malformed_pieces_are_told_and_the_rest_is_decoded(words: str, tmp_path: Path) -> None:
    det = token_toys.build("tok_det", kind="text", checkpoint=words)
    (row,) = det.encode([[CAT]])
    data = Literal(str(tmp_path / "d"), ["a"])
    data.tokens(det, [np.concatenate([row[:3], row])], raw=True)
    (found,) = decode_sample(data.done(), "a", str(tmp_path / "out"))
    assert [text.rpartition(": ")[2] for text in found.malformed] == ["not the four coordinates v0 v1 v2 v3"]
    assert len(json.loads((tmp_path / "out" / "tok_det.json").read_text())) == 1


def test_tokens_that_are_not_there_or_cannot_be_decoded_are_told_with_the_reason(dataset: str, tmp_path: Path) -> None:
    found = {d.modality: d for d in decode_sample(dataset, "000000002", str(tmp_path / "out"))}
    assert found["tok_caption"].failed == "no words: the caption is blank"
    assert not found["tok_det"].failed
    data = Literal(str(tmp_path / "d"), ["a"])
    toy = bits("tok_semseg", token_toys.folder(tmp_path / "w"), (2, 2))
    data.tokens(toy, [np.full((2, 2), 13)])
    with pytest.raises(RebuildError, match="its 4 tokens cannot be decoded: 13 brings bad luck"):
        decode_sample(data.done(), "a", str(tmp_path / "out"), config=config_of(data.uri, toy))


def test_decoding_again_replaces_what_lies_there(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tok_caption.txt").write_text("of another sample")
    decode_sample(dataset, "000000001", str(tmp_path / "out"))
    assert (tmp_path / "out" / "tok_caption.txt").read_text() == "a red box\n"


def test_dataset_and_files_may_lie_in_object_storage(words: str, s3_uri: str) -> None:
    uri = make(f"{s3_uri}/dataset", words)
    for _ in range(2):
        decode_sample(uri, "000000001", f"{s3_uri}/out", ["tok_det"])
    out = open_store(f"{s3_uri}/out")
    assert {i.name for i in out.list()} == {"image.png", "tok_det.png", "tok_det.json", "tok_det.label.png"}
    assert Image.open(io.BytesIO(out.get("tok_det.png"))).size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["00000001"], "no sample '00000001' in"),
        (["00000001"], "the nearest keys are '000000001', '000000002'"),
        (["000000001", "--modality", "tok_dpth"], "unknown token modality 'tok_dpth'"),
        (["000000001", "--crop", "3"], "crop 3: tok_color_palette has crops 0 to 0"),
        (["000000001", "--checkpoint", "tok_det"], "checkpoint 'tok_det': give MODALITY=PATH"),
        (["000000001", "--checkpoint", "tok_dte=x"], "unknown token modality 'tok_dte'; did you mean 'tok_det'"),
        (["000000001", "--modality", "tok_det", "--checkpoint", "tok_det=/gone/x"], "no checkpoint at '/gone/x'"),
    ],
)
def test_misuse_is_refused_saying_what_would_be_right(
    dataset: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["decode", dataset, *arguments, "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, ValueError)  # which the command line turns into exit code 2
    assert message in str(done.exception)


def test_command_prints_a_table_and_says_by_its_exit_code_whether_all_came_back(dataset: str, tmp_path: Path) -> None:
    whole = CliRunner().invoke(
        app, ["decode", dataset, "000000001", "-o", str(tmp_path / "out")], standalone_mode=False
    )
    assert whole.return_value == 0, whole.output
    for text in ("tok_caption.label.txt", "tok_det.png", "malformed, notes"):
        assert text in whole.output
    lacking = CliRunner().invoke(
        app, ["decode", dataset, "000000002", "-o", str(tmp_path / "out")], standalone_mode=False
    )
    assert lacking.return_value == 1
    assert "no words: the caption is blank" in lacking.output


# What a manifest may bring back


def made(tmp_path: Path, tokenizer: Any, value: Any) -> Manifest:
    data = Literal(str(tmp_path / "d"), ["a"])
    data.tokens(tokenizer, [value])
    return read_manifest(open_store(data.done()))


def test_weights_that_have_changed_are_refused_unless_they_are_chosen(words: str, tmp_path: Path) -> None:
    place = tmp_path / "moving"
    place.mkdir()
    (place / "tokenizer.json").write_bytes((Path(words) / "tokenizer.json").read_bytes())
    manifest = made(tmp_path, token_toys.build("tok_caption", kind="text", checkpoint=str(place)), "a red box")
    ((name, producer),) = producers_of(manifest)
    assert rebuild(manifest, name, producer).notes == ()
    (place / "more.json").write_text("{}")
    with pytest.raises(RebuildError, match=r"does not hold the weights that made tok_caption: digest .* --checkpoint"):
        rebuild(manifest, name, producer)
    chosen = rebuild(manifest, name, producer, checkpoints={"tok_caption": str(place)})
    assert "does not hold the weights that made tok_caption" in chosen.notes[0]
    moved = rebuild(manifest, name, producer, checkpoints={"tok_caption": words})
    assert moved.notes == ()  # the same weights elsewhere


def test_code_from_elsewhere_is_never_imported_because_a_manifest_says_so(tmp_path: Path) -> None:
    toy = bits("tok_semseg", token_toys.folder(tmp_path / "w"), (2, 2))
    manifest = made(tmp_path, toy, np.zeros((2, 2)))
    ((name, producer),) = producers_of(manifest)
    with pytest.raises(RebuildError, match=r"kind 'token_toys:Bits', which is none of Fourmill's.* give --config"):
        rebuild(manifest, name, producer)
    (value,) = rebuild(manifest, name, producer, config_of("d", toy)).restore([np.array([1, 2, 3, 4], np.uint16)])
    np.testing.assert_array_equal(value[0], [[1, 2], [3, 4]])


def test_configuration_of_other_weights_gives_way_to_the_manifest(words: str, tmp_path: Path) -> None:
    maker = token_toys.build("tok_caption", kind="text", checkpoint=words)
    manifest = made(tmp_path, maker, "a red box")
    ((name, producer),) = producers_of(manifest)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((Path(words) / "tokenizer.json").read_bytes() + b"\n")
    config = config_of("d", token_toys.build("tok_caption", kind="text", checkpoint=str(other)))
    found = rebuild(manifest, name, producer, config)
    assert (found.notes, found.tokenizer.checkpoint.location) == ((), words)
    lost = {p: {**m, "checkpoint": {**m["checkpoint"], "reference": "/gone/x"}} for p, m in manifest.producers.items()}
    with pytest.raises(RebuildError, match=f"'{other}' does not hold the weights that made tok_caption"):
        rebuild(update_manifest(manifest.store, lambda _: Update(producers=lost)), name, producer, config)


@pytest.mark.parametrize(
    "lineage",
    [{}, {"config": 5}, {"config": {"kind": "text"}, "checkpoint": 7}, {"config": {"kind": "text", "x": []}}],
)
def test_lineage_of_any_content_is_an_error_with_advice(lineage: Any) -> None:
    with pytest.raises(RebuildError, match="--config"):
        rebuild(Manifest(LocalStore("nowhere"), {"producers": {"p": lineage}}), "tok_caption", "p")


def test_tokenizer_of_another_vocabulary_is_refused(words: str, tmp_path: Path) -> None:
    manifest = made(tmp_path, token_toys.build("tok_caption", kind="text", checkpoint=words), "a red box")
    ((name, producer),) = producers_of(manifest)
    other = [replace(r, spec={**r.spec, "vocabulary": 50}, digest="0" * 64) for r in manifest.records(name)]
    manifest = update_manifest(manifest.store, lambda _: Update(other))
    with pytest.raises(RebuildError, match=r"tok_caption was stored with vocabulary 50; this tokenizer's is \d+"):
        rebuild(manifest, name, producer)


def test_hub_ids_are_pinned_to_the_commit_that_made_the_tokens(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    from fourmill import checkpoints
    from fourmill.pipeline import component

    asked: list[str] = []

    def resolve(reference: str) -> checkpoints.Checkpoint:
        asked.append(reference)
        return checkpoints.Checkpoint(reference, words, None, "hub:abc123", "mit")

    monkeypatch.setattr(component, "resolve", resolve)
    lineage = {
        "class": "TextTokenizer",
        "version": 1,
        "config": {"kind": "text", "max_tokens": 9},
        "checkpoint": {"reference": "owner/name", "digest": "hub:abc123", "licence": "mit"},
    }
    found = rebuild(Manifest(LocalStore("nowhere"), {"producers": {"p": lineage}}), "tok_caption", "p")
    assert asked == ["owner/name@abc123"]
    assert found.tokenizer.config.max_tokens == 9  # type: ignore[attr-defined]


def test_second_checkpoint_of_a_tokenizer_is_named_by_its_option(dataset: str) -> None:
    manifest = read_manifest(open_store(dataset))
    assert checkpoints_of(["tok_det.masks=/m", "tok_det=/words"], manifest) == {
        "tok_det.masks": "/m",
        "tok_det": "/words",
    }
    lineage = {
        "class": "SamInstanceTokenizer",
        "config": {"kind": "sam_instance", "max_tokens": 289},
        "checkpoint": {
            "reference": "/gone/words",
            "digest": "d",
            "licence": "mit",
            "masks": {"reference": "/gone/masks", "digest": "e", "licence": "mit"},
        },
    }
    from fourmill.evaluate.tokens.rebuild import recorded

    assert recorded("tok_sam_instance", lineage | {"config": {"kind": "text"}}) == {
        "kind": "text",
        "checkpoint": "/gone/words",
        "masks": "/gone/masks",
    }


# The report


def test_report_shows_tokens_decoded_by_the_manifest_beside_their_labels(dataset: str, tmp_path: Path) -> None:
    page, _ = write_report(dataset, tmp_path / "report.html")
    text = page.read_text()
    for words in ("Tokens against labels", "Codes and bits", "TextTokenizer v1", "class agreement 1.000", "<svg"):
        assert words in text
    assert "decoded from tokens" in text
    assert len(re.findall('alt="det, decoded from tokens"', text)) == 2
    assert len(re.findall('alt="color_palette, decoded from tokens"', text)) == 2


def test_report_without_tokens_has_no_section_of_them(tmp_path: Path) -> None:
    data = Literal(str(tmp_path / "d"), ["a"], size=16)
    data.pictures([GREY])
    page, _ = write_report(data.done(), tmp_path / "report.html")
    assert "Tokens against labels" not in page.read_text()
