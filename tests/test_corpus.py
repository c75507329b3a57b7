"""Corpus readers: every layout gives the samples it should, in order; nothing is lost, merged or followed out."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import (
    as_rows,
    ingested,
    make_jpeg,
    make_png,
    samples,
    write_files,
    write_parquet,
    write_tar,
)

from fourmill.pipeline.corpus import detect_format, open_corpus
from fourmill.pipeline.corpus.values import KeyRegister, safe_key
from fourmill.pipeline.ingest import ingest
from fourmill.scenes import write_corpus

JPEG, OTHER, PNG = make_jpeg(seed=1), make_jpeg(seed=2), make_png(seed=3)


# --- webdataset ----------------------------------------------------------------------------------------------------


def test_webdataset_of_scenes_is_read_and_its_truth_left_out(tmp_path: Path) -> None:
    write_corpus(tmp_path / "scenes", count=5, size=64, seed=3, truth=True, shard_size=3)
    report, dataset = ingested(tmp_path / "scenes", tmp_path / "d", shard_size=2)
    assert (report.format, report.samples, report.shards, report.quarantined) == ("webdataset", 5, 3, {})
    keys = ["000000000", "000000001", "000000002", "000010000", "000010001"]
    assert list(dataset.values("rgb")) == list(dataset.values("alt_text")) == list(dataset.values("source")) == keys
    with tarfile.open(tmp_path / "scenes" / "00001.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert dataset.values("rgb")["000010001"] == members["000010001.jpg"]
    assert dataset.values("alt_text")["000010001"] == members["000010001.txt"].decode()
    source = dataset.values("source")["000010001"]
    assert source["metadata"] == json.loads(members["000010001.json"])
    assert source["origin"] == "00001.tar:000010001.jpg"
    assert report.ignored == {
        ".depth.npy in a tar": 5,
        ".instances.png in a tar": 5,
        ".json beside the tars": 2,
        ".normal.npy in a tar": 5,
        ".parquet beside the tars": 2,
        ".semseg.png in a tar": 5,
    }


def test_interleaved_and_unsorted_members_make_whole_samples(tmp_path: Path) -> None:
    members = [("b.txt", b"bee"), ("a.jpg", JPEG), ("dir/c.json", b'{"n": 1}'), ("b.json", b'{"n": 2}')]
    members += [("a.depth.npy", b"x"), ("dir/c.jpg", PNG), ("a.txt", b"ay\n"), ("b.jpg", OTHER), ("dir/c.txt", b"sea")]
    write_tar(tmp_path / "x.tar", members)
    assert as_rows(tmp_path) == [("b", "bee", OTHER), ("a", "ay", JPEG), ("dir/c", "sea", PNG)]
    assert [s.metadata for s in samples(tmp_path)] == [{"n": 2}, {}, {"n": 1}]


def test_a_folder_a_single_tar_and_a_glob_name_their_tars(tmp_path: Path) -> None:
    for name in ("c/0", "c/1", "c/x"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name[-1]}.jpg", JPEG)])
    assert [s.key for s in samples(tmp_path / "c")] == ["0", "1", "x"]
    assert [s.key for s in samples(tmp_path / "c/1.tar")] == ["1"]
    assert [s.key for s in samples(tmp_path / "c/[0-9].tar")] == ["0", "1"]
    assert [s.key for s in samples(f"{tmp_path}/*/x.tar")] == ["x"]


def test_text_comes_from_the_json_where_there_is_no_text_member(tmp_path: Path) -> None:
    members = [("a.jpg", JPEG), ("a.json", b'{"caption": "from json", "alt": "x", "short": "s"}')]
    write_tar(tmp_path / "x.tar", [*members, ("b.jpg", JPEG), ("b.json", b"[1, NaN]"), ("c.jpg", JPEG)])
    assert [s.text for s in samples(tmp_path)] == ["from json", None, None]
    assert [s.metadata for s in samples(tmp_path)][1] == {"value": [1, None]}
    assert samples(tmp_path, text_field="short")[0].text == "s"


def test_of_several_images_of_one_key_the_jpeg_is_taken_unless_told_and_the_rest_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", PNG), ("a.jpg", JPEG)])
    corpus = open_corpus(str(tmp_path))
    assert [s.image for s in corpus] == [JPEG]
    assert corpus.ignored == {".png in a tar": 1}
    assert [s.image for s in samples(tmp_path, image_field="png")] == [PNG]


def test_names_with_dots_are_split_at_the_last_one_where_nothing_else_fits(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("IMG.1.jpg", JPEG), ("IMG.1.txt", b"one"), ("IMG.2.jpg", OTHER)])
    assert as_rows(tmp_path) == [("IMG.1", "one", JPEG), ("IMG.2", None, OTHER)]


def test_links_and_paths_that_lead_out_are_never_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(JPEG)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
        out = tarfile.TarInfo("../../out.jpg")
        out.size = len(OTHER)
        tar.addfile(out, io.BytesIO(OTHER))
    corpus = open_corpus(str(tmp_path / "x.tar"))
    assert [(s.key, s.image) for s in corpus] == [("%2E%2E/%2E%2E/out", OTHER)]
    assert corpus.ignored == {"tar member that is a link or device": 1}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["secret.jpg", "x.tar"]


def broken_tar(path: Path) -> tuple[bytes, dict[str, int]]:
    """A tar of six samples, and the offset of each header."""
    write_tar(path, [m for i in range(6) for m in ((f"{i}.jpg", make_jpeg(seed=i)), (f"{i}.txt", b"text %d" % i))])
    with tarfile.open(path) as tar:
        return path.read_bytes(), {m.name: m.offset for m in tar}


def test_a_tar_with_a_broken_header_keeps_everything_else_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, offsets = broken_tar(tmp_path / "c" / "x.tar")
    at = offsets["2.jpg"]
    (tmp_path / "c" / "x.tar").write_bytes(data[:at] + b"\xff" * 512 + data[at + 512 :])
    write_tar(tmp_path / "c" / "y.tar", [("y.jpg", JPEG)])
    with caplog.at_level(logging.WARNING):
        report, dataset = ingested(tmp_path / "c", tmp_path / "d")
    assert list(dataset.values("rgb")) == ["0", "1", "2", "3", "4", "5", "y"]
    assert dataset.values("alt_text")["2"] == "text 2"
    assert dataset.quarantine() == {"2": "no image: the members of this key are txt"}
    damage = [f"x.tar: bytes {at} to {offsets['2.txt']} are no whole member; what they held is lost"]
    assert report.damage == damage == dataset.manifest.corpus["damaged"]
    assert damage[0] in caplog.text
    assert f"DAMAGED: {damage[0]}" in str(report)


def test_a_tar_that_is_cut_off_keeps_what_is_whole_and_says_so(tmp_path: Path) -> None:
    data, offsets = broken_tar(tmp_path / "c" / "x.tar")
    (tmp_path / "c" / "x.tar").write_bytes(data[: offsets["4.jpg"] + 600])
    report, dataset = ingested(tmp_path / "c", tmp_path / "d")
    assert [k for k, v in dataset.values("rgb").items() if v is not None] == ["0", "1", "2", "3"]
    assert list(dataset.quarantine()) == ["4"]
    assert dataset.quarantine()["4"].startswith("truncated or corrupt: ")
    assert len(report.damage) == 1
    assert report.damage[0].startswith("x.tar: unexpected end of data at byte ")


def test_a_tar_cut_off_between_two_members_is_noticed(tmp_path: Path) -> None:
    data, offsets = broken_tar(tmp_path / "c" / "x.tar")
    (tmp_path / "c" / "x.tar").write_bytes(data[: offsets["3.jpg"]])
    report, dataset = ingested(tmp_path / "c", tmp_path / "d")
    assert list(dataset.values("rgb")) == ["0", "1", "2"]
    assert [d.partition(" at byte ")[0] for d in report.damage] == ["x.tar: ends"]
    assert "without an end mark" in report.damage[0]


def test_two_tars_in_one_file_are_both_read_and_a_whole_tar_has_no_damage(tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", [("a.jpg", JPEG)])
    write_tar(tmp_path / "2.tar", [("b.jpg", OTHER)])
    both = (tmp_path / "1.tar").read_bytes() + (tmp_path / "2.tar").read_bytes()
    (tmp_path / "both.tar").write_bytes(both)
    corpus = open_corpus(str(tmp_path / "both.tar"))
    assert ([s.key for s in corpus], corpus.damage) == (["a", "b"], [])


@pytest.mark.parametrize("content", [b"", b"<html>" + b"x" * 5000, b"\0" * 10_240])
def test_a_tar_that_holds_nothing_is_an_empty_corpus(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match="holds no samples"):
        ingest(str(tmp_path / "x.tar"), str(tmp_path / "d"))


def test_a_member_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    (tmp_path / "x.tar").write_bytes(info.tobuf() + b"\0" * 1024)
    (sample,) = samples(tmp_path / "x.tar")
    assert sample.problems["rgb"].startswith(f"too large: {1 << 40} bytes")


# --- folders -------------------------------------------------------------------------------------------------------


def test_folder_with_sidecars_in_nested_folders(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "a.jpg": JPEG,
        "a.txt": "one\n",
        "b/c.d.PNG": PNG,
        "b/c.d.json": {"caption": "two", "n": 2},
    }
    files |= {"b/plain.webp": JPEG, ".hidden/x.jpg": JPEG, "README.txt": "about", "notes.md": "x"}
    corpus = open_corpus(str(write_files(tmp_path / "c", files)))
    rows = [(s.key, s.text, s.metadata, s.origin) for s in corpus]
    assert rows == [
        ("a", "one", {}, "a.jpg"),
        ("b/c.d", "two", {"caption": "two", "n": 2}, "b/c.d.PNG"),
        ("b/plain", None, {}, "b/plain.webp"),
    ]
    assert corpus.ignored == {".md file": 1, ".txt file": 1}


def test_a_caption_without_an_image_is_a_quarantined_row(tmp_path: Path) -> None:
    src = write_files(tmp_path / "c", {"a.jpg": JPEG, "b.txt": "alone", "c.jpg": JPEG})
    _, dataset = ingested(src, tmp_path / "d")
    assert list(dataset.values("rgb")) == ["a", "b", "c"]
    assert dataset.quarantine() == {"b": "no image: a caption file without an image beside it"}
    assert dataset.values("alt_text") == {"a": None, "b": "alone", "c": None}
    assert dataset.quarantine("alt_text") == {}  # a missing text is no failure


ROWS = [("b.jpg", "bee", 7), ("sub/a.png", "ay", 8), ("gone.jpg", "nowhere", 9), ("../../etc/passwd", "evil", 0)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("stem", ["captions", "metadata", "anything"])
def test_folder_with_a_table_follows_its_rows_then_the_other_images(tmp_path: Path, kind: str, stem: str) -> None:
    write_files(tmp_path, {"sub/a.png": PNG, "b.jpg": JPEG, "zz.jpg": OTHER, "b.txt": "not this"})
    rows = [{"file_name": name, "caption": text, "width": number} for name, text, number in ROWS]
    path = tmp_path / f"{stem}.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = samples(tmp_path)
    assert [(s.key, s.text, s.image) for s in found] == [
        ("b", "bee", JPEG),
        ("sub/a", "ay", PNG),
        ("gone", "nowhere", b""),
        ("%2E%2E/%2E%2E/etc/passwd", "evil", b""),
        ("zz", None, OTHER),
    ]
    assert found[0].metadata == {"width": "7" if kind == "csv" else 7}
    assert found[2].problems == {"rgb": "no image: 'gone.jpg' is not in the folder"}
    assert found[0].origin == f"{stem}.{kind}:0"


def test_a_table_without_the_needed_columns_is_refused_naming_them(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": JPEG, "captions.csv": "file_name,words\na.jpg,x\n"})
    with pytest.raises(ValueError, match=r"no column caption or text .*captions\.csv.*it has file_name, words"):
        samples(tmp_path)
    assert samples(tmp_path, text_field="words")[0].text == "x"


def test_two_tables_are_refused_and_a_table_about_something_else_is_left_alone(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": JPEG, "a.txt": "sidecar", "prices.csv": "what,price\nx,1\n"})
    assert samples(tmp_path)[0].text == "sidecar"
    write_files(tmp_path, {"more.csv": "file_name,caption\na.jpg,x\n"})
    with pytest.raises(ValueError, match=r"several tables .*call one captions\.\*"):
        samples(tmp_path)


def test_a_broken_line_of_a_table_is_damage_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = '{"file_name": "a.jpg", "text": "x"}\n{"file_name": \n\n{"file_name": "b.jpg", "text": "y"}\n'
    write_files(tmp_path, {"a.jpg": JPEG, "b.jpg": OTHER, "captions.jsonl": lines})
    corpus = open_corpus(str(tmp_path))
    rows = [(s.key, s.text, s.origin) for s in corpus]
    assert rows == [("a", "x", "captions.jsonl:0"), ("b", "y", "captions.jsonl:2")]
    assert len(corpus.damage) == 1
    assert corpus.damage[0].startswith("captions.jsonl: line 2: ")


def test_a_table_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jpg": JPEG, "captions.csv": "file_name,caption\na.jpg,caf\xe9\n".encode("latin-1")})
    with pytest.raises(ValueError, match=r"captions\.csv in .* is not UTF-8"):
        samples(tmp_path)


# --- parquet -------------------------------------------------------------------------------------------------------


def test_parquet_in_the_layout_of_hugging_face(tmp_path: Path) -> None:
    images = [{"bytes": JPEG, "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None, {"bytes": PNG, "path": None}]
    columns = {"image": images, "caption": ["one", "two", None, ["x"][0]], "score": [0.5, float("nan"), None, 2.0]}
    write_parquet(tmp_path / "train-00000.parquet", columns, row_group_size=2)
    found = samples(tmp_path)
    assert [(s.key, s.text, s.image) for s in found] == [
        ("train-00000-00000000", "one", JPEG),
        ("train-00000-00000001", "two", b""),
        ("train-00000-00000002", None, b""),
        ("train-00000-00000003", "x", PNG),
    ]
    assert [s.metadata for s in found] == [{"score": 0.5}, {"score": None}, {"score": None}, {"score": 2.0}]
    assert [s.problems.get("rgb") for s in found][1:3] == [
        "no image: the row holds only the path 'b.jpg'",
        "no image: the row's image is null",
    ]


def test_parquet_that_datasets_itself_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": JPEG, "path": None}, {"bytes": PNG, "path": None}], "text": ["one", "two"]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "d.parquet"))
    assert as_rows(tmp_path) == [("d-00000000", "one", JPEG), ("d-00000001", "two", PNG)]


def test_parquet_with_a_binary_column_its_own_keys_and_several_captions(tmp_path: Path) -> None:
    columns = {
        "jpg": pa.array([JPEG, OTHER, PNG], pa.large_binary()),
        "id": [11, None, 13],
        "captions": [["a", "b"], [], None],
        "embedding": pa.array([b"xx"] * 3, pa.binary()),
        "size": pa.array([{"w": 1}] * 3),
    }
    write_parquet(tmp_path / "p.parquet", columns)
    corpus = open_corpus(str(tmp_path / "p.parquet"))
    rows = [(s.key, s.text, s.image) for s in corpus]
    assert rows == [("11", "a", JPEG), ("p-00000001", None, OTHER), ("13", None, PNG)]
    assert next(iter(corpus)).metadata == {"id": 11, "size": {"w": 1}, "captions": ["a", "b"]}
    assert [s.image for s in samples(tmp_path, image_field="embedding")] == [b"xx"] * 3
    assert len(list(corpus)) == 3
    assert corpus.ignored == {"column embedding": 3}


def test_parquet_without_a_column_of_images_is_refused_with_its_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "p.parquet", {"url": ["x"], "caption": ["y"]})
    with pytest.raises(ValueError, match=r"no column of image bytes .*url \(string\), caption \(string\)"):
        samples(tmp_path)
    write_parquet(tmp_path / "p.parquet", {"one": [b"x"], "two": [b"y"]})
    with pytest.raises(ValueError, match=r"several could be: one, two; image_field picks one"):
        samples(tmp_path)


def test_a_broken_parquet_file_or_row_group_is_damage_and_the_rest_keeps_its_keys(tmp_path: Path) -> None:
    noise = [np.random.default_rng(i).bytes(3000) for i in range(6)]
    write_parquet(tmp_path / "a.parquet", {"image": noise}, row_group_size=2, compression="zstd")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).data_page_offset
    data[start : start + 60] = b"\xff" * 60
    (tmp_path / "a.parquet").write_bytes(data)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut off")
    corpus = open_corpus(str(tmp_path))
    assert [s.key for s in corpus] == [f"a-0000000{i}" for i in (0, 1, 4, 5)]
    assert [d.partition(": ")[::2][0] for d in corpus.damage] == ["a.parquet", "b.parquet"]
    assert corpus.damage[0].startswith("a.parquet: rows 2 to 3 cannot be read: ")


# --- coco ----------------------------------------------------------------------------------------------------------


def coco_files() -> dict[str, Any]:
    images = [{"id": 139, "file_name": "000000000139.jpg", "license": 2}, {"id": 7, "file_name": "7.jpg"}]
    images.append({"id": 8, "file_name": "8.jpg"})
    captions = [(139, "first"), (7, "seven"), (139, "second"), (139, "third"), (55, "of nothing")]
    annotations = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)]
    return {
        "annotations/captions_val2017.json": {"images": images, "annotations": annotations},
        "annotations/instances_val2017.json": {"images": []},
        "val2017/000000000139.jpg": JPEG,
        "val2017/7.jpg": OTHER,
        "train2017/7.jpg": PNG,  # of the same name, of another split
    }


@pytest.mark.parametrize("src", ["", "/annotations/captions_val2017.json"])
def test_coco_gives_every_caption_of_every_image(tmp_path: Path, src: str) -> None:
    write_files(tmp_path / "coco", coco_files())
    corpus = open_corpus(f"{tmp_path}/coco{src}")
    found = list(corpus)
    assert [(s.key, s.text, s.image) for s in found] == [
        ("000000000139", "first", JPEG),
        ("000000000007", "seven", OTHER),
        ("000000000008", None, b""),
        ("000000000055", "of nothing", b""),
    ]
    assert found[0].metadata == {
        "id": 139,
        "file_name": "000000000139.jpg",
        "license": 2,
        "captions": ["first", "second", "third"],
    }
    assert [s.problems.get("rgb") for s in found][2:] == [
        "no image: '8.jpg' is not in the corpus",
        "no image: annotations/captions_val2017.json has captions for id 55, but no such image",
    ]
    assert corpus.ignored == {".json file that is not listed": 1, ".jpg file that is not listed": 1}


def test_a_file_that_only_looks_like_coco_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"captions_x.json": {"images": []}, "a.jpg": JPEG})
    with pytest.raises(ValueError, match=r"captions_x\.json in .* is not in COCO's caption format"):
        samples(tmp_path)


# --- finding the format --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "format"),
    [
        ({"0.tar": b"", "0.parquet": b"", "0_stats.json": b""}, "webdataset"),
        ({"a.jpg": b"", "captions.parquet": b""}, "folder"),
        ({"captions_a.jpg": b"", "captions_a.json": b""}, "folder"),
        ({"x/y/p.parquet": b"", "dataset_info.json": b""}, "parquet"),
        ({"annotations/captions_train2017.json": b"", "train2017/1.jpg": b""}, "coco"),
        ({"one.jpg": b""}, "folder"),
    ],
)
def test_the_format_is_told_from_the_names(tmp_path: Path, files: dict[str, Any], format: str) -> None:
    assert detect_format(str(write_files(tmp_path, files))) == format


@pytest.mark.parametrize(
    ("files", "src", "words"),
    [
        ({}, "nowhere", "no corpus at .*nowhere.*: it does not exist"),
        ({"c/x.mp4": b""}, "c", r"cannot tell the corpus format of .*looked for \.tar.*it holds 'x\.mp4'"),
        ({"c/x.tar.gz": b""}, "c", r"compressed tars.*unpack them to \.tar"),
        ({"c/x.tar": b""}, "c/*.zip", "matches nothing"),
        ({"c/x.tar": b""}, "c/{0..9}.tar", "does not exist; braces are not expanded"),
    ],
)
def test_no_corpus_is_a_clear_error(tmp_path: Path, files: dict[str, Any], src: str, words: str) -> None:
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match=words):
        open_corpus(f"{tmp_path}/{src}")


def test_an_empty_folder_and_an_unknown_format_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is an empty folder"):
        detect_format(str(tmp_path))
    write_files(tmp_path, {"a.jpg": JPEG})
    with pytest.raises(ValueError, match="unknown corpus format 'foldr'; did you mean 'folder'"):
        open_corpus(str(tmp_path), "foldr")
    with pytest.raises(ValueError, match="no tars in"):
        samples(tmp_path, "webdataset")


# --- keys ----------------------------------------------------------------------------------------------------------


def test_a_repeated_key_is_numbered_and_nothing_is_lost(tmp_path: Path) -> None:
    write_tar(tmp_path / "c/0.tar", [("a.jpg", JPEG), ("a.txt", b"1"), ("a.jpg", OTHER), ("a.txt", b"2")])
    write_tar(tmp_path / "c/1.tar", [("a.jpg", PNG), ("a~2.jpg", JPEG)])
    report, dataset = ingested(tmp_path / "c", tmp_path / "d")
    assert dataset.values("rgb") == {"a": JPEG, "a~2": OTHER, "a~3": PNG, "a~2~2": JPEG}
    assert list(dataset.values("alt_text").values()) == ["1", "2", None, None]
    assert [s.get("original_key") for s in dataset.values("source").values()] == [None, "a", "a", "a~2"]
    assert report.renamed == 3


@pytest.mark.parametrize(
    ("original", "key"),
    [
        ("a b/ü.v2", "a b/ü.v2"),
        ("100%", "100%"),
        ("a\nb", "a%0Ab"),
        ("50%\t", "50%25%09"),
        ("a\\b", "a%5Cb"),
        ("x\u2028y", "x%E2%80%A8y"),
        ("../..//x", "%2E%2E/%2E%2E/%/x"),
        ("/abs", "%/abs"),
        ("", "%"),
        ("caf\udce9", "caf%E9"),  # a file name in Latin-1
    ],
)
def test_an_odd_key_becomes_one_line_below_a_folder(original: str, key: str) -> None:
    assert safe_key(original) == key
    if key not in (original, "%") and "%/" not in key:
        assert unquote_to_bytes(key) == original.encode("utf-8", "surrogateescape")


def test_a_key_that_is_too_long_ends_in_a_digest_and_stays_distinct() -> None:
    keys = [safe_key("ä" * 256), safe_key("ä" * 300 + "x"), safe_key("ä" * 300 + "y")]
    assert keys[0] == "ä" * 256  # 512 bytes
    assert keys[1] != keys[2]
    assert all(len(key.encode()) <= 512 for key in keys)
    assert keys[1] == "ä" * 236 + "~" + hashlib.sha256(("ä" * 300 + "x").encode()).hexdigest()[:32]


def test_the_register_numbers_keys_also_beyond_what_it_keeps_in_its_set() -> None:
    register = KeyRegister()
    count = 150_000  # more than two times what is kept unsorted
    assert all(register.claim(f"{i}") == f"{i}" for i in range(count))
    assert [register.claim(f"{i}") for i in (0, 70_000, count - 1, 0)] == ["0~2", "70000~2", f"{count - 1}~2", "0~3"]
    assert register.claim("new") == "new"


def test_odd_keys_of_a_tar_and_a_folder_are_kept_with_their_originals(tmp_path: Path) -> None:
    long = "x" * 600
    write_tar(tmp_path / "c/0.tar", [("new\nline.jpg", JPEG), (f"{long}.jpg", OTHER), ("caf\udce9.jpg", PNG)])
    _, dataset = ingested(tmp_path / "c", tmp_path / "d")
    sources = dataset.values("source")
    assert list(sources)[0::2] == ["new%0Aline", "caf%E9"]
    first, second, third = sources.values()
    assert (first["original_key"], second["original_key"]) == ("new\nline", long)
    assert third["original_key_percent"] == "caf%E9"
    assert list(dataset.values("rgb").values()) == [JPEG, OTHER, PNG]


def test_file_names_that_no_store_takes_are_quarantined_not_fatal(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "back\\slash.jpg").write_bytes(JPEG)
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(OTHER)
    _, dataset = ingested(folder, tmp_path / "d")
    assert dataset.values("rgb") == {"back%5Cslash": None, "caf%E9": OTHER}
    assert dataset.quarantine()["back%5Cslash"].startswith("unreadable: bad object name")
