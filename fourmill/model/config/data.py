"""Where training samples come from: datasets with their weights, and where shards of object storage are kept."""

from __future__ import annotations

from pydantic import Field

from fourmill.model.config.base import Section


class DatasetShare(Section):
    """One dataset of a mixture."""

    uri: str
    """A dataset, or an export of one as tars: a path or s3://bucket/prefix."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the samples, relative to the other datasets'; its size does not matter."""


class ShardCacheConfig(Section):
    """A folder where shards of object storage are kept as files, shared by the processes of a node."""

    folder: str | None = None
    """On a local disk; by default `fourmill-cache-<user id>` in the system's folder for temporary files."""
    max_bytes: int = Field(default=64 << 30, ge=0)
    """The shards last used stay up to this many bytes. Two windows of `shuffle_shards` shards must fit."""
    threads: int = Field(default=8, ge=1)
    """Downloads at once, the next window's while this one is trained on."""
