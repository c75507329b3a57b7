"""Which samples are held out: a function of the key alone, the same for tokenizers and for 4M."""

from __future__ import annotations

import hashlib


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a sample is never trained on. Growing a dataset moves no sample; a larger share only adds."""
    return held_out_rank(key) < fraction * 2.0**64


def held_out_rank(key: str) -> int:
    """The order in which keys are held out, the lowest first: below 2^64, as good as drawn at random."""
    return int.from_bytes(hashlib.sha256(b"held out\0" + key.encode()).digest()[:8], "big")
