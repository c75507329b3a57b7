"""What strangers write as captions, metadata and keys, made fit to store.

Invariants: texts are valid UTF-8 of bounded length; metadata is strict JSON; every sample's key is its own, one line,
and safe as a relative path. What had to be changed or left out is told to the caller.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# An Arrow string column ends at 2^31 bytes: with at most 10,000 rows a shard, 2^17 bytes a row stay below it.
MAX_TEXT_BYTES = 1 << 17
MAX_KEY_BYTES = 512
TEXT_FIELDS = ("caption", "text", "alt_text", "alt", "captions", "description", "prompt", "title")
_SURROGATE = re.compile("[\ud800-\udfff]")


def as_text(data: bytes) -> tuple[str | None, str | None]:
    """A caption file's text without the newline at its end, or None and the reason. An empty file is no text."""
    try:
        return clean_text(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"text not utf-8: byte {data[error.start]:#04x} at {error.start}"


def clean_text(value: Any) -> tuple[str | None, str | None]:
    """A caption as it will be stored; None and the reason if it is no text or too long."""
    if value is None or value == "":
        return None, None
    if not isinstance(value, str):
        return None, f"text not a string: {type(value).__name__}"
    text = printable(value).rstrip("\r\n")
    num_bytes = len(text.encode())
    if num_bytes > MAX_TEXT_BYTES:
        return None, f"text too large: {num_bytes} bytes, at most {MAX_TEXT_BYTES} are kept"
    return text or None, None


def as_metadata(data: bytes | str) -> tuple[dict[str, Any], str | None]:
    """A JSON file's object as strict JSON, or {} and the reason. Anything but an object is kept under 'value'."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return {}, f"metadata not json: {printable(str(error))}"
    return bounded(value if isinstance(value, dict) else {"value": value})


def caption_in(fields: Mapping[str, Any], text_field: str | None) -> tuple[str | None, str | None]:
    """The caption among a sample's fields, by its usual names or the one asked for; None and the reason if unfit."""
    name = named(list(fields), (text_field.lower(),) if text_field else TEXT_FIELDS)
    return clean_text(first_of(fields[name])) if name else (None, None)


def first_of(value: Any) -> Any:
    """The first of several captions; a single one as it is."""
    return (value[0] if value else None) if isinstance(value, list | tuple) else value


def found(**problems: str | None) -> dict[str, str]:
    """Only those that are problems."""
    return {modality: reason for modality, reason in problems.items() if reason}


def bounded(fields: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Metadata as strict JSON, or {} and the reason if it is too large or nested too deeply."""
    try:
        value = plain(fields)
        num_bytes = len(json.dumps(value, ensure_ascii=False).encode())
    except RecursionError:
        return {}, "metadata too deep: nested beyond what can be written"
    if num_bytes > MAX_TEXT_BYTES:
        return {}, f"metadata too large: {num_bytes} bytes, at most {MAX_TEXT_BYTES} are kept"
    return value, None


def printable(text: str) -> str:
    """Lone surrogates (half an emoji in JSON, file names that are not UTF-8) cannot be stored: each becomes U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def plain(value: Any) -> Any:
    """Anything a parquet or JSON reader gives -> what strict JSON holds: NaN becomes null, bytes their number."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {printable(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int):
        return value
    return {"num_bytes": len(value)} if isinstance(value, bytes) else printable(str(value))  # dates, decimals


def named(fields: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of `wanted` among `fields`, whatever its case (LAION writes TEXT and URL)."""
    by_lower = {name.lower(): name for name in reversed(fields)}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def safe_key(original: str) -> str:
    """A key that is one line, at most 512 bytes of UTF-8, and stays below a folder when used as a path.

    Offending characters are percent-encoded (and then `%` too, so that `unquote_to_bytes` gives the original back); a
    key that is too long ends in a digest of the whole.
    """
    parts = original.split("/")
    if any(_is_odd(c) for c in original) or any(part in ("", ".", "..") for part in parts):
        escaped = ["".join(_quoted(c) if _is_odd(c) or c == "%" else c for c in part) for part in parts]
        return _shortened("/".join({"": "%", ".": "%2E", "..": "%2E%2E"}.get(part, part) for part in escaped))
    return _shortened(original)


def _is_odd(character: str) -> bool:
    return character == "\\" or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _quoted(character: str) -> str:
    # File names that are not UTF-8 come as surrogate escapes, broken JSON as any other surrogate.
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return urllib.parse.quote_from_bytes(character.encode("utf-8", errors), safe="")


def percent_encoded(key: str) -> str:
    """The bytes of any key, also of one that is not UTF-8; `urllib.parse.unquote_to_bytes` gives them back."""
    return "".join(_quoted(c) for c in key)


def _shortened(key: str) -> str:
    data = key.encode()
    if len(data) <= MAX_KEY_BYTES:
        return key
    return (
        data[: MAX_KEY_BYTES - 40].decode("utf-8", "ignore").rstrip("/") + "~" + hashlib.sha256(data).hexdigest()[:32]
    )


class KeyRegister:
    """Gives every sample a key of its own: the second `cat` becomes `cat~2`. About 9 bytes of memory a key."""

    def __init__(self) -> None:
        self._settled = np.empty(0, np.uint64)  # sorted digests
        self._recent: set[int] = set()
        self._repeats: dict[str, int] = {}

    def claim(self, original: str) -> str:
        """The unique key for the next sample whose own key is `original`."""
        base = key = safe_key(original)
        number = self._repeats.get(base, 1)
        while not self._add(key):
            number += 1
            key = _shortened(f"{base}~{number}")
        if number > 1:
            self._repeats[base] = number
        return key

    def _add(self, key: str) -> bool:
        # 64 bits: two of 10^9 keys collide with probability 3%, and then one is renamed, no more.
        value = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        place = int(np.searchsorted(self._settled, np.uint64(value)))
        if value in self._recent or (place < len(self._settled) and int(self._settled[place]) == value):
            return False
        self._recent.add(value)
        if len(self._recent) > (1 << 16) + len(self._settled) // 16:
            fresh = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._settled = np.union1d(self._settled, fresh)
            self._recent.clear()
        return True
