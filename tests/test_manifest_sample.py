"""`manifest sample`: everything about one sample, in words, as JSON, as files; found by key, by place or by number."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import token_toys
import toys
from helpers import make_jpeg, write_files
from PIL import Image
from token_toys import Literal
from typer.testing import CliRunner

from fourmill.cli import app
from fourmill.config import Config
from fourmill.pipeline.ingest import IngestConfig, ingest
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.manifest.lookup import Place, find_key
from fourmill.pipeline.manifest.sample import Held, SampleReport, describe_sample, licences
from fourmill.pipeline.manifest.sample_files import write_sample
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.store import open_store

PICTURE = np.full((16, 16, 3), 90, np.uint8)
CAT: dict[str, Any] = {"class_name": "cat", "box": [0.1, 0.2, 0.5, 0.6], "score": 0.9}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return token_toys.vocabulary(tmp_path_factory.mktemp("vocabulary") / "text")


@pytest.fixture(scope="module")
def dataset(words: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four samples in two shards; the second lacks a caption."""
    data = Literal(str(tmp_path_factory.mktemp("sample") / "d"), ["a", "b", "c", "d"], size=16, shards=2)
    data.pictures([PICTURE] * 4, [{"origin": f"0.tar:{key}.png", "format": "PNG"} for key in "abcd"])
    data.put("depth", [np.array([[1.0, 2.0], [3.0, 6.0]])] * 4, spec=Spec(convention="metric"))
    data.put("semseg", [np.array([[0, 0], [1, 255]])] * 4, spec=Spec(classes=("floor", "wall")))
    data.put("caption", ["a red box", None, "two cats", "x"], quarantine={"b": "blank: no words"})
    data.put("det", [[CAT, CAT], [], [CAT], []])
    data.tokens(token_toys.build("tok_det", kind="text", checkpoint=words), [[CAT, CAT], [], [CAT], []])
    return data.done()


def described(dataset: str, key: str, names: Sequence[str] | None = None) -> SampleReport:
    manifest = read_manifest(open_store(dataset))
    return describe_sample(manifest, find_key(manifest, key), names)


def held(found: SampleReport, name: str) -> Held:
    (one,) = [h for h in found.held if h.modality == name]
    return one


def test_every_modality_says_what_it_holds_or_why_not(dataset: str) -> None:
    found = described(dataset, "a")
    assert (found.key, found.shard, found.row, found.row_number, found.snapshot) == ("a", 0, 0, 0, 1)
    assert found.source == {"height": 16, "width": 16, "origin": "0.tar:a.png", "format": "PNG"}
    values = {h.modality: h.value for h in found.held if h.modality not in ("rgb", "source", "tok_det")}
    assert values == {
        "caption": "'a red box'",
        "crop_settings": "16 x 16 from row 0, column 0",
        "depth": "2 x 2, metric, 1 to 6, mean 3",
        "det": "2 entries: 2 cat",
        "semseg": "2 x 2, floor 50%, wall 25%, void 25%",
    }
    assert held(found, "tok_det").value.startswith(f"{len(held(found, 'tok_det').tokens[0])} tokens, ")
    lacking = held(described(dataset, "b"), "caption")
    assert (lacking.present, lacking.value, lacking.reason) == (False, "", "blank: no words")


def test_modalities_that_have_not_come_to_the_shard_are_named(dataset: str, tmp_path: Path) -> None:
    data = Literal(str(tmp_path / "d"), ["x", "y"], shards=2)
    data.put("rgb", [b"1", b"2"])
    data.put("caption", ["one", "two"])
    data.records.pop()
    found = described(data.done(), "y")
    assert ([h.modality for h in found.held], found.lacking) == (["rgb"], ("caption",))


def test_every_crop_counts(tmp_path: Path) -> None:
    data = Literal(str(tmp_path / "d"), ["x"], crops=3)
    data.put("tok_depth", *[[np.array([i, 1, 1, 2])] for i in range(3)], spec=Spec(vocabulary=9, length=4, grid=(2, 2)))
    (one,) = described(data.done(), "x").held
    assert (one.crops, one.value) == (3, "4 tokens, 3 distinct of 9: 0 1 1 2")
    assert one.tokens == ((0, 1, 1, 2), (1, 1, 1, 2), (2, 1, 1, 2))


def test_lineage_and_licences_go_back_to_everything_it_was_made_from(tmp_path: Path) -> None:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "d"))
    run(Config.model_validate(toys.config(dataset)))
    found = described(dataset, "000000013", ["tok_depth"])
    assert sorted(p["class"] for p in found.lineage.values()) == ["BlockTokens", "Brightness", "CropSettings"]
    tokens = held(found, "tok_depth")
    assert found.lineage[tokens.producer]["class"] == "BlockTokens"
    assert tokens.made_by == "BlockTokens version 1"
    assert tokens.licences == ("code Apache-2.0 (BlockTokens, Brightness, CropSettings)",)
    assert found.corpus["sources"] == [str(tmp_path / "corpus")]


def test_weights_that_may_not_be_sold_are_said_to_be_so(tmp_path: Path) -> None:
    free = {"reference": "/m/free", "digest": "1" * 64, "licence": "mit"}
    bound = {"reference": "/m/bound", "digest": "2" * 64, "licence": "cc-by-nc-4.0", "masks": free}
    manifest = Manifest(
        open_store(tmp_path),
        {
            "producers": {
                "t": {"class": "Tok", "licence": "MIT", "checkpoint": free, "inputs": {"depth": "d"}},
                "d": {"class": "Net", "licence": "Apache-2.0", "checkpoint": bound, "inputs": {"rgb": "corpus"}},
            }
        },
    )
    assert list(licences(manifest, ["t"])) == [
        "code Apache-2.0 (Net)",
        "code MIT (Tok)",
        "weights cc-by-nc-4.0, NOT FOR COMMERCIAL USE (/m/bound)",
        "weights mit (/m/free)",
    ]


def test_a_row_that_is_another_sample_in_one_modality_is_refused(tmp_path: Path) -> None:
    data = Literal(str(tmp_path / "d"), ["x", "y"])
    data.put("caption", ["one", "two"])
    data.keys = ["y", "x"]
    data.put("alt_text", ["a longer text that makes it the larger object", "so that the caption's keys are believed"])
    with pytest.raises(ValueError, match=r"alt_text/.*: row 0 is not 'x', as it is in others: `fourmill manifest"):
        describe_sample(read_manifest(open_store(data.done())), Place(0, 0))


# --- files ---------------------------------------------------------------------------------------------------------


def test_files_hold_the_values_their_pictures_and_the_tokens_decoded_back(dataset: str, store_uri: str) -> None:
    manifest = read_manifest(open_store(dataset))
    files, notes = write_sample(manifest, Place(0, 0), store_uri)
    out = open_store(store_uri)
    assert notes == []
    assert sorted(files) == sorted(info.name for info in out.list())
    assert sorted(files) == [
        "caption.txt",
        "crop_settings.npy",
        "depth.npy",
        "depth.png",
        "det.json",
        "det.png",
        "image.png",
        "rgb.png",
        "semseg.npy",
        "semseg.png",
        "source.json",
        "tok_det.ids.npy",
        "tok_det.json",
        "tok_det.png",
    ]
    assert out.get("caption.txt") == b"a red box\n"
    assert np.load(io.BytesIO(out.get("depth.npy"))).tolist() == [[1.0, 2.0], [3.0, 6.0]]
    assert json.loads(out.get("det.json")) == [CAT, CAT]
    assert [box["class_name"] for box in json.loads(out.get("tok_det.json"))] == ["cat", "cat"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(out.get("image.png")))), PICTURE)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(out.get("rgb.png")))), PICTURE)


def test_what_is_null_makes_no_file_and_a_tokenizer_that_is_gone_costs_only_its_own(words: str, tmp_path: Path) -> None:
    data = Literal(str(tmp_path / "d"), ["a"], size=16)
    data.pictures([PICTURE])
    data.put("caption", [None], quarantine={"a": "blank: no words"})
    data.tokens(token_toys.build("tok_det", kind="text", checkpoint=words), [[CAT]])
    gone = token_toys.bits("tok_depth", token_toys.folder(tmp_path / "weights"), (2, 2))
    data.tokens(gone, [np.ones((2, 2))])
    files, notes = write_sample(read_manifest(open_store(data.done())), Place(0, 0), str(tmp_path / "out"))
    assert {"tok_det.json", "tok_depth.ids.npy", "image.png"} <= set(files)
    assert not [name for name in files if name.startswith("caption") or name == "tok_depth.npy"]
    (note,) = notes
    assert note.startswith(
        "tok_depth: tok_depth was made by Bits of kind 'token_toys:Bits', which is none of Fourmill's"
    )


def test_the_picture_comes_as_the_file_it_was(tmp_path: Path) -> None:
    picture = make_jpeg(seed=3)
    ingest(str(write_files(tmp_path / "c", {"a.jpg": picture})), str(tmp_path / "d"), IngestConfig())
    write_sample(read_manifest(open_store(tmp_path / "d")), Place(0, 0), str(tmp_path / "out"))
    assert (tmp_path / "out/rgb.jpg").read_bytes() == picture


# --- command -------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["manifest", "sample", *arguments], standalone_mode=False)


@pytest.mark.parametrize("asked", [["c"], ["--shard", "1", "--row", "0"], ["--row-number", "2"]])
def test_a_sample_is_named_by_key_place_or_number(dataset: str, asked: list[str]) -> None:
    done = command(dataset, *asked, "--json", "--modality", "det,caption")
    found = json.loads(done.stdout)
    assert (done.return_value, found["key"], found["row_number"]) == (0, "c", 2)
    assert [h["modality"] for h in found["held"]] == ["det", "caption"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ([], "name one sample: by its KEY, by --shard and --row, or by --row-number"),
        (["a", "--row-number", "0"], "name one sample: by its KEY, by --shard and --row, or by --row-number"),
        (["--shard", "1"], "--shard and --row go together"),
        (["--shard", "1", "--row", "2"], "row 2: shard 1 has rows 0 to 1"),
        (["--row-number", "4"], "has 4 samples, rows 0 to 3"),
        (["aa"], "the nearest keys are 'a'"),
        (["a", "--modality", "dept"], "did you mean 'depth'"),
    ],
)
def test_a_sample_that_is_not_there_is_refused_with_what_is(dataset: str, asked: list[str], why: str) -> None:
    refused = command(dataset, *asked)
    assert isinstance(refused.exception, ValueError)
    assert why in str(refused.exception)


def test_the_table_names_makers_reasons_and_files(dataset: str, tmp_path: Path) -> None:
    told = command(dataset, "b", "-o", str(tmp_path / "out")).stdout
    assert "b: shard 0, row 1; row 1 of the dataset" in told
    assert "none: blank: no words" in told
    assert "Literal version 1" in told
    assert "origin: 0.tar:b.png" in told
    assert "image.png" in told


def test_what_a_stranger_wrote_does_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    data = Literal(str(tmp_path / "d"), ["a"])
    data.put("source", [{"origin": "x\x1b[2Jy", "metadata": {"[bold]m": "[red]"}}])
    data.put("caption", ["\x1b]0;owned\x07"])
    told = command(data.done(), "a").stdout
    assert "\x1b" not in told
    assert '{"[bold]m": "[red]"}' in told
