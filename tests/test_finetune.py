"""Fine-tuning: the encoder is the pretrained one, rates and positions are as stated, a run resumes bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_toys import SIDE, config_for, make_dataset, model, png
from safetensors.torch import load_file
from torch import nn

from fourmill.cli.finetune import finetune as command
from fourmill.config import ConfigError, save_config
from fourmill.model.batch import Inputs
from fourmill.model.finetune.checkpoint import load_finetuned, write_state
from fourmill.model.finetune.config import FinetuneConfig
from fourmill.model.finetune.network import (
    ClassHead,
    DenseHead,
    Finetuned,
    RgbEncoder,
    interpolated,
    layer_of,
    parameter_groups,
    pixels_of,
)
from fourmill.model.finetune.samples import moved_label, open_samples
from fourmill.model.finetune.tasks import Classification, Depth, Normal, Semseg
from fourmill.model.finetune.train import FinetuneProgress, finetune, order
from fourmill.model.weights import load_model
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.shards import Spec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a dataset and a checkpoint."""
    made = tmp_path_factory.mktemp("finetune")
    make_dataset(made / "dataset")
    config_for(made)
    return made


def pixels(count: int = 2, side: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)


# The network.


@pytest.mark.parametrize("registers", [0, 2])
def test_encoder_gives_what_the_pretrained_model_encodes(registers: int) -> None:
    network = model(num_register_tokens=registers)
    encoder, shown = RgbEncoder(network, SIDE).eval(), pixels()
    position = torch.arange(4).repeat(2, 1)
    zeros, valid = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        context = network.encode(Inputs(zeros, position, zeros, valid, shown))[:, registers:]
        places = network.encoder_embeddings["rgb"].places(torch.arange(4))
        torch.testing.assert_close(network.decoder_proj_context(encoder(shown)) + places, context)


def test_positions_of_another_grid_are_interpolated_and_of_the_same_grid_are_kept() -> None:
    table = torch.tensor([[[0.0, 7.0], [0.0, 7.0], [8.0, 7.0], [8.0, 7.0]]])  # rows 0 and 8; a constant
    assert interpolated(table, (2, 2), (2, 2)) is table
    larger = interpolated(table, (2, 2), (4, 4)).unflatten(1, (4, 4))
    torch.testing.assert_close(larger[0, :, :, 1], torch.full((4, 4), 7.0))
    # Bicubic (A = -0.75) at -0.25, 0.25, 0.75 and 1.25 of two rows, edges repeated.
    expected = torch.tensor([-0.84375, 1.8125, 6.1875, 8.84375])
    torch.testing.assert_close(larger[0, :, 0, 0], expected)
    torch.testing.assert_close(larger[0, :, 3, 0], expected)


def test_encoder_takes_pictures_of_another_size_and_refuses_those_that_are_not_of_it() -> None:
    encoder = RgbEncoder(model(), 64)
    assert encoder(pixels(side=64)).shape == (2, 16, 16)
    with pytest.raises(ValueError, match=r"\(3, 32, 32\) where \(3, 64, 64\) is due"):
        encoder(pixels(side=32))
    with pytest.raises(ValueError, match="image_size 40 must be a multiple of the patch's side 16"):
        RgbEncoder(model(), 40)


def test_model_without_pixels_cannot_be_fine_tuned() -> None:
    blind = model(domains_in=("tok_depth",)).architecture
    with pytest.raises(ValueError, match="reads no pixels, only tok_depth"):
        pixels_of(blind)


def test_heads_have_the_shapes_of_their_tasks() -> None:
    features = torch.zeros(2, 9, 16)
    assert ClassHead(16, 5)(features).shape == (2, 5)
    assert DenseHead(16, 7, patch_size=16, width=8, depth=2)(features).shape == (2, 7, 48, 48)
    assert DenseHead(16, 1, patch_size=2, width=8, depth=0)(features).shape == (2, 1, 6, 6)


def test_class_head_is_the_mean_then_a_linear_layer() -> None:
    head = ClassHead(2, 1)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 10.0]]))
        head.linear.bias.fill_(0.5)
    assert head(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).tolist() == [[2 + 30 + 0.5]]


def test_dense_head_keeps_each_patch_at_its_place() -> None:
    head = DenseHead(4, 1, patch_size=4, width=8, depth=0)
    with torch.no_grad():
        for layer in (head.spread, head.predict):
            layer.weight.fill_(0.5)
            nn.init.zeros_(layer.bias)
        features = torch.zeros(1, 4, 4)
        features[0, 1] = 1.0  # the patch at the upper right
        out = head(features)[0, 0]
    assert out.shape == (8, 8)
    assert torch.equal(out != 0, torch.tensor([[False] * 4 + [True] * 4] * 4 + [[False] * 8] * 4))


def test_dropped_paths_leave_out_whole_samples_in_training_only() -> None:
    encoder = RgbEncoder(model(), SIDE, drop_path=0.999999)
    assert encoder.drops == [0.0, pytest.approx(0.999999)]
    shown, generator = pixels(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        first = encoder.blocks[0](
            encoder.embedding.proj(encoder._patches(shown)) + encoder.positions + encoder.embedding.mod_emb, None
        )
        dropped = encoder.train()(shown, generator)
        torch.testing.assert_close(dropped, encoder.norm(first))  # the second block is skipped
        whole = encoder.eval()(shown, generator)
        torch.testing.assert_close(whole, encoder.norm(encoder.blocks[1](first, None)))


def test_kept_paths_are_scaled_so_that_the_mean_stays() -> None:
    encoder = RgbEncoder(model(), SIDE, drop_path=0.5).train()
    block, x = encoder.blocks[1], torch.randn(2000, 1, 16, generator=torch.Generator().manual_seed(1))[:1]
    many = x.expand(2000, 1, 16)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()
        branch = block.attn(block.norm1(x), None)
        out = encoder._dropped(block, many, 0.5, torch.Generator().manual_seed(2)) - x
    kept = out.abs().sum((1, 2)) > 0
    torch.testing.assert_close(out[kept][0], 2 * branch[0])
    assert 900 < int(kept.sum()) < 1100


# Learning rates.


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.embedding.proj.weight", 0),
        ("encoder.embedding.mod_emb", 0),
        ("encoder.register_tokens", 0),
        ("encoder.blocks.0.norm1.weight", 1),
        ("encoder.blocks.11.mlp.fc1.weight", 12),
        ("encoder.norm.weight", 13),
        ("head.linear.weight", 13),
    ],
)
def test_layer_of_each_parameter(name: str, layer: int) -> None:
    assert layer_of(name, depth=12) == layer


def test_rates_fall_by_the_layer_and_only_matrices_decay() -> None:
    network = Finetuned(RgbEncoder(model(), SIDE), ClassHead(16, 3))
    groups = parameter_groups(network, weight_decay=0.05, layer_decay=0.5)
    numbers = {id(p): n for n, p in network.named_parameters()}
    found = {numbers[id(p)]: (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    assert set(found) == {n for n, _ in network.named_parameters()}
    assert found["encoder.embedding.proj.weight"] == (0.125, 0.05)
    assert found["encoder.embedding.mod_emb"] == (0.125, 0)
    assert found["encoder.blocks.0.attn.qkv.weight"] == (0.25, 0.05)
    assert found["encoder.blocks.1.norm2.weight"] == (0.5, 0)
    assert found["encoder.norm.weight"] == (1.0, 0)
    assert found["head.linear.weight"] == (1.0, 0.05)
    assert found["head.linear.bias"] == (1.0, 0)


def test_frozen_encoder_is_in_no_group_and_never_trains() -> None:
    network = Finetuned(RgbEncoder(model(), SIDE, drop_path=0.5), ClassHead(16, 3), frozen=True).train()
    assert [len(g["params"]) for g in parameter_groups(network, 0.05, 0.5)] == [1, 1]  # type: ignore[arg-type]
    assert not network.encoder.training
    assert network.head.training
    network(pixels()).sum().backward()
    assert all(p.grad is None for p in network.encoder.parameters())


# Labels, losses and figures.


def test_label_moves_with_its_crop_and_mirrored_normals_turn() -> None:
    label = np.arange(16, dtype=np.uint8).reshape(4, 4)
    crop = Crop(top=2, left=0, height=2, width=2, flip=1)
    assert moved_label(label, crop, (4, 4), 2, "semseg").tolist() == [[9, 8], [13, 12]]
    normal = np.stack([np.full((4, 4), 0.6), np.zeros((4, 4)), np.full((4, 4), -0.8)]).astype(np.float32)
    flipped = moved_label(normal, crop, (4, 4), 2, "normal")
    np.testing.assert_allclose(flipped[:, 0, 0], [-0.6, 0, -0.8])
    np.testing.assert_allclose(moved_label(normal, crop._replace(flip=0), (4, 4), 2, "normal")[:, 0, 0], [0.6, 0, -0.8])


def test_picture_and_label_are_cut_alike(folder: Path) -> None:
    samples = open_samples(config_for(folder, min_scale=0.3))
    shown, labels = samples.batch(samples.train[:8].tolist(), [3] * 8)
    bright = shown.float().mean(1) > 130
    assert (bright == (labels == 1)).float().mean() > 0.97  # resizing blurs the edge
    again, _ = samples.batch(samples.train[:8].tolist(), [3] * 8)
    other, _ = samples.batch(samples.train[:8].tolist(), [4] * 8)
    assert torch.equal(shown, again)
    assert not torch.equal(shown, other)


def test_semseg_counts_neither_void_in_the_loss_nor_in_the_figures() -> None:
    task = Semseg(2)
    out = torch.tensor([[[[2.0, 0.0, 0.0]], [[0.0, 2.0, 2.0]]]])  # classes 0, 1, 1
    label = torch.tensor([[[0, 0, 255]]])
    right, wrong = (
        float(-torch.tensor([2.0, 0.0]).log_softmax(0)[0]),
        float(-torch.tensor([0.0, 2.0]).log_softmax(0)[0]),
    )
    assert float(task.loss(out, label)) == pytest.approx((right + wrong) / 2)
    task.add(out, label)
    assert task.figures() == {"miou": 0.5, "pixel_accuracy": 0.5}
    assert float(task.loss(out, torch.full_like(label, 255))) == 0


def test_depth_is_learned_in_logarithms_and_measured_in_metres() -> None:
    task = Depth()
    out, label = torch.tensor([[[[2.0, 8.0, 1.0]]]]).log(), torch.tensor([[[2.0, 4.0, 0.0]]])
    assert float(task.loss(out, label)) == pytest.approx(np.log(2) / 2)
    task.add(out, label)
    figures = task.figures()
    assert figures["absrel"] == pytest.approx(0.5)
    assert figures["rmse"] == pytest.approx(8**0.5)
    assert figures["delta1"] == 0.5


def test_normals_are_measured_by_their_angle() -> None:
    task = Normal()
    out = torch.tensor([[[[2.0, 0.0, 5.0]], [[0.0, 3.0, 5.0]], [[0.0, 0.0, 5.0]]]])
    label = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]]])  # 0 and 90 degrees; no label
    assert float(task.loss(out, label)) == pytest.approx(0.5)
    task.add(out, label)
    assert task.figures() == {"mean": pytest.approx(45), "median": pytest.approx(45), "below_11.25": 0.5}


def test_classification_counts_the_first_and_the_first_five() -> None:
    task = Classification(6)
    task.add(torch.eye(6)[:3] * 2 + torch.arange(6) * 0.1, torch.tensor([0, 1, 0]))
    assert task.figures() == {"top1": pytest.approx(2 / 3), "top5": pytest.approx(2 / 3)}


# Data.


def test_classes_come_from_a_field_and_samples_without_one_are_left_out(folder: Path) -> None:
    samples = open_samples(config_for(folder, task="classification", label_field="metadata.side"))
    assert samples.classes == ("at 0", "at 16", "at 24", "at 8")
    assert len(samples.train) + len(samples.held_out) == 48 - 6
    _, labels = samples.batch([samples.keys.index("k1"), samples.keys.index("k2")])
    assert labels.tolist() == [3, 1]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_classes_come_from_a_file_of_keys_and_labels(folder: Path, tmp_path: Path, suffix: str) -> None:
    import pyarrow
    from pyarrow import csv, parquet

    table = pyarrow.table({"key": [f"k{i}" for i in range(40)], "label": [i % 3 for i in range(40)]})
    path = tmp_path / f"labels.{suffix}"
    csv.write_csv(table, path) if suffix == "csv" else parquet.write_table(table, path)
    samples = open_samples(config_for(folder, task="classification", labels=str(path)))
    assert samples.classes == ("0", "1", "2")
    assert set(samples.keys) == {f"k{i}" for i in range(40)}


def test_file_without_the_column_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("key,class\nk1,dog\n")
    with pytest.raises(ValueError, match="has no column 'label'; it has key, class"):
        open_samples(config_for(folder, task="classification", labels=str(tmp_path / "labels.csv")))


def test_folders_are_classes_and_val_is_held_out(tmp_path: Path) -> None:
    for part, name, count in (("train", "cat", 5), ("train", "dog", 4), ("val", "cat", 2), ("val", "dog", 3)):
        (tmp_path / "images" / part / name).mkdir(parents=True)
        for index in range(count):
            grey = np.full((20, 24, 3), 40 * index + (9 if name == "dog" else 0), np.uint8)
            (tmp_path / "images" / part / name / f"{index}.png").write_bytes(png(grey))
    config = config_for(tmp_path, task="classification", images=str(tmp_path / "images"), image_size=16)
    samples = open_samples(config)
    assert samples.classes == ("cat", "dog")
    assert sorted(samples.keys[i] for i in samples.held_out) == [
        "val/cat/0.png",
        "val/cat/1.png",
        "val/dog/0.png",
        "val/dog/1.png",
        "val/dog/2.png",
    ]
    shown, labels = samples.batch([samples.keys.index("train/dog/3.png")])
    assert shown.shape == (1, 3, 16, 16)
    assert (shown == 129).all()
    assert labels.tolist() == [1]


def test_few_samples_are_drawn_by_the_seed_and_held_out_ones_stay(folder: Path) -> None:
    every = open_samples(config_for(folder))
    one, same, other = (open_samples(config_for(folder, train_samples=10, seed=s)) for s in (0, 0, 1))
    assert len(one.train) == 10
    assert one.train.tolist() == same.train.tolist() != other.train.tolist()
    assert set(one.train) <= set(every.train)
    assert one.held_out.tolist() == other.held_out.tolist() == every.held_out.tolist()
    with pytest.raises(ValueError, match="train_samples is 99, but there are"):
        open_samples(config_for(folder, train_samples=99))


def test_each_epoch_is_a_permutation_of_all_samples(folder: Path) -> None:
    config, train = config_for(folder, batch_size=4), np.array([3, 5, 7, 9, 11, 13])
    steps = [order(train, step, config) for step in range(3)]
    numbers, epochs = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    assert epochs.tolist() == [0] * 6 + [1] * 6
    assert sorted(numbers[:6]) == sorted(numbers[6:]) == train.tolist()
    assert numbers[:6].tolist() != numbers[6:].tolist()


@pytest.mark.parametrize(
    ("spec", "task", "message"),
    [
        ({"depth": Spec(convention="relative")}, "depth", "depth is relative; to learn metres"),
        ({"semseg": Spec()}, "semseg", "semseg states no class names"),
    ],
)
def test_labels_that_cannot_be_learned_from_are_refused(
    tmp_path: Path, spec: dict[str, Spec], task: str, message: str
) -> None:
    make_dataset(tmp_path / "dataset", count=4, **spec)
    with pytest.raises(ValueError, match=message):
        open_samples(config_for(tmp_path, task=task))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "x", "dataset": "y", "task": "classification"}, "either `dataset` or `images`"),
        ({"label_field": "metadata.side"}, "`label_field` is of classification"),
        ({"task": "classification"}, "needs either `labels` or `label_field`"),
    ],
)
def test_contradictory_configuration_is_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    fields = {"task": "semseg", "out": "o", "checkpoint": "c", "dataset": "d", **changes}
    with pytest.raises(ValueError, match=message):
        FinetuneConfig.model_validate(fields)


# Runs.


@pytest.mark.parametrize(
    ("task", "bound"), [("semseg", 0.8), ("depth", 0.3), ("normal", 40.0), ("classification", 0.8)]
)
def test_every_task_is_learned_end_to_end(folder: Path, tmp_path: Path, task: str, bound: float) -> None:
    field = {"label_field": "metadata.side", "flip": False, "min_scale": 0.9} if task == "classification" else {}
    config = config_for(folder, task=task, out=str(tmp_path), steps=60, lr=1e-2, layer_decay=1.0, **field)
    reports: list[FinetuneProgress] = []
    result = finetune(config, reports.append)
    value = result.figures[result.headline]
    assert value > bound if task in ("semseg", "classification") else value < bound
    assert reports[-1].figures == result.figures
    assert json.loads((tmp_path / "metrics.json").read_text())["figures"] == result.figures
    with pytest.raises(ValueError, match="holds no fine-tuned network of format 1"):
        load_finetuned(config.checkpoint)
    network, facts = load_finetuned(str(tmp_path))
    assert facts["config"]["task"] == task
    with torch.no_grad():
        assert network(pixels()).shape[:2] == (2, facts["outputs"])
    assert not list(tmp_path.glob("state/*"))


def test_stopped_run_continues_bit_by_bit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(folder, out=str(tmp_path / "whole"), drop_path=0.5, checkpoint_every=2)
    whole = finetune(config)

    def stop(*given: object) -> None:
        write_state(*given)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    broken = config.model_copy(update={"out": str(tmp_path / "broken")})
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("fourmill.model.finetune.train.write_state", stop)
            with pytest.raises(KeyboardInterrupt):
                finetune(broken)
    continued = finetune(broken)
    assert continued.curve == whole.curve
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_frozen_encoder_keeps_the_checkpoints_weights_and_the_head_learns(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, out=str(tmp_path), task="classification", label_field="metadata.side")
    result = finetune(config.model_copy(update={"freeze_encoder": True}))
    found, pretrained = load_file(tmp_path / "model.safetensors"), load_model(config.checkpoint).state_dict()
    for name, tensor in found.items():
        if name.startswith("encoder.blocks."):
            assert torch.equal(tensor, pretrained[name.replace("encoder.blocks.", "encoder.")])
    assert result.trained_parameters == 16 * 4 + 4
    assert found["head.linear.bias"].abs().min() > 0


def test_random_weights_leave_nothing_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, out=str(tmp_path), freeze_encoder=True, random_weights=True, steps=1)
    finetune(config)
    found, pretrained = load_file(tmp_path / "model.safetensors"), load_model(config.checkpoint).state_dict()
    assert not torch.equal(found["encoder.blocks.0.attn.qkv.weight"], pretrained["encoder.0.attn.qkv.weight"])


def test_finished_run_is_read_and_another_configuration_is_refused(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, out=str(tmp_path), steps=2)
    first = finetune(config)
    assert finetune(config.model_copy(update={"log_every": 1})) == first
    with pytest.raises(ValueError, match=r"holds another run \(lr: 0.003 there, 0.1 here\)"):
        finetune(config.model_copy(update={"lr": 0.1}))


def test_command_runs_a_configuration_with_overrides(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_bytes(save_config(config_for(folder, out=str(tmp_path / "out"))))
    assert command(str(tmp_path / "c.yaml"), ["steps=2", "task=depth"]) == 0
    printed = capsys.readouterr().out
    assert "step 2/2" in printed
    assert "absrel" in printed
    with pytest.raises(ConfigError, match="unknown key 'step'; did you mean 'steps'"):
        command(str(tmp_path / "c.yaml"), ["step=2"])


def test_first_step_moves_each_layer_at_its_own_rate(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, out=str(tmp_path), steps=1, layer_decay=0.5, weight_decay=0.0, lr=0.008)
    finetune(config)
    found, pretrained = load_file(tmp_path / "model.safetensors"), load_model(config.checkpoint).state_dict()
    # AdamW's first step is the rate itself, whatever the gradient.
    for name, theirs, rate in (
        ("encoder.embedding.mod_emb", "encoder_embeddings.rgb.mod_emb", 0.001),
        ("encoder.blocks.0.attn.qkv.weight", "encoder.0.attn.qkv.weight", 0.002),
        ("encoder.blocks.1.norm2.weight", "encoder.1.norm2.weight", 0.004),
        ("encoder.norm.weight", "encoder_norm.weight", 0.008),
    ):
        assert float((found[name] - pretrained[theirs]).abs().max()) == pytest.approx(rate, rel=0.01)
