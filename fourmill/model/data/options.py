"""Which part of a dataset is read and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fourmill.model.config import PretrainConfig, ShardCacheConfig

WINDOW = 16  # shards of object storage whose samples are shuffled together: 16,000 samples


@dataclass(frozen=True)
class DataConfig:
    """Fields as in `PretrainConfig`. `shuffle_shards`: None for all of a local dataset, `WINDOW` of any other."""

    names: tuple[str, ...]
    image_size: int
    patch_size: int = 16
    held_out: float = 0.125
    missing: Literal["mask", "error", "skip"] = "mask"
    mixed_generations: bool = False
    max_tokens: Mapping[str, int] | None = None
    num_sentinels: int = 200
    cache_bytes: int = 512 << 20
    shuffle_shards: int | None = None
    shard_cache: ShardCacheConfig = field(default_factory=ShardCacheConfig)


def data_config(config: PretrainConfig) -> DataConfig:
    """What a training run reads."""
    return DataConfig(
        names=tuple(dict.fromkeys((*config.inputs, *config.targets))),
        image_size=config.model.image_size,
        patch_size=config.model.patch_size,
        held_out=config.held_out,
        missing=config.missing,
        mixed_generations=config.mixed_generations,
        max_tokens=config.max_tokens,
        num_sentinels=config.masking.num_sentinels,
        cache_bytes=config.cache_bytes,
        shuffle_shards=config.shuffle_shards,
        shard_cache=config.shard_cache,
    )
