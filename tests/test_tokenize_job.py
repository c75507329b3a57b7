"""The tokenize job with real networks: several crops, fused with labelers, ids of two and of four bytes, any batch."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from helpers import all_records
from PIL import Image
from tiny_tokenizers import build, checkpoint_config, settled, write_checkpoint

from fourmill.config import Config
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import Shard, read_shard
from fourmill.pipeline.store import open_store
from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.networks.weights import pack
from fourmill.tokenizers.sources import source_of
from fourmill.tokenizers.spatial import CPU_SAMPLES, SpatialCodec

ROOT = Path(__file__).parent.parent
PHASED = {"labels": {"labelers": ["bright"]}, "tokens": {"tokenizers": ["tok_rgb", "tok_depth"]}}
FUSED = {"all": {"labelers": ["bright"], "tokenizers": ["tok_rgb", "tok_depth"], "store": ["tok_rgb", "tok_depth"]}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    configs = {"tok_rgb": checkpoint_config("rgb", 3, size=16), "tok_depth": checkpoint_config("depth", 1, size=16)}
    return {name: str(write_checkpoint(folder / name, config)) for name, config in configs.items()}


def dataset_of(folder: Path) -> str:
    return toys.make_dataset(folder, str(folder / "dataset"), count=9, shard_size=5)


def config(
    dataset: str, checkpoints: dict[str, str], stages: dict[str, Any], batch_size: int | None = None, crops: int = 3
) -> Config:
    return Config.model_validate(
        {
            "dataset": dataset,
            "crops": {"size": 16, "count": crops, "seed": 5},
            "labelers": {"bright": {"kind": "toys:Brightness", "gain": 0.05}},  # metres
            "tokenizers": {
                name: {"kind": "spatial", "checkpoint": folder, "batch_size": batch_size}
                for name, folder in checkpoints.items()
            },
            "stages": stages,
            "ray": {"address": "none"},
        }
    )


def shards_of(dataset: str, name: str) -> list[Shard]:
    store = open_store(dataset)
    return [read_shard(store, record.name) for record in read_manifest(store).records(name)]


def token_digests(dataset: str) -> dict[str, str]:
    records = all_records(read_manifest(open_store(dataset)))
    return {r.name: r.digest for r in records if r.modality.startswith("tok_")}


def test_every_crop_is_tokenized_through_its_recorded_geometry(tmp_path: Path, checkpoints: dict[str, str]) -> None:
    dataset = dataset_of(tmp_path)
    run(config(dataset, checkpoints, PHASED))
    network = build("tok_rgb", checkpoints["tok_rgb"]).codec.network
    shard, crops, pictures = (shards_of(dataset, m)[1] for m in ("tok_rgb", "crop_settings", "rgb"))
    assert shard.table.column_names == ["key", "crop_0", "crop_1", "crop_2"]
    assert shard.spec.grid == (4, 4)
    for row in range(4):
        image = Image.open(io.BytesIO(pictures.value(row))).convert("RGB")
        for crop in range(3):
            square = apply_crop(image, Crop(*crops.value(row, crop).tolist()), 16)
            inputs = torch.from_numpy(square.transpose(2, 0, 1)[None].copy()).float() / 127.5 - 1
            wanted = network.tokens(inputs)[0].tolist()
            assert shard.value(row, crop).tolist() == wanted
    assert not np.array_equal(shard.tokens(0), shard.tokens(1))


def test_fused_with_labelers_makes_the_bytes_of_two_passes_and_stores_no_label(
    tmp_path: Path, checkpoints: dict[str, str]
) -> None:
    phased, fused = dataset_of(tmp_path / "phased"), dataset_of(tmp_path / "fused")
    run(config(phased, checkpoints, PHASED))
    run(config(fused, checkpoints, FUSED))
    assert len(token_digests(phased)) == 4
    assert token_digests(fused) == token_digests(phased)
    assert "depth" in read_manifest(open_store(phased)).modalities
    assert "depth" not in read_manifest(open_store(fused)).modalities


def test_batch_size_changes_no_byte(tmp_path: Path, checkpoints: dict[str, str]) -> None:
    one, other = dataset_of(tmp_path / "one"), dataset_of(tmp_path / "other")
    run(config(one, checkpoints, PHASED, batch_size=1))
    run(config(other, checkpoints, PHASED, batch_size=16))
    assert token_digests(one) == token_digests(other)


@pytest.mark.parametrize(
    ("levels", "kind"), [((16, 16, 256), "uint16"), ((10, 10, 10, 70), "uint32")], ids=["65,536 ids", "70,000 ids"]
)
def test_ids_take_two_bytes_up_to_65536_and_four_beyond(tmp_path: Path, levels: tuple[int, ...], kind: str) -> None:
    settings = checkpoint_config("rgb", 3, size=16, quantizer="fsq", levels=levels)
    network = VQNetwork(settings).eval()
    torch.nn.init.constant_(network.quant_proj.bias, 30.0)  # every channel at its highest level: the last id
    (tmp_path / "rgb").mkdir()
    (tmp_path / "rgb" / "config.json").write_text(settings.model_dump_json())
    (tmp_path / "rgb" / "model.safetensors").write_bytes(pack(network))
    dataset = dataset_of(tmp_path)
    run(config(dataset, {"tok_rgb": str(tmp_path / "rgb")}, {"tokens": {"tokenizers": ["tok_rgb"]}}, crops=2))
    shard, _ = shards_of(dataset, "tok_rgb")
    vocabulary = int(np.prod(levels))
    assert str(shard.column(1).type.value_type) == kind
    assert shard.spec.vocabulary == vocabulary
    assert shard.tokens(1).tolist() == [[vocabulary - 1] * 16] * 5


# Batches.


def codec_of(network: VQNetwork, source: str = "rgb") -> SpatialCodec:
    settings = checkpoint_config(source, network.channels, size=16)
    return SpatialCodec(settings, network, source_of(settings), "cpu")


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, CPU_SAMPLES - 1, CPU_SAMPLES, CPU_SAMPLES + 1, 3 * CPU_SAMPLES])
def test_samples_of_any_batch_get_the_tokens_they_get_alone(count: int) -> None:
    codec, batch = codec_of(settled(checkpoint_config("rgb", 3, size=16))), pixels(count)
    alone = [codec.encode(batch[i : i + 1])[0].tolist() for i in range(count)]
    assert [row.tolist() for row in codec.encode(batch)] == alone


class _Rounding(VQNetwork):
    """A network on a processor that rounds otherwise in batches, at one place of them."""

    sizes_seen: list[int]

    def latents(self, inputs: torch.Tensor) -> torch.Tensor:
        self.sizes_seen.append(len(inputs))
        found = super().latents(inputs)
        if len(inputs) > 1:
            found[2] = found[2] + 1e-3
        return found


def test_where_batches_round_otherwise_samples_are_computed_one_by_one() -> None:
    network = settled(checkpoint_config("rgb", 3, size=16))
    network.__class__, network.sizes_seen = _Rounding, []  # type: ignore[assignment]
    codec = codec_of(network)
    codec.encode(pixels(2 * CPU_SAMPLES))
    assert network.sizes_seen == [1, CPU_SAMPLES] + [1] * 2 * CPU_SAMPLES  # the comparison, then each alone


def test_where_batches_are_exact_whole_groups_are_computed_together() -> None:
    network = settled(checkpoint_config("rgb", 3, size=16))
    codec, seen, latents = codec_of(network), [], network.latents

    def spy(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(len(inputs))
        return torch.cat([latents(inputs[i : i + 1]) for i in range(len(inputs))])

    network.latents = spy  # type: ignore[method-assign]
    codec.encode(pixels(CPU_SAMPLES + 2))
    codec.encode(pixels(CPU_SAMPLES))
    assert seen == [1, CPU_SAMPLES, CPU_SAMPLES, 1, 1, CPU_SAMPLES]


def test_bfloat16_is_asked_for_by_name_and_stays_near_float32(checkpoints: dict[str, str]) -> None:
    exact, fast = (build("tok_rgb", checkpoints["tok_rgb"], precision=p) for p in ("float32", "bfloat16"))
    assert build("tok_rgb", checkpoints["tok_rgb"]).lineage() == exact.lineage() != fast.lineage()
    inputs = exact.codec.source.prepare(pixels(1))
    with torch.inference_mode():
        wanted, found = exact.codec._latents(inputs), fast.codec._latents(inputs)
        assert torch.equal(wanted, exact.codec.network.latents(inputs))
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_one_wrong_value_is_refused_whatever_stands_beside_it() -> None:
    codec = codec_of(settled(checkpoint_config("depth", 1, size=16)), "depth")
    maps = [np.ones((16, 16), np.float32) for _ in range(CPU_SAMPLES)]
    maps[-1] = np.ones((16, 8), np.float32)
    with pytest.raises(ValueError, match=r"depth value of shape \(16, 8\)"):
        codec.encode(maps)


# Benchmarks.


MENDED = 'sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))'


def test_every_benchmark_mends_its_path_before_it_imports_anything() -> None:
    scripts = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]
    assert len(scripts) >= 10
    for path in scripts:
        before, mended, after = path.read_text().partition(MENDED)
        assert mended, f"{path.name} would take benchmarks/tokenize.py for the standard library's"
        body = before.rpartition('"""')[2]
        imports = [line for line in body.splitlines() if line.startswith(("import ", "from "))]
        assert imports == ["from __future__ import annotations", "import sys"], path.name
        assert "import" in after


@pytest.mark.parametrize("name", ["tokenize", "loader"])
def test_no_benchmark_takes_benchmarks_tokenize_for_the_standard_library(name: str) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
