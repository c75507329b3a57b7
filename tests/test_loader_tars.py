"""Token tars as `manifest export` writes them: the same samples as the dataset that they were exported from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from loader_toys import CAPTION, DEPTH, TOKENS, Toy, caption, config, depth

from fourmill.model.data import DatasetShare, TokenDataset, open_data
from fourmill.model.loader import Loader
from fourmill.pipeline.exchange.export import ExportOptions, export_dataset


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Four shards of 10 with nulls in both modalities, in one crop, and one sample without any value."""
    toy = Toy(tmp_path_factory.mktemp("tars") / "toy", 4)
    columns = [[None if row == 4 or (row, i) == (6, 1) else depth(10 + row, i) for row in range(10)] for i in range(2)]
    toy.put("tok_depth", 1, columns, DEPTH)
    toy.put("tok_caption", 1, [[None if row in (4, 5) else caption(10 + row) for row in range(10)]], CAPTION)
    return toy


def exported(toy: Toy, folder: Path, format: str = "webdataset", names: tuple[str, ...] | None = None) -> str:
    export_dataset(toy.uri, str(folder), ExportOptions(format, names, workers=1))
    return str(folder)


@pytest.fixture(scope="module")
def tars(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported(toy, tmp_path_factory.mktemp("tars") / "export")


def same(one: TokenDataset, other: TokenDataset) -> None:
    assert len(one) == len(other)
    assert one.infos == other.infos
    assert one.train.tolist() == other.train.tolist()
    assert one.held_out.tolist() == other.held_out.tolist()
    assert one.missing() == other.missing()
    order = np.random.default_rng(1).permutation(len(one))
    for crop in range(2):
        first, second = (data.batch(order, np.full(len(order), crop)) for data in (one, other))
        assert first.keys == second.keys
        for field in ("tokens", "lengths", "present"):
            assert set(getattr(first, field)) == set(getattr(second, field))
            for name, tensor in getattr(first, field).items():
                assert torch.equal(tensor, getattr(second, field)[name]), (field, name)
        if first.pixels is not None:
            assert second.pixels is not None
            assert torch.equal(first.pixels, second.pixels)


def test_tars_give_the_same_tensors_as_the_dataset(toy: Toy, tars: str) -> None:
    same(toy.open(held_out=0.3), TokenDataset(tars, config(held_out=0.3)))


@pytest.mark.parametrize("missing", ["mask", "skip"])
def test_tars_of_tokens_alone_give_the_same_tensors(toy: Toy, tmp_path: Path, missing: str) -> None:
    uri = exported(toy, tmp_path / "export", names=TOKENS)
    same(toy.open(names=TOKENS, missing=missing), TokenDataset(uri, config(names=TOKENS, missing=missing)))


def test_parquet_export_gives_the_same_tensors(toy: Toy, tmp_path: Path) -> None:
    uri = exported(toy, tmp_path / "export", "parquet", TOKENS)
    same(toy.open(names=TOKENS), TokenDataset(uri, config(names=TOKENS)))


def test_tars_are_read_in_the_same_order_as_shards_in_equal_windows(toy: Toy, tars: str) -> None:
    fields = {"names": TOKENS, "shuffle_shards": 2}
    shards, tarred = Loader(toy.open(**fields), 7, 2), Loader(TokenDataset(tars, config(**fields)), 7, 2)
    for _ in range(12):
        (want,), (got,) = next(shards), next(tarred)
        assert (got.keys, got.state) == (want.keys, want.state)
        assert torch.equal(got.tokens["tok_depth"], want.tokens["tok_depth"])
    assert tarred.trace(5) == [s._replace(dataset=tars) for s in shards.trace(5)]


def test_tars_are_mixed_with_shards(toy: Toy, tars: str) -> None:
    data = open_data([DatasetShare(uri=toy.uri), DatasetShare(uri=tars)], config(names=TOKENS, held_out=0.0))
    loader = Loader(data, 16, 0)
    for _ in range(10):
        next(loader)
    assert min(loader.realised().values()) > 60


def test_damaged_tar_is_refused(toy: Toy, tmp_path: Path) -> None:
    uri = exported(toy, tmp_path / "export", names=TOKENS)
    path = tmp_path / "export" / "shards" / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"shard-000002.tar in .* is not what was exported"):
        TokenDataset(uri, config(names=TOKENS))


def test_tars_that_lack_a_modality_are_refused(tars: str) -> None:
    with pytest.raises(ValueError, match="unknown modality 'tok_normal'"):
        TokenDataset(tars, config(names=("tok_depth", "tok_normal")))
