"""Every kind of tokenizer brought back from a manifest: tiny networks of random weights, texts, texts with networks.

Random weights restore nothing; what is tested is that each modality goes through tokens, files and figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import token_toys
from PIL import Image
from tiny_sequences import instance, square, write_vocabulary
from tiny_tokenizers import checkpoint_config, write_checkpoint
from token_toys import Literal

from fourmill.evaluate.tokens.decode import decode_sample
from fourmill.evaluate.tokens.page import page_of
from fourmill.evaluate.tokens.rebuild import RebuildError, producers_of, rebuild
from fourmill.evaluate.tokens.run import evaluate_tokens, rebuild_all
from fourmill.modalities import modality
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.store import open_store

SIDE = 32
EYE = np.eye(3).ravel().tolist()
PERSON = {
    "box": [0.1, 0.1, 0.6, 0.9],
    "orientation": EYE,
    "pose": EYE * 23,
    "camera": [0.0, 0.0, 5.0],
    "shape": [0.0] * 10,
}


def networks(folder: Path) -> dict[str, dict[str, Any]]:
    """A tiny checkpoint for each source that has a network, as options of its tokenizer."""
    maps = {"rgb": 3, "depth": 1, "normal": 3, "canny_edge": 1, "semseg": 4}
    found: dict[str, dict[str, Any]] = {}
    for source, channels in maps.items():
        config = checkpoint_config(source, channels, classes=3 if source == "semseg" else 0)
        checkpoint = str(write_checkpoint(folder / source, config))
        found[source] = {"kind": "spatial", "checkpoint": checkpoint, "size": SIDE}
    cells = checkpoint_config("clip", 6, size=4, patch_size=1)
    found["clip"] = {"kind": "spatial", "checkpoint": str(write_checkpoint(folder / "clip", cells))}
    vector = checkpoint_config("clip_global", 6, architecture="mlp")
    found["clip_global"] = {"kind": "vector", "checkpoint": str(write_checkpoint(folder / "clip_global", vector))}
    (folder / "words").mkdir()
    words = str(write_vocabulary(folder / "words"))
    masks = write_checkpoint(folder / "masks", checkpoint_config("mask", 1, size=64, patch_size=16, codebook_size=64))
    pose = checkpoint_config("human_pose", 207, architecture="mlp", num_codebooks=8)
    found["sam_instance"] = {"kind": "sam_instance", "checkpoint": words, "masks": str(masks), "query": "instances"}
    poses = str(write_checkpoint(folder / "poses", pose))
    found["human_poses"] = {"kind": "human_poses", "checkpoint": words, "poses": poses}
    found["instance"] = {"kind": "text", "checkpoint": words}
    return found


def labels() -> dict[str, Any]:
    """One value of each source."""
    random = np.random.default_rng(0)
    edges = np.zeros((SIDE, SIDE), np.uint8)
    edges[3] = 255
    normal = np.zeros((3, SIDE, SIDE), np.float32)
    normal[2] = -1.0
    thing = instance("cone", square(8, 8, 16))
    mask = {**{k: v for k, v in thing.items() if k != "class_name"}, "stability": 1.0, "point": [0.5, 0.5]}
    return {
        "rgb": random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
        "depth": np.linspace(1, 5, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE),
        "normal": normal,
        "canny_edge": edges,
        "semseg": random.integers(0, 3, (SIDE, SIDE), dtype=np.uint8),
        "clip": random.normal(size=(6, 4, 4)).astype(np.float32),
        "clip_global": random.normal(size=6).astype(np.float32),
        "sam_instance": [mask],
        "human_poses": [PERSON],
        "instance": [thing],
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("networks")
    data = Literal(str(folder / "dataset"), ["a"], size=SIDE)
    specs = {"semseg": Spec(classes=("x", "y", "z")), "depth": Spec(convention="metric")}
    values = labels()
    data.pictures([values["rgb"]])
    for source, options in networks(folder).items():
        value = values[source]
        if source != "rgb":
            data.put(source, [value], spec=specs.get(source))
        tokenizer = token_toys.build(f"tok_{source}", **options)
        rows = tokenizer.encode(value.transpose(2, 0, 1)[None] if source == "rgb" else [value])
        data.tokens(tokenizer, rows, raw=True)
    return data.done()


def test_every_kind_of_tokenizer_comes_back_and_is_measured(dataset: str) -> None:
    found = evaluate_tokens(dataset)
    assert {score.modality for score in found.scores} == {f"tok_{source}" for source in labels()}
    for score in found.scores:
        assert (score.compared, score.unusable, score.malformed) == (1, {}, {}), score.modality
        assert score.figures
        assert not any("not decoded" in note for note in score.notes)
    poses = next(s for s in found.scores if s.modality == "tok_human_poses")
    assert (poses.figures["recall"], poses.figures["matched_iou"]) == (1.0, pytest.approx(1.0, abs=0.01))
    things = next(s for s in found.scores if s.modality == "tok_instance")
    assert (things.figures["recall"], things.figures["class_agreement"]) == (1.0, 1.0)
    assert things.figures["matched_iou"] > 0.85


def test_every_kind_of_tokenizer_makes_its_files_and_a_place_on_the_page(dataset: str, tmp_path: Path) -> None:
    found = {d.modality: d for d in decode_sample(dataset, "a", str(tmp_path))}
    assert not any(d.failed or d.malformed for d in found.values())
    for source in labels():
        pictured = modality(source).name != "clip_global"
        assert (f"tok_{source}.png" in found[f"tok_{source}"].files) == pictured
        assert (tmp_path / f"tok_{source}.{'json' if modality(source).codec == 'json' else 'npy'}").is_file()
    assert np.load(tmp_path / "tok_depth.npy").shape == (SIDE, SIDE)
    assert Image.open(tmp_path / "tok_instance.png").size == (2 * SIDE, 2 * SIDE)
    for source in ("instance", "sam_instance"):  # drawn at the side of the crops, which their lineage does not have
        (item,) = json.loads((tmp_path / f"tok_{source}.json").read_text())
        assert item["mask"]["size"] == [SIDE, SIDE]
    (person,) = json.loads((tmp_path / "tok_human_poses.json").read_text())
    assert {name: np.size(value) for name, value in person.items()} == {
        name: np.size(value) for name, value in PERSON.items()
    }
    manifest = read_manifest(open_store(dataset))
    loaded = rebuild_all(manifest, producers_of(manifest))
    page = page_of(evaluate_tokens(dataset, rebuilt=loaded), loaded)
    for source in set(labels()) - {"clip_global", "instance"}:  # a vector has no picture; the square came back whole
        assert f'alt="tok_{source}, ' in page


def test_second_checkpoint_that_is_gone_is_named_and_can_be_pointed_to(dataset: str, tmp_path: Path) -> None:
    folder = Path(dataset).parent
    manifest = read_manifest(open_store(dataset))
    ((name, producer),) = producers_of(manifest, ["tok_sam_instance"])
    (folder / "masks").rename(tmp_path / "moved")
    try:
        with pytest.raises(RebuildError, match=r"no checkpoint at .*masks.* --checkpoint tok_sam_instance\.masks=PATH"):
            rebuild(manifest, name, producer)
        found = rebuild(manifest, name, producer, checkpoints={f"{name}.masks": str(tmp_path / "moved")})
        assert found.notes == ()
    finally:
        (tmp_path / "moved").rename(folder / "masks")
