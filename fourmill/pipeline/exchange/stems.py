"""Keys as names of files and tar members: at most 64 bytes of ASCII, without dots and slashes, and back.

A dot would end the key for every WebDataset reader. What is not a letter, a digit or one of `-_+=,@~` is
percent-encoded; a name that grows too long ends in a digest instead, and the key has to be kept beside it.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse

MAX_BYTES = 64
"""So that `<stem>.<modality>.<crop>.<extension>` stays within the 100 bytes of a USTAR name."""
_SAFE = "-_+=,@~"
_DIGEST = 24
_ODD = re.compile(r"[^A-Za-z0-9\-_+=,@~]")


def stem_of(key: str) -> str:
    """The name for a key. Different keys have different names."""
    quoted = _quoted(key)
    if len(quoted) <= MAX_BYTES:
        return quoted
    start = re.sub(r"%[0-9A-F]?$", "", quoted[: MAX_BYTES - _DIGEST - 1])
    start = _quoted(urllib.parse.unquote_to_bytes(start).decode("utf-8", "ignore"))  # no half characters
    return f"{start}~{hashlib.sha256(key.encode()).hexdigest()[:_DIGEST]}"


def _quoted(key: str) -> str:
    return urllib.parse.quote(key, safe=_SAFE).replace(".", "%2E")  # quote() leaves dots alone whatever `safe` says


def key_of(stem: str) -> str:
    """The key that a name stands for, unless it was shortened. Names that are not ours come back as they are."""
    return urllib.parse.unquote(stem) if _is_ours(stem) else stem


def is_exact(key: str) -> bool:
    """Whether the key follows from its name alone."""
    return key_of(stem_of(key)) == key


def _is_ours(stem: str) -> bool:
    return not _ODD.search(stem.replace("%", "")) and stem_of(urllib.parse.unquote(stem)) == stem
