"""Numbers as people read them in a terminal's tables."""

from __future__ import annotations

import math


def human_count(count: int, noun: str) -> str:
    """1 row, 1,234 rows."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def plain(text: str) -> str:
    """Without anything that a terminal would obey: keys and reasons can be a stranger's."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def human_bytes(count: float) -> str:
    """Three digits and a decimal unit: 1.25 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"


def human_seconds(seconds: float) -> str:
    """In the unit that leaves a number of two or three digits: 43 s, 12 min, 5.3 h; '' for none."""
    if not seconds:
        return ""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}" if seconds < 1000 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.3g} s"


def human_number(value: float | None) -> str:
    """Four digits: 0.01234, 12.34, 1,234, 1.234e+07; '?' for none."""
    if value is None:
        return "?"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def human_share(part: float, whole: float) -> str:
    """A percentage that says 100 % only of all, and 0 % only of none."""
    if not whole:
        return ""
    share = 100 * part / whole
    text = f"{share:.1f}" if share >= 0.1 or not share else f"{share:.{-math.floor(math.log10(share))}f}"
    if part < whole and text == "100.0":
        text = ">99.9"
    return f"{text.removesuffix('.0') if part in (0, whole) else text} %"
