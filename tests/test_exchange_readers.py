"""Exports opened by other libraries: webdataset, `datasets`, tarfile, DuckDB; Energon's files by their form."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import exchange_toys as toys
import numpy as np
import pytest
import yaml
from PIL import Image

from fourmill.pipeline.exchange import ExportOptions, export_dataset
from fourmill.pipeline.exchange.members import from_npy, to_npy
from fourmill.pipeline.exchange.rows import WrongDataError
from fourmill.pipeline.exchange.stems import MAX_BYTES, is_exact, key_of, stem_of
from fourmill.pipeline.exchange.tars import archive, contents

ALL = tuple(name for name in toys.SPECS if name != "clip")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dataset in every layout below."""
    root = tmp_path_factory.mktemp("exports")
    dataset = toys.make(str(root / "dataset"))
    for layout in ("webdataset", "parquet"):
        export_dataset(dataset, str(root / layout), ExportOptions(layout, ALL))
    export_dataset(dataset, str(root / "energon"), ExportOptions("energon", ("rgb", "det", "tok_rgb"), split="val"))
    return root


def test_webdataset_reads_every_sample_with_its_own_decoders(exports: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    tars = str(exports / "webdataset" / "shards" / "shard-{000000..000002}.tar")
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in samples] == [stem_of(k) for keys in toys.KEYS for k in keys]
    sample = samples[2]  # sötnos
    assert sample["rgb.jpg"].shape == (40, 48, 3)
    assert sample["caption.txt"] == "caption 2"
    assert sample["det.json"] == toys.value("det", 2, 0)
    assert sample["det.1.json"] == toys.value("det", 2, 1)
    assert (sample["tok_rgb.npy"].dtype, sample["tok_clip_global.npy"].dtype) == (np.uint16, np.uint32)
    assert np.array_equal(sample["tok_rgb.1.npy"], toys.value("tok_rgb", 2, 1))
    assert np.array_equal(sample["depth.npy"], toys.value("depth", 2, 0).astype(np.float16))
    assert sample["crop_settings.1.npy"].tolist() == [3, 2, 30, 33, 1]
    assert np.array_equal(sample["semseg.png"][..., 0], toys.value("semseg", 2, 0))
    assert "alt_text.txt" not in sample
    assert samples[0]["alt_text.txt"] == "a <b> of 0, ümlaut"


def test_tars_are_ustar_without_clock_owner_or_long_names(exports: Path) -> None:
    with tarfile.open(exports / "webdataset" / "shards" / "shard-000001.tar") as tar:
        infos = tar.getmembers()
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode, i.type) for i in infos} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }
    assert max(len(i.name) for i in infos) <= 100
    names = [i.name for i in infos]
    by_sample = [[n for n in names if n.startswith(f"{stem_of(key)}.")] for key in toys.KEYS[1]]
    assert names == [n for sample in by_sample for n in sorted(sample)]
    raw = (exports / "webdataset" / "shards" / "shard-000001.tar").read_bytes()
    assert (raw[257:263], len(raw) % 10_240) == (b"ustar\0", 0)


@pytest.mark.parametrize(
    ("key", "stem"),
    [
        ("000000123", "000000123"),
        ("a/b.c", "a%2Fb%2Ec"),
        ("100%", "100%25"),
        ("sö", "s%C3%B6"),
        ("cat~2", "cat~2"),
        ("..", "%2E%2E"),
        (" ", "%20"),
    ],
)
def test_stems_are_ascii_without_dots_and_give_the_key_back(key: str, stem: str) -> None:
    assert stem_of(key) == stem
    assert key_of(stem) == key
    assert is_exact(key)


def test_long_keys_are_shortened_to_stems_of_their_own() -> None:
    keys = ["ö" * 40 + tail for tail in ("a", "b")] + ["x" * 65, "x" * 64]
    stems = [stem_of(key) for key in keys]
    assert len({*stems}) == 4
    assert all(len(s) <= MAX_BYTES and s.isascii() and "." not in s for s in stems)
    assert [is_exact(key) for key in keys] == [False, False, False, True]
    assert stems[0].rpartition("~")[0].endswith("%B6")  # no half of a character


def test_stems_that_are_not_ours_come_back_as_they_are() -> None:
    assert [key_of(s) for s in ("50%", "%41", "a.b", "%2e")] == ["50%", "%41", "a.b", "%2e"]


def test_datasets_shows_pictures_and_plain_values(exports: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset(
        "parquet", data_dir=str(exports / "parquet" / "data"), split="train", cache_dir=str(tmp_path)
    )
    assert data.num_rows == 12
    row = data[1]
    assert row["key"] == "a/b.c"
    assert isinstance(row["rgb"], Image.Image)
    assert isinstance(row["semseg__1"], Image.Image)
    assert np.array_equal(np.asarray(row["semseg__1"]), toys.value("semseg", 1, 1))
    assert row["caption"] == "caption 1"
    assert row["det"] == toys.value("det", 1, 0)
    assert row["tok_rgb__1"] == toys.value("tok_rgb", 1, 1).tolist()
    assert row["tok_caption"] == toys.value("tok_caption", 1, 0).tolist()
    assert row["crop_settings"] == [4, 0, 40, 40, 0]
    assert np.array_equal(np.load(io.BytesIO(row["normal"])), toys.value("normal", 1, 0).astype(np.float16))
    assert json.loads(row["metadata"]) == toys.value("metadata", 1, 0)
    assert data[3]["det"] == []
    assert (data[5]["depth"], json.loads(data[5]["quarantine"])) == (None, {"depth": "constant output: 0"})
    assert (data[2]["alt_text"], data[2]["quarantine"]) == (None, None)
    assert data.features["tok_rgb"].length == 4
    assert str(data.features["tok_clip_global"].feature.dtype) == "uint32"


def test_datasets_opens_the_whole_folder_by_its_card(exports: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset(str(exports / "parquet"), cache_dir=str(tmp_path))
    assert {name: split.num_rows for name, split in data.items()} == {"train": 12}
    assert data["train"][0]["rgb"].size == (48, 40)


def test_parquet_keeps_the_pictures_bytes_and_answers_duckdb(exports: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    files = str(exports / "parquet" / "data" / "*.parquet")
    query = "select key, rgb.bytes, len(det), det[1].class_name from read_parquet(?) where key = 'cat'"
    ((key, data, count, name),) = duckdb.execute(query, [files]).fetchall()
    assert (key, data, count, name) == ("cat", toys.jpeg(0), 2, "box")


def test_energon_finds_splits_counts_and_sample_offsets(exports: Path) -> None:
    root = exports / "energon"
    meta = {p.name: yaml.safe_load(p.read_text()) for p in (root / ".nv-meta").iterdir()}
    names = [f"shards/shard-00000{n}.tar" for n in range(3)]
    assert meta["split.yaml"] == {"split_parts": {"train": [], "val": names, "test": []}, "exclude": []}
    assert meta[".info.yaml"] == meta[".info.json"] == {"shard_counts": dict.fromkeys(names, 4)}
    assert meta["dataset.yaml"] == {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    for name in names:
        index = (root / f"{name}.idx").read_bytes()
        assert list(struct.unpack(f"<{len(index) // 8}Q", index)) == offsets_as_energon_counts(root / name)


def offsets_as_energon_counts(path: Path) -> list[int]:
    """Where each sample's first member stands, then where tarfile stops: what `energon prepare` writes."""
    offsets, last = [], None
    with tarfile.open(path) as tar:
        for member in tar:
            key = member.name.split(".", 1)[0]
            if key != last:
                offsets.append(member.offset)
            last = key
        return [*offsets, tar.offset]


def test_a_tar_that_is_cut_off_or_damaged_is_named() -> None:
    data, bounds = archive([("a.txt", b"x" * 600), ("b.txt", b"y")])
    assert bounds == [0, 1536, 2560]
    assert list(contents(io.BytesIO(data), "t")) == [("a.txt", b"x" * 600), ("b.txt", b"y")]
    for harmed in (data[:1536], data[:1000], data[:1537], data[:1540] + b"!" + data[1541:]):
        with pytest.raises(WrongDataError, match=r"t\.tar is not a whole tar"):
            list(contents(io.BytesIO(harmed), "t.tar"))


def test_npy_files_of_strangers_run_no_code_and_take_no_memory_that_they_do_not_have() -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert np.array_equal(from_npy(to_npy(array)), array)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    huge = to_npy(array).replace(b"(2, 3), }" + b" " * 10, b"(2000000000, 3), }" + b" ")
    assert len(huge) == len(to_npy(array))
    with pytest.raises(ValueError, match="is a pickle, which could run code"):
        from_npy(pickled.getvalue())
    for data in (huge, to_npy(array)[:-1], b"", b"\x93NUMPY", b"nothing of the kind"):
        with pytest.raises(ValueError, match=r"npy"):
            from_npy(data)
