"""Which samples of a dataset are held out: a function of their keys, so every key is read and hashed once.

That takes about 2 µs a key. Of large datasets the answer is kept, a bit a sample, where shards of object storage are
kept too.
"""

from __future__ import annotations

import hashlib
import logging

import numpy as np

from fourmill.model.config import ShardCacheConfig
from fourmill.model.data.cache import ShardCache
from fourmill.model.data.source import Source, in_threads
from fourmill.pipeline.shards import digest
from fourmill.pipeline.splits import held_out_rank

log = logging.getLogger(__name__)

_KEPT_FROM = 100_000  # samples: 0.2 s
_SHA = 32  # bytes of the digest before the bits


def held_out(source: Source, fraction: float, config: ShardCacheConfig) -> np.ndarray:
    """bool, one for each sample. OSError where the keys cannot be read."""
    count = int(source.rows.sum())
    if fraction <= 0:
        return np.zeros(count, dtype=bool)
    if count < _KEPT_FROM:
        return _compute(source, fraction, config.threads)
    cache, name = ShardCache(config), f"{digest('split 1', source.keys_digest, repr(fraction))}.split"
    bits = _checked(cache.get(name), count)
    if bits is None:
        (cache.folder / name).unlink(missing_ok=True)
        held = _compute(source, fraction, config.threads)
        packed = np.packbits(held).tobytes()
        cache.put(name, _SHA + len(packed), [hashlib.sha256(packed).digest(), packed])
        return held
    return bits


def _compute(source: Source, fraction: float, threads: int) -> np.ndarray:
    below = fraction * 2.0**64

    def one(place: int) -> np.ndarray:
        keys = source.keys(place)
        if len(keys) != source.rows[place]:
            number, rows = source.numbers[place], source.rows[place]
            raise ValueError(f"shard {number} of {source.uri} has {len(keys)} keys where its record says {rows}")
        return np.fromiter((held_out_rank(key) < below for key in keys), bool, len(keys))

    return np.concatenate(in_threads(one, range(len(source.numbers)), threads))


def _checked(data: bytes | None, count: int) -> np.ndarray | None:
    """The bits that were kept, if they are whole."""
    if data is None:
        return None
    sha, packed = data[:_SHA], data[_SHA:]
    if len(packed) != -(-count // 8) or hashlib.sha256(packed).digest() != sha:
        log.warning("the kept split of %d samples is damaged and is made again", count)
        return None
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool)
