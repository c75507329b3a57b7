"""Several datasets as one: shares kept exactly, epochs apart, and every step traceable to its keys."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from loader_toys import CAPTION, TOKENS, Toy, config, depth

from fourmill.cli.trace import trace
from fourmill.model.data import DatasetShare, Mixture, TokenDataset, open_data
from fourmill.model.data.mixture import PERIOD, Draw
from fourmill.model.loader import Loader, Traced
from fourmill.pipeline.shards import Spec


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Datasets a (50 samples), b (10) and c (20)."""
    folder = tmp_path_factory.mktemp("mixed")
    return [
        Toy(folder / name, shards, pictures=False, name=name).uri for name, shards in (("a", 5), ("b", 1), ("c", 2))
    ]


def shares(uris: list[str], weights: tuple[float, ...] = (1, 2, 1)) -> list[DatasetShare]:
    return [DatasetShare(uri=uri, weight=weight) for uri, weight in zip(uris, weights, strict=True)]


@pytest.fixture(scope="module")
def mixed(uris: list[str]) -> Mixture:
    data = open_data(shares(uris), config(names=TOKENS, held_out=0.0))
    assert isinstance(data, Mixture)
    return data


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.2, 0.5, 0.3), (1, 1e-9), (1, 2, 3, 4, 5, 6, 7)])
def test_every_period_holds_each_share(weights: tuple[float, ...]) -> None:
    draw = Draw(weights)
    for period in range(2):
        counts = np.bincount(draw.take(5, period * PERIOD, PERIOD), minlength=len(weights))
        want = np.array(weights) / sum(weights) * PERIOD
        assert counts.sum() == PERIOD
        assert (np.abs(counts - want) <= 1).all()
        assert counts.min() >= 1, "no dataset is left out, however small its weight"


def test_draw_is_one_sequence_however_it_is_cut() -> None:
    draw = Draw((2, 1, 1))
    whole = draw.take(9, 0, 3 * PERIOD)
    start = 0
    while start < len(whole):
        count = min(1 + start // 3, len(whole) - start)
        assert np.array_equal(Draw((2, 1, 1)).take(9, start, count), whole[start : start + count])
        start += count
    for at in (0, 1, 1000, PERIOD - 1, PERIOD, PERIOD + 1, 2 * PERIOD + 77):
        assert draw.before(9, at).tolist() == np.bincount(whole[:at], minlength=3).tolist()
    assert not np.array_equal(whole[:PERIOD], whole[PERIOD : 2 * PERIOD]), "each period in its own order"


def delivered(loader: Loader, steps: int) -> list[str]:
    return [key for _ in range(steps) for batch in next(loader) for key in batch.keys]


def test_datasets_come_by_weight_not_by_size_each_in_its_own_epochs(mixed: Mixture, uris: list[str]) -> None:
    loader = Loader(mixed, 100, 0)
    keys = delivered(loader, 20)
    counts = Counter(key[0] for key in keys)
    assert loader.realised() == {uri: counts[name] for uri, name in zip(uris, "abc", strict=True)}
    assert counts.total() == 2000
    for name, share, size in (("a", 0.25, 50), ("b", 0.5, 10), ("c", 0.25, 20)):
        assert abs(counts[name] / 2000 - share) < 0.04
        mine = [key for key in keys if key[0] == name]
        for start in range(0, len(mine) - size, size):
            assert len(set(mine[start : start + size])) == size, f"each sample of {name} once in its epoch"


def test_datasets_of_one_size_come_in_orders_of_their_own(uris: list[str], tmp_path: Path) -> None:
    twin = Toy(tmp_path / "e", 2, pictures=False, name="e")
    data = open_data(shares([uris[2], twin.uri], (1, 1)), config(names=TOKENS, held_out=0.0))
    keys = delivered(Loader(data, 40, 0), 3)
    first, second = ([key[1:] for key in keys if key[0] == name][:20] for name in "ce")
    assert sorted(first) == sorted(second)
    assert first != second


def test_one_share_is_the_dataset_itself(uris: list[str]) -> None:
    alone = open_data([DatasetShare(uri=uris[0], weight=3)], config(names=TOKENS))
    assert isinstance(alone, TokenDataset)
    assert delivered(Loader(alone, 8, 2), 9) == delivered(Loader(TokenDataset(uris[0], config(names=TOKENS)), 8, 2), 9)


def test_batches_of_a_mixture_hold_the_values_of_their_datasets(mixed: Mixture) -> None:
    samples, crops = np.array([55, 3, 79, 49, 50]), np.array([0, 1, 1, 0, 1])
    batch = mixed.batch(samples, crops)
    assert batch.keys == ["b0-5", "a0-3", "c1-9", "a4-9", "b0-0"] == mixed.keys(samples)
    want = [depth(n, i).tolist() for n, i in ((5, 0), (3, 1), (19, 1), (49, 0), (0, 1))]
    assert batch.tokens["tok_depth"].tolist() == want
    assert batch.tokens["tok_depth"].dtype == torch.uint16
    assert batch.lengths["tok_caption"].tolist() == [6, 4, 6, 1, 1]
    assert batch.tokens["tok_caption"].tolist()[1] == [30, 31, 32, 33, 0, 0]
    with pytest.raises(IndexError, match="samples 0 to 79"):
        mixed.batch(np.array([80]), np.zeros(1, int))


def test_restoring_a_mixture_at_every_step_in_another_world_continues_it(mixed: Mixture) -> None:
    loader = Loader(mixed, 12, 3)
    steps = [next(loader)[0] for _ in range(12)]
    state = steps[0].state
    assert sorted(state) == sorted(["seed", *(f"{what}_{k}" for what in ("epoch", "position") for k in range(3))])
    for step in range(11):
        for rank in range(2):
            again = Loader(mixed, 12, 99, rank=rank, world_size=2, accumulate=2)
            again.load_state_dict(json.loads(json.dumps(steps[step].state)))
            for i, batch in enumerate(next(again), 2 * rank):
                assert batch.keys == steps[step + 1].keys[i::4]
                assert torch.equal(batch.tokens["tok_depth"], steps[step + 1].tokens["tok_depth"][i::4])
                assert batch.state == steps[step + 1].state
    with pytest.raises(ValueError, match="is not the state of a loader of 3 datasets"):
        loader.load_state_dict({"seed": 0, "epoch": 0, "position": 0})


def test_held_out_samples_are_drawn_by_weight(uris: list[str]) -> None:
    data = open_data(shares(uris), config(names=TOKENS, held_out=0.4))
    chosen = data.some("train", 8, np.random.default_rng(0))
    assert Counter(key[0] for key in data.keys(chosen)) == {"a": 2, "b": 4, "c": 2}
    assert not set(data.some("held_out", 20, np.random.default_rng(0)).tolist()) & set(data.train.tolist())


@pytest.fixture
def without_text(tmp_path: Path) -> str:
    toy = Toy(tmp_path / "w", name="w")
    toy.put("tok_depth", 0, [[depth(n, i) for n in range(10)] for i in range(2)], Spec(2, 500, 4, (2, 2)))
    return toy.uri


def test_modality_that_a_dataset_lacks_is_missing_in_all_its_rows(uris: list[str], without_text: str) -> None:
    data = open_data(shares([uris[1], without_text], (1, 1)), config(names=TOKENS, held_out=0.0))
    batch = data.batch(np.array([12, 2]), np.array([1, 0]))
    assert batch.keys == ["w0-2", "b0-2"]
    assert batch.present["tok_depth"].tolist() == [True, True]
    assert batch.present["tok_caption"].tolist() == [False, True]
    assert batch.lengths["tok_caption"].tolist() == [0, 3]
    assert batch.tokens["tok_caption"].tolist() == [[0, 0, 0], [30, 31, 32]]
    assert data.missing() == {"tok_caption": 10}
    only = data.batch(np.array([12]), np.array([0]))
    assert only.present["tok_caption"].tolist() == [False], "also where no sample of the batch has it"
    assert only.tokens["tok_caption"].shape == (1, 1)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_dataset_that_lacks_a_modality_is_refused_by_the_other_policies(
    uris: list[str], without_text: str, policy: Any
) -> None:
    with pytest.raises(ValueError, match=f"has no tok_caption, and missing is '{policy}': say 'mask'"):
        open_data(shares([uris[1], without_text], (1, 1)), config(names=TOKENS, missing=policy))


def test_modality_that_no_dataset_has_is_refused(uris: list[str]) -> None:
    with pytest.raises(ValueError, match="unknown modality 'tok_normal'"):
        open_data(shares(uris), config(names=("tok_depth", "tok_normal")))


def test_vocabularies_that_differ_between_datasets_are_refused(uris: list[str], tmp_path: Path) -> None:
    toy = Toy(tmp_path / "w", 1, pictures=False)
    toy.put("tok_caption", 0, [[np.array([30], np.uint16)] * 10], Spec(vocabulary=CAPTION.vocabulary + 1))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"tok_caption differs between datasets: vocabulary 100, .* but 101,"):
        open_data(shares([uris[0], toy.uri], (1, 1)), config(names=TOKENS))


def test_dataset_named_twice_is_refused(uris: list[str]) -> None:
    with pytest.raises(ValueError, match="is named twice; give it one larger weight"):
        open_data(shares([uris[0], uris[0]], (1, 1)), config(names=TOKENS))


@pytest.mark.parametrize("window", [None, 1])
def test_trace_tells_what_is_delivered(uris: list[str], window: int | None) -> None:
    for data in (
        open_data(shares(uris), config(names=TOKENS, shuffle_shards=window)),
        TokenDataset(uris[0], config(names=TOKENS, shuffle_shards=window)),
    ):
        loader, tracer = Loader(data, 9, 4), Loader(data, 9, 4, rank=1, world_size=3)
        for step in range(14):
            (batch,) = next(loader)
            traced = tracer.trace(step)
            assert [sample.key for sample in traced] == batch.keys
            values = [depth(10 * s.shard + s.row, s.crop).tolist() for s in traced]
            assert values == batch.tokens["tok_depth"].tolist()
            assert {Path(s.dataset).name for s in traced} == {key[0] for key in batch.keys}


def test_trace_does_not_disturb_the_sequence(mixed: Mixture) -> None:
    plain, traced = Loader(mixed, 9, 4), Loader(mixed, 9, 4)
    for _ in range(4):
        traced.trace(100)
        assert next(traced)[0].keys == next(plain)[0].keys
    with pytest.raises(ValueError, match="step -1: steps count from 0"):
        plain.trace(-1)


@pytest.fixture
def training(uris: list[str], tmp_path: Path) -> dict[str, Any]:
    model = {"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 1, "image_size": 32}
    pretrain = {
        "out": str(tmp_path / "out"), "inputs": ["tok_depth"], "targets": ["tok_caption"], "batch_size": 4, "seed": 6,
        "model": model, "masking": {"num_sentinels": 20},
    }  # fmt: skip
    return {"dataset": uris[0], "pretrain": pretrain}


def test_trace_command_tells_a_step_of_a_configuration(
    training: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(training))
    assert trace(7, config=str(tmp_path / "c.yaml"), as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    want = Loader(TokenDataset(training["dataset"], config(names=("tok_depth", "tok_caption"))), 4, 6).trace(7)
    assert told == {"step": 7, "samples": [sample._asdict() for sample in want]}
    assert trace(7, ["pretrain.seed=8"], config=str(tmp_path / "c.yaml")) == 0
    table = capsys.readouterr().out
    other = Loader(TokenDataset(training["dataset"], config(names=("tok_depth", "tok_caption"))), 4, 8).trace(7)
    assert [s.key for s in other] != [s.key for s in want]
    assert all(sample.key in table for sample in other)


def test_trace_command_tells_a_step_of_a_run(
    training: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = TokenDataset(training["dataset"], config(names=("tok_depth", "tok_caption")))
    told = {"dataset": training["dataset"], "dataset_digest": data.digest, "config": training["pretrain"]}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pretrain.json").write_text(json.dumps(told))
    trace(2, run=str(tmp_path / "out"), as_json=True)
    samples = [Traced(**sample) for sample in json.loads(capsys.readouterr().out)["samples"]]
    assert samples == Loader(data, 4, 6).trace(2)
    (tmp_path / "out" / "pretrain.json").write_text(json.dumps({**told, "dataset_digest": "0"}))
    with pytest.raises(ValueError, match="the run's dataset has changed since it began"):
        trace(2, run=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="give either --config or --run"):
        trace(2)
