"""Pretraining: it learns, it is measured fairly, and it continues exactly wherever it was stopped."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fourmill.model.config import Architecture, MaskingConfig, Mixture, ModelConfig, PretrainConfig
from fourmill.model.data import DataConfig, TokenDataset
from fourmill.model.evaluate import HeldOut, count_tokens
from fourmill.model.masking import Masker
from fourmill.model.predict import load_model, predict
from fourmill.model.state import complete_states
from fourmill.model.train import Progress, pretrain, seed_of
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Spec, commit, write_shard
from fourmill.pipeline.store import open_store

NAMES = ("rgb", "tok_depth", "tok_caption")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: a second thread costs more than it brings, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(grey: int) -> bytes:
    """32 x 32 pixels of one of four greys."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (80 * grey,) * 3).save(file, "PNG")
    return file.getvalue()


def make_dataset(folder: Path | str, shards: int = 3, rows: int = 80) -> str:
    """Depth tokens and caption follow from the picture: grey g has tokens g, g + 1, g + 2, g + 3 and is named."""
    store, rng, records = open_store(folder), np.random.default_rng(0), []
    for shard in range(shards):
        keys = [f"s{shard}-{row}" for row in range(rows)]
        greys = rng.integers(0, 4, rows)
        columns: dict[str, tuple[list[Any], Spec]] = {
            "rgb": ([picture(g) for g in greys], Spec()),
            "crop_settings": ([np.array([0, 0, 32, 32, 0], np.int32)] * rows, Spec()),
            "tok_depth": (
                [np.arange(g, g + 4, dtype=np.uint16) for g in greys],
                Spec(vocabulary=16, length=4, grid=(2, 2)),
            ),
            "tok_caption": (
                [np.array([30, 40 + g, 31][: 2 + g % 2], np.uint16) for g in greys],
                Spec(vocabulary=50),
            ),
        }
        for name, (values, spec) in columns.items():
            records.append(commit(store, write_shard(name, shard, "0" * 16, keys, [values], spec, {"who": name}, {})))
    update_manifest(store, lambda _: Update(records, {r.producer: {} for r in records}))
    return str(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("pretrain") / "dataset")


def config_for(out: Path | str, **changes: Any) -> PretrainConfig:
    rgb_only = Mixture(input_alphas={"rgb": 1000}, input_default=0, target_default=1)
    fields: dict[str, Any] = {
        "out": str(out),
        "inputs": NAMES,
        "targets": NAMES[1:],
        "model": ModelConfig(dim=48, encoder_depth=1, decoder_depth=1, num_heads=2, image_size=32),
        "masking": MaskingConfig(
            num_input_tokens=6, num_target_tokens=8, num_sentinels=10, mixtures=(rgb_only, Mixture())
        ),
        "batch_size": 16,
        "steps": 12,
        "warmup": 4,
        "lr": 4e-3,
        "num_threads": 1,
        "log_every": 4,
        "eval_every": 6,
        "checkpoint_every": 5,
        "tensorboard": False,
        **changes,
    }
    return PretrainConfig(**fields)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_model_learns_a_learnable_dataset_and_predicts_it_from_pixels_alone(dataset: str, tmp_path: Path) -> None:
    config = config_for(tmp_path / "out", steps=220, eval_every=110, tensorboard=True)
    reports: list[Progress] = []
    result = pretrain(dataset, config, reports.append)
    assert set(result.held_out) == {"tok_depth", "tok_caption"}
    for name, loss in result.held_out.items():
        assert loss < 0.6 * result.frequencies[name], (name, loss, result.frequencies)
    # Seven ids, 1 2 3 4 3 2 1 times in 16: nothing beats their entropy, 1.84 nats, without looking.
    assert 1.7 < result.frequencies["tok_depth"] < 2.0
    assert reports[-1].step == 220
    assert reports[-1].held_out == result.held_out
    assert "step 220/220" in str(reports[-1])

    model = load_model(config.out)
    data = TokenDataset(dataset, DataConfig(names=NAMES, image_size=32, num_sentinels=10))
    batch = data.batch(data.held_out, np.zeros(len(data.held_out), int))
    got = predict(model, {"rgb": batch.pixels}, ["tok_depth", "tok_caption"])
    right = (got["tok_depth"] == batch.tokens["tok_depth"].long()).double().mean()
    assert right > 0.9, right
    words = [ids[:n].tolist() for ids, n in zip(batch.tokens["tok_caption"], batch.lengths["tok_caption"], strict=True)]
    exact = np.mean([text.tolist() == ids for text, ids in zip(got["tok_caption"], words, strict=True)])
    assert exact > 0.8, exact

    files = {p.relative_to(config.out).as_posix() for p in Path(config.out).rglob("*") if p.is_file()}
    assert {"model.safetensors", "config.json", "tokenizers.json", "metrics.json", "pretrain.json"} <= files
    assert any(f.startswith("tensorboard/") for f in files)
    assert not any(f.startswith("state/") for f in files), "a finished run keeps no training state"


class StopError(RuntimeError):
    """Stands for a crash."""


def stop_at(step: int) -> Any:
    def progress(report: Progress) -> None:
        if report.step == step:
            raise StopError

    return progress


@pytest.mark.parametrize("step", [4, 6, 8, 12])
def test_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    dataset: str, tmp_path: Path, undisturbed: Path, step: int
) -> None:
    config = config_for(tmp_path / "stopped")
    with pytest.raises(StopError):
        pretrain(dataset, config, stop_at(step))
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    result = pretrain(dataset, config)
    assert same(weights(tmp_path / "stopped"), weights(undisturbed))
    assert [e["step"] for e in result.curve] == [4, 6, 8, 12]
    assert result.curve == json.loads((undisturbed / "metrics.json").read_text())["curve"], "bit by bit"


@pytest.fixture(scope="module")
def undisturbed(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrain") / "undisturbed"
    pretrain(dataset, config_for(out))
    return out


def test_killed_process_is_continued_by_the_same_command(dataset: str, tmp_path: Path, undisturbed: Path) -> None:
    config = config_for(tmp_path / "killed")
    program = (
        "import os, signal, sys, time\n"
        "from fourmill.model.config import PretrainConfig\n"
        "from fourmill.model.train import pretrain\n"
        "def progress(report):\n"
        "    if report.step == 8:\n"
        "        while not os.path.exists(sys.argv[3]): time.sleep(0.01)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "pretrain(sys.argv[1], PretrainConfig.model_validate_json(sys.argv[2]), progress)\n"
    )
    state = tmp_path / "killed" / "state" / "step-00000005" / "complete"  # written in the background
    command = [sys.executable, "-c", program, dataset, config.model_dump_json(), str(state)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert complete_states(open_store(tmp_path / "killed")) == ["state/step-00000005"]
    pretrain(dataset, config)
    assert same(weights(tmp_path / "killed"), weights(undisturbed))


def test_run_in_object_storage_is_stopped_continued_and_loaded_like_a_local_one(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where a checkpoint from s3:// is kept
    config = config_for(s3_uri + "/model", tensorboard=None)
    dataset = make_dataset(s3_uri + "/dataset")
    with pytest.raises(StopError):
        pretrain(dataset, config, stop_at(8))
    pretrain(dataset, config)
    pretrain(dataset, config_for(tmp_path / "undisturbed"))
    undisturbed = load_model(str(tmp_path / "undisturbed")).state_dict()
    assert same(load_model(config.out).state_dict(), undisturbed)
    names = [info.name for info in open_store(config.out).list()]
    files = ("config.json", "fourmill.json", "metrics.json", "model.safetensors", "pretrain.json", "tokenizers.json")
    assert tuple(names) == files


def test_finished_run_is_read_and_not_repeated(dataset: str, tmp_path: Path) -> None:
    config = config_for(tmp_path / "out", steps=4)
    first = pretrain(dataset, config)
    again = pretrain(dataset, config, stop_at(4))
    assert again == first
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["held_out"] == first.held_out


def test_folder_of_another_run_is_refused_but_free_fields_may_change(dataset: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pretrain(dataset, config_for(out, steps=2))
    pretrain(dataset, config_for(out, steps=2, log_every=1, eval_every=1))
    with pytest.raises(ValueError, match=r"holds another run \(lr: 0\.004 there, 0\.001 here\)"):
        pretrain(dataset, config_for(out, steps=2, lr=1e-3))
    with pytest.raises(ValueError, match="the dataset has changed"):
        pretrain(make_dataset(tmp_path / "other", shards=1), config_for(out, steps=2))


def test_other_seed_gives_other_weights(dataset: str, tmp_path: Path, undisturbed: Path) -> None:
    pretrain(dataset, config_for(tmp_path / "out", seed=1))
    assert not same(weights(tmp_path / "out"), weights(undisturbed))


def test_global_random_state_is_left_alone(dataset: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    pretrain(dataset, config_for(tmp_path / "out", steps=2))
    assert torch.equal(torch.rand(1), want)


def measured(dataset: str) -> tuple[TokenDataset, Masker, HeldOut]:
    data = TokenDataset(dataset, DataConfig(names=NAMES, image_size=32, num_sentinels=10))
    config = config_for(Path("unused"))
    architecture = Architecture(**dict(config.model), domains_in=NAMES, domains_out=NAMES[1:], modalities=data.infos)
    masker = Masker(architecture, config.masking)
    return data, masker, HeldOut(data, masker, most=100, batch_size=16, crop=0)


def test_held_out_masks_are_the_same_every_time_and_hold_no_training_sample(dataset: str) -> None:
    (data, _, first), (_, _, second) = measured(dataset), measured(dataset)
    assert first.samples == len(data.held_out) > 10
    for (a, ta), (b, tb) in zip(first.batches, second.batches, strict=True):
        assert torch.equal(a.ids_BN, b.ids_BN)
        assert torch.equal(ta.label_BM, tb.label_BM)


def test_frequencies_are_counted_on_training_samples_and_scored_on_the_held_out_targets(dataset: str) -> None:
    data, masker, held = measured(dataset)
    counts = count_tokens(data, masker, NAMES, NAMES[1:])
    train = data.batch(data.train, np.zeros(len(data.train), int)).tokens["tok_depth"].long()
    assert counts["tok_depth"].tolist() == torch.bincount(train.flatten(), minlength=16).tolist()
    assert counts["tok_caption"][3] > 0, "end markers are targets"
    labels = torch.cat([t.label_BM[t.modality_BM == 1] for _, t in held.batches]).numpy()
    best = min(
        -np.log((counts["tok_depth"][labels] + e) / (counts["tok_depth"] + e).sum()).mean() for e in (1, 0.1, 0.01)
    )
    assert held.frequency_loss(NAMES, counts)["tok_depth"] == pytest.approx(best)


def test_seeds_differ_by_purpose_and_step_and_stay_the_same_for_ever() -> None:
    seeds = {seed_of(0, "mask", step) for step in range(100)} | {seed_of(0, "weights"), seed_of(1, "mask", 0)}
    assert len(seeds) == 102
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1.0}, "lerning_rate"),
        ({"targets": ("rgb",)}, "cannot be predicted; name 'tok_rgb'"),
        ({"max_tokens": {"tok_captoin": 4}}, "did you mean 'tok_caption'"),
        ({"max_tokens": {"tok_caption": 600}}, "there are 512 positions"),
        ({"model": {"dim": 50, "num_heads": 3}}, "multiple of 4 and of num_heads"),
        ({"masking": {"num_input_tokens": 4, "min_input_tokens": 5}}, "min_input_tokens 5 is above num_input_tokens 4"),
    ],
)
def test_bad_configurations_are_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for(Path("unused"), **changes)
