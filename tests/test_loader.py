"""Reading a dataset for training: every sample once an epoch, exact continuation, and nothing mixed or mispaired."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fourmill.model.data import DataConfig, TokenDataset, is_held_out
from fourmill.model.loader import Loader, read_ahead
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Spec, commit, write_shard
from fourmill.pipeline.store import open_store

SIDE = 32
DEPTH = Spec(crops=2, vocabulary=500, length=4, grid=(2, 2))
CAPTION = Spec(vocabulary=100)


def picture(number: int) -> bytes:
    """A 40 x 48 PNG of noise that depends on the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def crop(index: int) -> np.ndarray:
    return np.array([(0, 4, 40, 40, 0), (2, 3, 30, 36, 1)][index], dtype=np.int32)


def depth(number: int, index: int) -> np.ndarray:
    return np.arange(4, dtype=np.uint16) + 4 * number + index


def caption(number: int) -> np.ndarray:
    return np.arange(30, 31 + number % 7, dtype=np.uint16)


class Toy:
    """A dataset of `shards` x 10 samples named s<shard>-<row>; samples are numbered through."""

    def __init__(self, folder: Path, shards: int = 3) -> None:
        self.uri, self.store = str(folder), open_store(folder)
        for shard in range(shards):
            numbers = range(10 * shard, 10 * shard + 10)
            self.put("rgb", shard, [[picture(n) for n in numbers]])
            self.put("crop_settings", shard, [[crop(i) for _ in numbers] for i in range(2)], Spec(crops=2))
            self.put("tok_depth", shard, [[depth(n, i) for n in numbers] for i in range(2)], DEPTH)
            self.put("tok_caption", shard, [[caption(n) for n in numbers]], CAPTION)

    def put(
        self, name: str, shard: int, columns: list[list[Any]], spec: Spec | None = None, *, producer: str = "one",
        keys: list[str] | None = None,
    ) -> None:  # fmt: skip
        """Commit a shard object and put it into the manifest, in place of what stood there."""
        keys = keys or [f"s{shard}-{row}" for row in range(10)]
        print_of = f"{len(list(self.store.list())):016x}"
        data = write_shard(name, shard, print_of, keys, columns, spec or Spec(), {"who": producer}, {})
        record = commit(self.store, data)
        update_manifest(self.store, lambda _: Update([record], {record.producer: {"who": producer}}))

    def open(self, **changes: Any) -> TokenDataset:
        fields = {"names": ("rgb", "tok_depth", "tok_caption"), "image_size": SIDE, "num_sentinels": 20, **changes}
        return TokenDataset(self.uri, DataConfig(**fields))


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "toy")


def number_of(key: str) -> int:
    shard, row = key[1:].split("-")
    return 10 * int(shard) + int(row)


def test_held_out_is_a_function_of_the_key_for_ever() -> None:
    keys = [f"sample-{i}" for i in range(12)]
    assert [i for i, key in enumerate(keys) if is_held_out(key, 0.25)] == [4, 8, 11]
    many = [is_held_out(f"x{i}", 0.125) for i in range(20_000)]
    assert 0.118 < np.mean(many) < 0.132
    assert not any(is_held_out(key, 0.0) for key in keys)
    assert all(is_held_out(f"x{i}", 0.2) for i, held in enumerate(many) if held), "a larger share only adds"


def test_batch_holds_exactly_the_stored_values(toy: Toy) -> None:
    data = toy.open(held_out=0.0)
    samples = np.array([25, 3, 17, 3])
    batch = data.batch(samples, np.array([0, 1, 1, 0]))
    assert batch.keys == ["s2-5", "s0-3", "s1-7", "s0-3"]
    assert batch.tokens["tok_depth"].dtype == torch.uint16
    assert batch.tokens["tok_depth"].tolist() == [
        [100, 101, 102, 103],
        [13, 14, 15, 16],
        [69, 70, 71, 72],
        [12, 13, 14, 15],
    ]
    assert batch.lengths["tok_caption"].tolist() == [5, 4, 4, 4]
    assert batch.tokens["tok_caption"].tolist() == [[30, 31, 32, 33, 34], *[[30, 31, 32, 33, 0]] * 3]
    assert batch.pixels is not None
    for place, (number, index) in enumerate([(25, 0), (3, 1), (17, 1), (3, 0)]):
        with Image.open(io.BytesIO(picture(number))) as image:
            want = apply_crop(image.convert("RGB"), Crop(*crop(index).tolist()), SIDE)
        assert np.array_equal(batch.pixels[place].numpy(), want.transpose(2, 0, 1))


def test_pixels_are_the_same_with_and_without_the_cache(toy: Toy) -> None:
    cached, direct = toy.open(), toy.open(cache_bytes=0)
    samples, crops = np.arange(10), np.arange(10) % 2
    for _ in range(2):
        first, second = cached.batch(samples, crops).pixels, direct.batch(samples, crops).pixels
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


def test_long_texts_are_cut_to_max_tokens(toy: Toy) -> None:
    batch = toy.open(max_tokens={"tok_caption": 3}).batch(np.array([6, 1]), np.zeros(2, int))
    assert batch.tokens["tok_caption"].tolist() == [[30, 31, 32], [30, 31, 0]]
    assert batch.lengths["tok_caption"].tolist() == [3, 2]


def test_every_training_key_comes_once_an_epoch_and_no_held_out_key_ever(toy: Toy) -> None:
    data = toy.open(held_out=0.3)
    held = set(data.keys(data.held_out))
    assert held == {f"s{s}-{r}" for s in range(3) for r in range(10) if is_held_out(f"s{s}-{r}", 0.3)}
    size = len(data.train)
    assert 0 < len(held) == 30 - size
    loader = Loader(data, 4, seed=1)
    keys = [key for _ in range(size) for key in next(loader).keys]  # 4 epochs in batches that cross their ends
    epochs = [keys[i * size : (i + 1) * size] for i in range(4)]
    assert all(len(set(epoch)) == size and not held & set(epoch) for epoch in epochs)
    assert epochs[0] != epochs[1], "each epoch has its own order"


def test_restoring_after_any_step_continues_the_same_sequence(toy: Toy) -> None:
    data = toy.open()
    loader = Loader(data, 7, seed=3)
    batches = [next(loader) for _ in range(9)]
    for step in range(8):
        again = Loader(data, 7, seed=99)
        again.load_state_dict(batches[step].state)
        assert all(type(v) is int for v in again.state_dict().values())
        for later in batches[step + 1 :]:
            got = next(again)
            assert got.keys == later.keys
            assert torch.equal(got.tokens["tok_depth"], later.tokens["tok_depth"]), "the same crops too"


def test_batches_read_ahead_are_those_read_one_by_one(toy: Toy) -> None:
    data = toy.open()
    plain, ahead = Loader(data, 8, seed=5), read_ahead(Loader(data, 8, seed=5))
    for _ in range(6):
        want, got = next(plain), next(ahead)
        assert (got.keys, got.state) == (want.keys, want.state)
    ahead.close()


def test_ranks_share_the_batches_of_one_rank(toy: Toy) -> None:
    data = toy.open()
    alone, pair = Loader(data, 6, seed=2), [Loader(data, 6, seed=2, rank=r, world_size=2) for r in range(2)]
    for _ in range(8):
        whole, parts = next(alone), [next(loader) for loader in pair]
        assert [len(part) for part in parts] == [3, 3]
        assert sorted(whole.keys) == sorted(parts[0].keys + parts[1].keys)
        assert whole.state == parts[0].state == parts[1].state


def test_missing_labels_are_masked_refused_or_skipped(toy: Toy) -> None:
    values = [[None if row == 4 else depth(row, i) for row in range(10)] for i in range(2)]
    toy.put("tok_depth", 0, values, DEPTH)
    data = toy.open(held_out=0.0)
    batch = data.batch(np.array([3, 4]), np.zeros(2, int))
    assert batch.present["tok_depth"].tolist() == [True, False]
    assert batch.present["tok_caption"].tolist() == [True, True]
    assert batch.tokens["tok_depth"].tolist() == [[12, 13, 14, 15], [0, 0, 0, 0]]
    assert data.missing() == {"tok_depth": 1}
    skipping = toy.open(held_out=0.0, missing="skip")
    assert (len(skipping.train), skipping.left_out) == (29, 1)
    assert "s0-4" not in skipping.keys(skipping.train)
    with pytest.raises(ValueError, match="1 samples lack a label, the first at shard 0 row 4"):
        toy.open(missing="error")


def test_modality_without_a_shard_is_absent_in_its_rows(toy: Toy) -> None:
    toy.put("tok_rgb", 1, [[depth(n, i) for n in range(10)] for i in range(2)], DEPTH)
    data = toy.open(names=("rgb", "tok_rgb"))
    batch = data.batch(np.array([5, 15, 25]), np.zeros(3, int))
    assert batch.present["tok_rgb"].tolist() == [False, True, False]
    assert data.missing() == {"tok_rgb": 20}


def test_picture_that_cannot_be_decoded_is_absent_and_counted(toy: Toy) -> None:
    toy.put("rgb", 0, [[b"no picture" if row == 2 else picture(row) for row in range(10)]])
    data = toy.open()
    batch = data.batch(np.array([1, 2]), np.zeros(2, int))
    assert batch.present["rgb"].tolist() == [True, False]
    assert dict(data.problems) == {"not an image": 1}


def test_modality_of_two_generations_is_read_only_by_choice(toy: Toy) -> None:
    toy.put("tok_depth", 1, [[depth(n, i) for n in range(10, 20)] for i in range(2)], DEPTH, producer="two")
    with pytest.raises(ValueError, match=r"tok_depth is of 2 generations .* or say mixed_generations: true"):
        toy.open()
    assert len(toy.open(mixed_generations=True).shard_of) == 30


def test_shard_with_other_keys_is_refused(toy: Toy) -> None:
    keys = [f"s1-{row}" for row in (1, 0, *range(2, 10))]  # two rows exchanged
    toy.put("tok_caption", 1, [[caption(n) for n in range(10, 20)]], CAPTION, keys=keys)
    with pytest.raises(ValueError, match="shard 1 has other keys in tok_caption than in rgb"):
        toy.open()


def test_vocabulary_that_changes_between_shards_is_refused(toy: Toy) -> None:
    toy.put("tok_caption", 2, [[caption(n) for n in range(20, 30)]], Spec(vocabulary=101))
    with pytest.raises(ValueError, match="tok_caption differs between shards"):
        toy.open()


def test_ids_beyond_the_vocabulary_are_refused(toy: Toy) -> None:
    toy.put("tok_caption", 2, [[np.array([100], np.uint16)] * 10], CAPTION)
    with pytest.raises(ValueError, match="holds id 100; its vocabulary has 100"):
        toy.open()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("tok_dpeth",)}, "unknown modality 'tok_dpeth'; did you mean 'tok_depth'"),
        ({"names": ("tok_normal",)}, "unknown modality 'tok_normal'"),
        ({"names": ("depth",)}, "'depth' is neither tokens nor 'rgb'; to train on here: rgb, tok_caption, tok_depth"),
        ({"num_sentinels": 100}, "tok_caption has 100 ids, too few for num_sentinels 100"),
        ({"held_out": 0.9999999}, "no sample to train on"),
    ],
)
def test_unfit_requests_are_refused(toy: Toy, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy.open(**changes)


def test_crop_that_was_not_recorded_is_refused(toy: Toy) -> None:
    with pytest.raises(ValueError, match="crop 2: the dataset has crops 0 to 1"):
        Loader(toy.open(), 4, seed=0, crop=2)


def test_fixed_crop_is_the_only_one_read(toy: Toy) -> None:
    loader = Loader(toy.open(), 30, seed=0, crop=1)
    batch = next(loader)
    firsts = [int(t[0]) - 4 * number_of(k) for t, k in zip(batch.tokens["tok_depth"], batch.keys, strict=True)]
    assert firsts == [1] * 30
    mixed = next(Loader(toy.open(), 30, seed=0))
    firsts = [int(t[0]) - 4 * number_of(k) for t, k in zip(mixed.tokens["tok_depth"], mixed.keys, strict=True)]
    assert set(firsts) == {0, 1}
