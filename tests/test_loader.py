"""Reading a dataset for training: every sample once an epoch, exact continuation, and nothing mixed or mispaired."""

from __future__ import annotations

import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from loader_toys import CAPTION, DEPTH, SIDE, TOKENS, Toy, caption, config, crop, depth, number_of, picture
from PIL import Image

from fourmill.model.data import TokenDataset, is_held_out, opened
from fourmill.model.data.memory import gather
from fourmill.model.loader import Loader, read_ahead
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.shards import Spec


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(Toy(tmp_path_factory.mktemp("toys") / "three", 3).uri)


@pytest.fixture(scope="module")
def seven_shards(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Tokens only, for tests that change nothing."""
    return Toy(tmp_path_factory.mktemp("toys") / "seven", 7, pictures=False).open(names=TOKENS)


@pytest.fixture
def toy(tmp_path: Path, three_shards: Path) -> Toy:
    shutil.copytree(three_shards, tmp_path / "toy")
    return Toy(tmp_path / "toy")


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
    keys = [key for _ in range(size) for key in next(loader)[0].keys]  # 4 epochs in batches that cross their ends
    epochs = [keys[i * size : (i + 1) * size] for i in range(4)]
    assert all(len(set(epoch)) == size and not held & set(epoch) for epoch in epochs)
    assert epochs[0] != epochs[1], "each epoch has its own order"


def test_restoring_after_any_step_continues_the_same_sequence(toy: Toy) -> None:
    data = toy.open()
    loader = Loader(data, 7, seed=3)
    batches = [next(loader)[0] for _ in range(9)]
    for step in range(8):
        again = Loader(data, 7, seed=99)
        again.load_state_dict(batches[step].state)
        assert all(type(v) is int for v in again.state_dict().values())
        for later in batches[step + 1 :]:
            (got,) = next(again)
            assert got.keys == later.keys
            assert torch.equal(got.tokens["tok_depth"], later.tokens["tok_depth"]), "the same crops too"


def test_batches_read_ahead_are_those_read_one_by_one(toy: Toy) -> None:
    data = toy.open()
    plain, ahead = Loader(data, 8, seed=5), read_ahead(Loader(data, 8, seed=5))
    for _ in range(6):
        (want,), (got,) = next(plain), next(ahead)
        assert (got.keys, got.state) == (want.keys, want.state)
    ahead.close()


def test_ranks_share_the_batches_of_one_rank(toy: Toy) -> None:
    data = toy.open()
    alone, pair = Loader(data, 6, seed=2), [Loader(data, 6, seed=2, rank=r, world_size=2) for r in range(2)]
    for _ in range(8):
        (whole,), parts = next(alone), [next(loader)[0] for loader in pair]
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
    assert len(toy.open(mixed_generations=True)) == 30


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
    (batch,) = next(loader)
    firsts = [int(t[0]) - 4 * number_of(k) for t, k in zip(batch.tokens["tok_depth"], batch.keys, strict=True)]
    assert firsts == [1] * 30
    (mixed,) = next(Loader(toy.open(), 30, seed=0))
    firsts = [int(t[0]) - 4 * number_of(k) for t, k in zip(mixed.tokens["tok_depth"], mixed.keys, strict=True)]
    assert set(firsts) == {0, 1}


def sequence(loader: Loader, steps: int) -> list[tuple[str, int]]:
    """Keys with the first depth token, which tells the crop, as they are delivered to one rank."""
    batches = [batch for _ in range(steps) for batch in next(loader)]
    return [(k, int(t[0])) for b in batches for k, t in zip(b.keys, b.tokens["tok_depth"], strict=True)]


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 1])
def test_sequence_of_a_local_dataset_is_numpys_permutation_by_seed_and_epoch(toy: Toy, seed: int) -> None:
    data = toy.open(names=TOKENS, held_out=0.2)
    want = []
    for epoch in range(3):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(np.asarray(data.train, np.int64))
        crops = rng.integers(2, size=len(order))
        want += [(f"s{n // 10}-{n % 10}", 4 * n + c) for n, c in zip(order.tolist(), crops.tolist(), strict=True)]
    steps = len(want) // 8
    assert sequence(Loader(data, 8, seed), steps) == want[: 8 * steps]


def dealt(data: TokenDataset, batch_size: int, world_size: int, accumulate: int, steps: int) -> list[list[str]]:
    """The keys of each step, put together from the slices of all ranks."""
    slices = world_size * accumulate
    loaders = [
        Loader(data, batch_size, 5, rank=r, world_size=world_size, accumulate=accumulate) for r in range(world_size)
    ]
    found = []
    for _ in range(steps):
        keys = [""] * batch_size
        for i, batch in enumerate(itertools.chain(*(next(loader) for loader in loaders))):
            keys[i::slices] = batch.keys
        found.append(keys)
    return found


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (8, 1), (8, 2)])
def test_slices_of_any_world_put_together_are_the_steps_of_one_process(
    seven_shards: TokenDataset, window: int | None, world_size: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seven_shards.source, "window", window)
    assert dealt(seven_shards, 17, world_size, accumulate, 9) == dealt(seven_shards, 17, 1, 1, 9)


def test_rank_gets_accumulated_slices_in_a_row(seven_shards: TokenDataset) -> None:
    (whole,) = next(Loader(seven_shards, 12, 0))
    rank = next(Loader(seven_shards, 12, 0, rank=1, world_size=2, accumulate=3))
    assert [batch.keys for batch in rank] == [whole.keys[3::6], whole.keys[4::6], whole.keys[5::6]]
    assert all(batch.state == whole.state for batch in rank)


@pytest.mark.parametrize("window", [None, 2])
def test_restoring_at_every_step_in_another_world_continues_the_sequence(
    seven_shards: TokenDataset, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seven_shards.source, "window", window)
    first = Loader(seven_shards, 12, 3)
    steps = [next(first)[0] for _ in range(14)]  # over two ends of epochs
    for step in range(13):
        ranks = [Loader(seven_shards, 12, 99, rank=r, world_size=3, accumulate=2) for r in range(3)]
        for loader in ranks:
            loader.load_state_dict(steps[step].state)
        got = list(itertools.chain(*(next(loader) for loader in ranks)))
        for i, batch in enumerate(got):
            assert batch.keys == steps[step + 1].keys[i::6]
            assert torch.equal(batch.tokens["tok_depth"], steps[step + 1].tokens["tok_depth"][i::6]), "crops too"
            assert batch.state == steps[step + 1].state


def test_batch_size_does_not_change_the_sequence(seven_shards: TokenDataset) -> None:
    assert sequence(Loader(seven_shards, 5, 1), 24) == sequence(Loader(seven_shards, 12, 1), 10)


def test_windows_take_few_shards_at_a_time_and_every_sample_once_an_epoch(
    seven_shards: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seven_shards.source, "window", 2)
    size = len(seven_shards.train)
    keys = [key for key, _ in sequence(Loader(seven_shards, 1, 4), 2 * size)]
    for epoch in (keys[:size], keys[size:]):
        assert sorted(epoch) == sorted(seven_shards.keys(seven_shards.train))
        shards = [key.split("-")[0] for key in epoch]
        runs = [list(dict.fromkeys(shards[start:stop])) for start, stop in itertools.pairwise(_changes(shards))]
        assert [len(run) for run in runs] == [2, 2, 2, 1]
    assert keys[:size] != keys[size:]
    order = [number_of(key) for key in keys[:20]]
    assert order != sorted(order), "shuffled within the window"


def _changes(shards: list[str]) -> list[int]:
    """Where a window of two shards begins: its shards are not met before."""
    starts, seen = [0], list(dict.fromkeys(shards))
    for first in seen[2::2]:
        starts.append(shards.index(first))
    return [*starts, len(shards)]


def test_windows_are_drawn_anew_in_every_epoch_and_shuffled_each_in_its_own_way(seven_shards: TokenDataset) -> None:
    data = TokenDataset(seven_shards.uri, config(names=TOKENS, held_out=0.0, shuffle_shards=2))
    keys = [key for key, _ in sequence(Loader(data, 70, 4), 2)]
    windows = [keys[start : start + 20] for start in (0, 20, 40, 70, 90, 110)]
    shards = [{key.split("-")[0] for key in window} for window in windows]
    assert all(len(pair) == 2 for pair in shards)
    assert shards[:3] != shards[3:]
    patterns = [[sorted(window).index(key) for key in window] for window in windows]
    assert all(one != other for one, other in itertools.combinations(patterns, 2))


def test_policy_skip_and_error_open_no_shard_that_is_complete(toy: Toy) -> None:
    values = [[None if row in (4, 7) else depth(20 + row, i) for row in range(10)] for i in range(2)]
    toy.put("tok_depth", 2, values, DEPTH)
    for number in (0, 1):  # only the record of a complete shard is looked at
        next(Path(toy.uri).glob(f"tok_depth/shard-{number:06d}.*.arrow")).unlink()
    assert len(toy.open(missing="skip", held_out=0.0).train) == 28


def test_nulls_of_one_crop_only_are_absent_in_that_crop(toy: Toy) -> None:
    columns = [[None if (row, i) in ((3, 0), (8, 1)) else depth(row, i) for row in range(10)] for i in range(2)]
    toy.put("tok_depth", 0, columns, DEPTH)
    data = toy.open(names=TOKENS, held_out=0.0)
    batch = data.batch(np.array([3, 3, 8, 8, 9]), np.array([0, 1, 0, 1, 1]))
    assert batch.present["tok_depth"].tolist() == [False, True, True, False, True]
    assert batch.tokens["tok_depth"][1].tolist() == [13, 14, 15, 16]


def test_missing_texts_have_no_length_and_empty_ones_are_there(toy: Toy) -> None:
    texts = [None if n == 2 else np.zeros(0, np.uint16) if n == 9 else caption(n) for n in range(10)]
    toy.put("tok_caption", 1, [texts], CAPTION)
    batch = toy.open(names=TOKENS).batch(np.array([12, 19, 11]), np.zeros(3, int))
    assert batch.present["tok_caption"].tolist() == [False, True, True]
    assert batch.lengths["tok_caption"].tolist() == [0, 0, 2]
    assert batch.tokens["tok_caption"].tolist() == [[0, 0], [0, 0], [30, 31]]


def test_last_texts_of_a_shard_are_read_beside_longer_ones(tmp_path: Path) -> None:
    """A batch is read as wide as its longest text; a shard's file ends soon after its last text."""
    toy = Toy(tmp_path / "toy", 1, pictures=False)
    toy.put("tok_caption", 0, [[np.full(3, 30 + n, np.uint16) for n in range(10)]], CAPTION)
    toy.put("tok_depth", 1, [[depth(n, i) for n in range(10)] for i in range(2)], DEPTH)
    toy.put("tok_caption", 1, [[np.full(5000, 50 + n, np.uint16) for n in range(10)]], CAPTION)
    data = toy.open(names=TOKENS, max_tokens={"tok_caption": 4000})
    batch = data.batch(np.array([9, 19, 8]), np.zeros(3, int))
    assert batch.lengths["tok_caption"].tolist() == [3, 4000, 3]
    assert [row[:4].tolist() for row in batch.tokens["tok_caption"]] == [[39, 39, 39, 0], [59] * 4, [38, 38, 38, 0]]
    assert batch.tokens["tok_caption"].sum(1).tolist() == [117, 236_000, 114]


def test_no_byte_outside_the_open_shards_is_read(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are read by address: a place beyond a shard's end may hold anything, or nothing."""
    toy.put("tok_caption", 1, [[np.full(2000, 50, np.uint16)] * 10], CAPTION)
    toy.put("tok_depth", 2, [[None if n == 9 else depth(n, i) for n in range(10)] for i in range(2)], DEPTH)
    data = toy.open(names=TOKENS, held_out=0.0, max_tokens={"tok_caption": 2000})
    read = 0

    def checked(address_B: np.ndarray, count: int, dtype: Any) -> np.ndarray:
        nonlocal read
        size = count * np.dtype(dtype).itemsize
        for address in address_B.tolist():
            assert any(
                b.address <= address and address + size <= b.address + b.size for b in data.shards._buffers.values()
            )
            read += 1
        return gather(address_B, count, dtype)

    monkeypatch.setattr(opened, "gather", checked)
    batch = data.batch(np.arange(30), np.arange(30) % 2)
    assert read > 100
    assert batch.lengths["tok_caption"].tolist() == [1 + n % 7 for n in range(10)] + [2000] * 10 + [
        1 + n % 7 for n in range(20, 30)
    ]


@pytest.mark.parametrize(("samples", "crops"), [([30], [0]), ([-1], [0]), ([0], [2]), ([0], [-1])])
def test_numbers_that_there_are_not_are_refused(toy: Toy, samples: list[int], crops: list[int]) -> None:
    with pytest.raises(IndexError, match=r"they go from 0 to (29|1)"):
        toy.open().batch(np.array(samples), np.array(crops))


def test_object_with_fewer_rows_than_its_record_is_refused(toy: Toy) -> None:
    """Values are addressed by row, so a shard that is too short must not be read."""
    (path,) = Path(toy.uri).glob("tok_depth/shard-000001.*.arrow")
    short = Toy(Path(toy.uri).parent / "other")
    record = short.make("tok_depth", 1, [[depth(n, i) for n in range(9)] for i in range(2)], DEPTH,
                        keys=[f"s1-{n}" for n in range(9)])  # fmt: skip
    path.write_bytes(short.store.get(record.name))
    with pytest.raises(ValueError, match=r"tok_depth shard 1 of .* has 9 rows, its record says 10"):
        toy.open(names=TOKENS, held_out=0.0).batch(np.array([12]), np.zeros(1, int))


def test_object_with_other_columns_than_its_record_is_refused(toy: Toy) -> None:
    (path,) = Path(toy.uri).glob("tok_depth/shard-000001.*.arrow")
    wider = Toy(Path(toy.uri).parent / "other")
    spec = Spec(crops=2, vocabulary=500, length=3, grid=(3, 1))
    record = wider.make("tok_depth", 1, [[depth(n, i)[:3] for n in range(10)] for i in range(2)], spec)
    path.write_bytes(wider.store.get(record.name))
    with pytest.raises(ValueError, match=r"tok_depth shard 1 of .*column 0 is .*not a whole one of"):
        toy.open(names=TOKENS, held_out=0.0).batch(np.array([12]), np.zeros(1, int))


def test_object_that_was_refused_is_refused_again(toy: Toy) -> None:
    """What was noted of it before the fault was found must not be used."""
    (path,) = Path(toy.uri).glob("tok_depth/shard-000001.*.arrow")
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    wrong = pa.array([[1, 2, 3]] * 10, pa.list_(pa.uint16(), 3))
    table = table.set_column(table.schema.get_field_index("crop_1"), "crop_1", wrong)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    data = toy.open(names=TOKENS, held_out=0.0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"tok_depth shard 1 of .*column 1 is .*not a whole one of"):
            data.batch(np.array([12]), np.zeros(1, int))


def test_shards_closed_and_opened_again_give_the_same_values(seven_shards: TokenDataset) -> None:
    everything, crops = np.arange(len(seven_shards)), np.arange(len(seven_shards)) % 2
    want = seven_shards.batch(everything, crops)
    seven_shards.shards.most = 2
    for start in range(0, len(everything), 7):
        part = slice(start, start + 7)
        got = seven_shards.batch(everything[::-1][part], crops[::-1][part])
        assert got.keys == want.keys[::-1][part]
        assert torch.equal(got.tokens["tok_depth"], want.tokens["tok_depth"].flip(0)[part])
    assert len(seven_shards.shards._open) <= 2


def test_read_ahead_prepares_in_order_and_raises_what_went_wrong_in_its_turn(seven_shards: TokenDataset) -> None:
    plain = Loader(seven_shards, 4, 0)

    def prepare(step: tuple[Any, ...]) -> list[str]:
        if step[0].state["position"] == 12:
            raise RuntimeError("the third step")
        return list(step[0].keys)

    ahead = read_ahead(Loader(seven_shards, 4, 0), prepare, depth=3)
    assert [next(ahead), next(ahead)] == [next(plain)[0].keys, next(plain)[0].keys]
    with pytest.raises(RuntimeError, match="the third step"):
        next(ahead)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 of 2: ranks go from 0 to 1"),
        ({"world_size": 2, "accumulate": 3}, "batch_size 5: 2 ranks x 3 slices need one sample each"),
    ],
)
def test_unfit_worlds_are_refused(seven_shards: TokenDataset, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(seven_shards, 5, 0, **changes)
