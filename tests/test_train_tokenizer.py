"""Training tokenizers from a dataset's shards: it learns, publishes whole, resumes exactly, and says when it fails."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import NETWORK, ramps

from fourmill.modalities import modality
from fourmill.pipeline.codecs import encode
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Spec, commit, producer_id, write_shard
from fourmill.pipeline.store import open_store
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.networks.weights import pack
from fourmill.tokenizers.training.config import TrainTokenizerConfig
from fourmill.tokenizers.training.examples import ArrayExamples, Order, ShardExamples, split
from fourmill.tokenizers.training.fitting import CodebookCollapseError, SpatialTraining, learning_rate
from fourmill.tokenizers.training.run import settings_of, train_tokenizer

PRODUCER = {"class": "test", "version": 1}


def add(dataset: Path, name: str, shard: int, columns: list[list[Any]], spec: Spec, *, producer: Any = None) -> None:
    """Commit one shard of decoded values (None for null) and publish it in the manifest."""
    store, entry = open_store(str(dataset)), modality(name)
    keys = [f"{shard}/{row}" for row in range(len(columns[0]))]
    stored = [[None if value is None else encode(entry, value) for value in column] for column in columns]
    made_by = producer or PRODUCER
    record = commit(store, write_shard(name, shard, "0" * 16, keys, stored, spec, made_by, {}))
    update_manifest(store, lambda _: Update([record], {producer_id(made_by): made_by}))


def jpeg(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 20), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(5)
    for shard in range(2):
        depth: list[Any] = [*ramps(40, shard)]
        depth[3] = None
        add(root, "depth", shard, [depth], Spec(convention="metric"))
        classes = [np.kron(rng.integers(0, 3, (4, 4)), np.ones((4, 4))).astype(np.uint8) for _ in range(40)]
        add(root, "semseg", shard, [classes], Spec(classes=("floor", "wall", "box")))
        colours = [tuple(int(v) for v in rng.integers(0, 256, 3)) for _ in range(40)]
        add(root, "rgb", shard, [[jpeg(c) for c in colours]], Spec())  # type: ignore[arg-type]
        crops = [[np.array([0, 2, 20, 20, 0])] * 40, [np.array([0, 0, 10, 12, 1])] * 40]
        add(root, "crop_settings", shard, crops, Spec(crops=2))
        add(root, "caption", shard, [["a red box on a floor"] * 39 + [None]], Spec())
    return root


def config(dataset: Path, out: Path, **fields: Any) -> TrainTokenizerConfig:
    base: dict[str, Any] = {
        "dataset": str(dataset),
        "modality": "tok_depth",
        "out": str(out),
        "network": NETWORK,
        "steps": 120,
        "batch_size": 16,
        "lr": 3e-3,
        "warmup": 5,
        "unquantized": 30,
        "report_every": 10,
        "held_out": 0.2,
        "device": "cpu",
        "num_threads": 1,
    }
    return TrainTokenizerConfig.model_validate({**base, **fields})


def test_depth_is_learned_from_shards_and_the_checkpoint_reloads(dataset: Path, tmp_path: Path) -> None:
    result = train_tokenizer(config(dataset, tmp_path / "out", licence="cc0-1.0"))
    assert result.steps == 120
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.figures["abs_rel"] < 0.15
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    tokenizer: Any = TOKENIZERS.build("tok_depth", {"kind": "spatial", "checkpoint": str(tmp_path / "out")})
    tokenizer.load("cpu")
    assert (tokenizer.vocabulary, tokenizer.grid) == (32, (4, 4))
    assert tokenizer.lineage()["checkpoint"]["licence"] == "cc0-1.0"
    unseen = ramps(20, seed=77)
    restored = tokenizer.decode(tokenizer.encode(unseen))
    assert np.mean([np.mean(abs(r - t) / t) for r, t in zip(restored, unseen, strict=True)]) < 0.15


def test_semseg_is_learned_and_its_classes_come_from_the_shards(dataset: Path, tmp_path: Path) -> None:
    result = train_tokenizer(config(dataset, tmp_path / "out", modality="tok_semseg"))
    assert result.figures["pixel_accuracy"] > 0.9  # chance is 0.33
    assert result.figures["miou"] > 0.8
    assert '"classes": 3' in (tmp_path / "out" / "config.json").read_text()


def test_rgb_reads_the_recorded_crops(dataset: Path) -> None:
    examples = ShardExamples(str(dataset), "rgb", 16)
    assert len(examples.keys) == 160  # 2 shards x 40 rows x 2 crops
    assert examples.keys[:2] == ["0/0", "0/1"]
    value = examples.values([81])[0]
    assert value.shape == (3, 16, 16)
    assert value.dtype == np.uint8
    with Image.open(io.BytesIO(jpeg((0, 0, 0)))) as image:
        assert image.size == (24, 20)


def test_rgb_is_learned(dataset: Path, tmp_path: Path) -> None:
    result = train_tokenizer(config(dataset, tmp_path / "out", modality="tok_rgb"))
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.figures["psnr_db"] > 13.5  # plain colours; their mean colour gives about 10.7


def test_null_rows_are_left_out(dataset: Path) -> None:
    examples = ShardExamples(str(dataset), "depth", 16)
    assert len(examples.keys) == 78
    assert "0/3" not in examples.keys
    assert examples.values([3])[0] == pytest.approx(ramps(40, 0)[4], rel=1e-3)


def test_word_pieces_are_learned_from_captions(dataset: Path, tmp_path: Path) -> None:
    layout: dict[str, Any] = {"vocabulary_size": 200, "num_sentinels": 2, "coordinate_bins": 5, "class_names": ["box"]}
    layout["markers"] = ["human"]
    result = train_tokenizer(config(dataset, tmp_path / "t", modality="tok_caption", vocabulary=layout))
    tokenizer: Any = TOKENIZERS.build("tok_caption", {"kind": "text", "checkpoint": str(tmp_path / "t")})
    assert tokenizer.vocabulary == result.vocabulary > 26
    row = tokenizer.encode(["a red box"])[0]
    assert len(row) == 3
    assert row[2] == 26  # [PAD]…[EOS], 2 sentinels, 4 x 5 coordinates, then the class, then the marker
    assert tokenizer.encode(["human"])[0].tolist() == [27]


def test_existing_checkpoint_is_never_overwritten(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        train_tokenizer(config(dataset, tmp_path))


def test_missing_modality_names_what_there_is(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no normal; it has: caption, crop_settings, depth"):
        train_tokenizer(config(dataset, tmp_path / "out", modality="tok_normal"))


def test_labels_of_two_producers_are_mixed_only_by_choice(tmp_path: Path) -> None:
    add(tmp_path / "d", "depth", 0, [ramps(2, 0)], Spec())
    add(tmp_path / "d", "depth", 1, [ramps(2, 1)], Spec(), producer={"class": "test", "version": 2})
    with pytest.raises(ValueError, match=r"partly redone .* or say mixed_generations: true"):
        train_tokenizer(config(tmp_path / "d", tmp_path / "out"))
    assert ShardExamples(str(tmp_path / "d"), "depth", 16, mixed_generations=True).groups == [0, 0, 1, 1]


def test_collapse_is_reported_and_nothing_is_published(tmp_path: Path) -> None:
    flat: list[Any] = [np.full((16, 16), 2.0, np.float32)] * 40
    add(tmp_path / "d", "depth", 0, [flat], Spec())
    # Equal maps differ by position only: at most 16 of the 32 codes can be in use.
    with pytest.raises(CodebookCollapseError, match=r"tok_depth has collapsed: \d+\.\d of 32 codes .* at step \d+"):
        train_tokenizer(config(tmp_path / "d", tmp_path / "out", min_perplexity=17))
    assert not (tmp_path / "out" / "config.json").exists()


def training(tmp_path: Path, **fields: Any) -> SpatialTraining:
    examples = ArrayExamples([str(i) for i in range(48)], ramps(48, 3))
    chosen = config(tmp_path, tmp_path / "out", steps=30, unquantized=10, save_every=15, warmup=0, **fields)
    rows = list(range(48))
    return SpatialTraining(examples, rows, chosen, settings_of(examples, rows, chosen, 0))


def test_interrupted_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = training(tmp_path)
    whole.fit()
    first = training(tmp_path, state=str(tmp_path / "state"))
    first.fit(until=22)  # the state is of step 15: seven steps are done again
    torch.rand(3)
    second = training(tmp_path, state=str(tmp_path / "state"))
    assert second.step == 15
    second.fit()
    assert pack(second.network, half=False) == pack(whole.network, half=False)


def test_state_of_another_run_is_refused(tmp_path: Path) -> None:
    run = training(tmp_path, state=str(tmp_path / "state"))
    run.save()
    with pytest.raises(ValueError, match="is of another run"):
        training(tmp_path, state=str(tmp_path / "state"), seed=1)


def test_held_out_keys_are_chosen_by_their_hash() -> None:
    # sha256('held out\\0a') begins with c05b…, of 'd' with 0178…: 0.751 and 0.006 of the range.
    assert split(["a", "d"], 0.5) == ([0], [1])
    assert split(["a", "d"], 0.0) == ([0, 1], [])


def test_every_epoch_visits_each_row_once_in_an_order_of_its_own() -> None:
    order = Order(rows=[0, 1, 3, 4, 5], groups=[7, 7, 7, 8, 8, 8], seed=1, group_size=1)
    epochs = [order.batch(step, 5) for step in range(3)]
    assert [sorted(e) for e in epochs] == [[0, 1, 3, 4, 5]] * 3
    assert len({tuple(e) for e in epochs}) > 1
    assert {frozenset(e[:2]) for e in epochs} <= {
        frozenset({0, 1}),
        frozenset({3, 4}),
        frozenset({3, 5}),
        frozenset({4, 5}),
    }
    assert Order([0, 1, 3, 4, 5], [7, 7, 7, 8, 8, 8], 1, 1).batch(2, 5) == epochs[2]


def test_learning_rate_warms_up_and_comes_down_to_zero(tmp_path: Path) -> None:
    chosen = config(tmp_path, tmp_path, steps=100, warmup=10, lr=1.0)
    assert [learning_rate(s, chosen) for s in (0, 9, 10, 55)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert learning_rate(100, chosen) == pytest.approx(0.0)
