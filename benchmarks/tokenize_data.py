"""What benchmarks/tokenize.py works on: scenes as picture files, their true maps as labels, and checkpoints.

Checkpoints have random weights: nothing is fetched, and time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fourmill.config import Config
from fourmill.labelers.base import Labeler, LabelerConfig
from fourmill.pipeline.component import Batch
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.ingest import IngestConfig, ingest
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import Spec, read_shard
from fourmill.pipeline.store import open_store
from fourmill.scenes import CLASSES, render
from fourmill.tokenizers.config import CheckpointConfig
from fourmill.tokenizers.networks.quantizers import to_stored
from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.networks.weights import pack

SEED = 11  # of the scenes; trained and measured on by nobody
SIDE = 512  # pixels of a picture file
SIZE = 224  # pixels of a crop
NETWORKS: dict[str, dict[str, Any]] = {
    # As 4M's published tokenizers of RGB, 86 million parameters.
    "vit_b": {"codebook_size": 16384},
    # As the demo's.
    "small": {"dim": 160, "heads": 4, "encoder_blocks": 2, "latent_dim": 16, "codebook_size": 1024},
    # `tokenize_ml4m.TINY`: next to no computing, so that what remains is what a fast GPU waits for.
    "tiny": {"dim": 64, "heads": 4, "encoder_blocks": 2, "codebook_size": 16384},
}
_SOURCES: dict[str, dict[str, Any]] = {
    "rgb": {"channels": 3, "normalisation": {"kind": "signed"}},
    "depth": {"channels": 1, "normalisation": {"kind": "standardise"}},
    "normal": {"channels": 3, "normalisation": {"kind": "unit"}},
    "semseg": {"channels": 64, "classes": 133, "normalisation": {"kind": "classes"}},
    "clip": {"channels": 512, "normalisation": {"kind": "unit"}},
}
SOURCES = tuple(_SOURCES)


def settings_of(source: str, network: str) -> CheckpointConfig:
    """The configuration of a checkpoint for values of `source`."""
    sizes = {"size": SIZE, "decoder_blocks": 0, **NETWORKS[network]}
    if source == "clip":
        sizes |= {"size": SIZE // 16, "patch_size": 1}
    return CheckpointConfig.model_validate({"source": source, **_SOURCES[source], "network": sizes})


def make_network(settings: CheckpointConfig) -> VQNetwork:
    """A network that only encodes, with random weights and a random codebook."""
    torch.manual_seed(0)
    network = VQNetwork(settings, decoder=False).eval()
    for weight in network.parameters():
        if weight.ndim > 1 and not weight.any():  # a block that starts as the identity would make all tokens alike
            torch.nn.init.normal_(weight, std=0.02)
    codebook = network.quantize.inner._codebook
    codebook.embed.copy_(torch.nn.functional.normalize(torch.randn_like(codebook.embed), dim=-1))
    codebook.initted.fill_(True)
    return network


def save_checkpoint(folder: Path, source: str, network: str) -> str:
    """A checkpoint folder as the tokenize job loads it, and `NAME.pth` beside it as ml-4m does."""
    settings = settings_of(source, network)
    made = make_network(settings)
    place = folder / f"{source}-{network}"
    place.mkdir(parents=True)
    (place / "config.json").write_text(settings.model_dump_json())
    (place / "model.safetensors").write_bytes(pack(made, half=False))
    args = argparse.Namespace(
        domain=source,
        quantizer_type="lucid",
        encoder_type=f"vit_{network.removeprefix('vit_')}_enc",
        decoder_type=None,
        input_size=SIZE,
        patch_size=16,
        codebook_size=settings.network.codebook_size,
        latent_dim=settings.network.latent_dim,
        norm_codes=True,
        post_mlp=True,
    )
    torch.save({"args": args, "model": to_stored(made.state_dict())}, place.with_suffix(".pth"))
    return str(place)


def write_pictures(folder: Path, count: int) -> None:
    """`count` scenes as `corpus/*.jpg` with captions, and their true maps as `truth/*.npz`."""
    for name in ("corpus", "truth"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        scene = render(SEED, index, SIDE)
        Image.fromarray(scene.image).save(folder / "corpus" / f"{index:06d}.jpg", quality=92)
        (folder / "corpus" / f"{index:06d}.txt").write_text(scene.caption)
        file = folder / "truth" / f"{index:06d}.npz"
        np.savez(file, depth=scene.depth, normal=scene.normals, semseg=scene.semantic)


class TruthConfig(LabelerConfig):
    """Configuration of `Truth`."""

    folder: str
    """Where `write_pictures` put the true maps."""
    makes: tuple[str, ...]
    """Modalities, of `SOURCES`."""


class Truth(Labeler):
    """Labels without a teacher: true maps through the recorded crops, and noise for CLIP features."""

    Config = TruthConfig
    config: TruthConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rgb",)

    @property
    def makes(self) -> tuple[str, ...]:
        return self.config.makes

    def spec(self, modality: str) -> Spec:
        return Spec(classes=tuple(CLASSES)) if modality == "semseg" else Spec(convention="metric")

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        maps = [np.load(Path(self.config.folder) / f"{key}.npz") for key in batch.keys]
        return {name: [_label(name, m, c) for m, c in zip(maps, batch.crops, strict=True)] for name in self.makes}


def _label(name: str, maps: Any, crop: Crop) -> np.ndarray:
    if name == "clip":
        return np.random.default_rng(crop.top).normal(size=(512, SIZE // 16, SIZE // 16)).astype(np.float32)
    values = maps[name]
    if name == "normal":
        found = np.stack([_cropped(channel, crop, Image.Resampling.BILINEAR) for channel in values.transpose(2, 0, 1)])
        found[0] *= -1 if crop.flip else 1
        return found / np.maximum(np.linalg.norm(found, axis=0), 1e-6)
    nearest = name == "semseg"
    return _cropped(values, crop, Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR)


def _cropped(values: np.ndarray, crop: Crop, resample: Image.Resampling) -> np.ndarray:
    image = Image.fromarray(values if values.dtype == np.uint8 else values.astype(np.float32))
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    found = np.asarray(image.resize((SIZE, SIZE), resample, box=box))
    return found[:, ::-1].copy() if crop.flip else found.copy()


@dataclass(frozen=True)
class Job:
    """One dataset, its labels made, and the configuration of its tokenize job."""

    config: Config
    file: Path
    sources: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"tok_{source}" for source in self.sources)


def make_job(
    folder: Path,
    pictures: Path,
    sources: Sequence[str],
    checkpoints: Sequence[str],
    crops: int,
    precision: str = "float32",
) -> Job:
    """Ingest the pictures into a dataset of one shard below `folder`, record crops, and store the labels needed."""
    dataset = str(folder / "dataset")
    ingest(str(pictures / "corpus"), dataset, IngestConfig())
    labels = tuple(source for source in sources if source != "rgb")
    truth = {"kind": "benchmarks.tokenize_data:Truth", "folder": str(pictures / "truth"), "makes": labels}
    tree = {
        "dataset": dataset,
        "crops": {"size": SIZE, "count": crops},
        "labelers": {"truth": truth} if labels else {},
        "tokenizers": {
            f"tok_{source}": {"kind": "spatial", "checkpoint": checkpoint, "precision": precision}
            for source, checkpoint in zip(sources, checkpoints, strict=True)
        },
        "ray": {"address": "none"},
    }
    config = Config.model_validate(tree)
    run(config, ["labels" if labels else "geometry"])
    file = folder / "config.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    return Job(config, file, tuple(sources))


def ml4m_folder(folder: Path, pictures: Path, job: Job) -> Path:
    """The same pictures, maps and crops as ml-4m lays them out: split/task/class/key.ext."""
    root = folder / "ml4m"
    for name in (*job.sources, "crop_settings"):
        (root / "train" / name / "0").mkdir(parents=True)
    store = open_store(job.config.dataset)
    crops = read_shard(store, next(read_manifest(store).records("crop_settings")).name)
    for row, key in enumerate(crops.keys):
        recorded = [crops.value(row, crop) for crop in range(crops.spec.crops)]
        np.save(root / f"train/crop_settings/0/{key}.npy", np.array(recorded, dtype=np.int64))
        maps = np.load(pictures / "truth" / f"{key}.npz")
        for source in job.sources:
            if source == "rgb":
                shutil.copy(pictures / "corpus" / f"{key}.jpg", root / "train/rgb/0")
                continue
            scaled = maps["depth"] / 10 * 65535 if source == "depth" else (maps["normal"] + 1) * 127.5
            array = scaled.clip(0, 65535).astype(np.uint16 if source == "depth" else np.uint8)
            Image.fromarray(array).save(root / f"train/{source}/0/{key}.png")
    return root
