"""Which samples are held out: a function of the key alone, the same for tokenizers and for 4M."""

from __future__ import annotations

import hashlib


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a sample is never trained on. Growing a dataset moves no sample; a larger share only adds."""
    number = int.from_bytes(hashlib.sha256(b"held out\0" + key.encode()).digest()[:8], "big")
    return number < fraction * 2.0**64
