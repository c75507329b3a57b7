"""Small charts as inline SVG. Colours go by class, to follow the page's theme; each says in words what it shows.

Every text is escaped by `Markup.format`. Sizes are in CSS pixels, at which a chart is shown on a phone, so that its
text stays legible; strips stretch to the width there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 40
_TICK_ROOM = 3.4  # decades of a logarithmic axis that get a tick each; more get one every other


@dataclass(frozen=True)
class Axis:
    """What an axis shows, with its unit; `low`, `high` in that unit. `format` writes a tick."""

    label: str
    low: float
    high: float
    log: bool = False
    format: Callable[[float], str] | None = None

    def place(self, values: np.ndarray) -> np.ndarray:
        """0..1 along the axis."""
        low, high = (math.log10(v) if self.log else v for v in (self.low, self.high))
        scaled = np.log10(np.maximum(values, self.low)) if self.log else values
        return np.clip((scaled - low) / max(high - low, 1e-300), 0, 1)

    def ticks(self) -> list[float]:
        return _decades(self.low, self.high) if self.log else steps(self.low, self.high)

    def written(self, tick: float) -> str:
        return (self.format or short)(tick)


@dataclass(frozen=True)
class Series:
    """One curve; `style` is the class of its stroke: s0 to s5, or 'dash' for what others are compared with."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "s0"


def line_chart(series: Sequence[Series], x: Axis, y: Axis, words: str, stairs: bool = False) -> Markup:
    """Curves over two axes. `words`: what it says, for those who do not see it. `stairs`: y holds until the next x."""
    curves = Markup("").join(_curve(s, x, y, stairs) for s in series)
    return _chart(_axes(x, y) + curves, words)


def histogram(
    edges: Sequence[float], counts: Sequence[float], x: Axis, y: Axis, words: str, style: str = "f0"
) -> Markup:
    """Bars between edges: one edge more than counts."""
    places, tops = _across(x.place(np.asarray(edges, float))), _down(y.place(np.asarray(counts, float)))
    base = HEIGHT - _BOTTOM
    path = "".join(
        f"M{left:.1f} {base}V{top:.1f}H{max(right - 0.4, left + 0.4):.1f}V{base}Z"
        for left, right, top in zip(places, places[1:], tops, strict=False)
        if top < base
    )
    return _chart(_axes(x, y) + Markup('<path class="{}" d="{}"/>').format(style, path), words)


def strip(heights: Sequence[float], styles: Sequence[str], words: str, tall: bool = False) -> Markup:
    """Cells from left to right, filled from below up to `heights` (0..1), in the class `styles` names; stretches."""
    parts = []
    for style in dict.fromkeys(styles):
        cells = _runs(heights, [s == style for s in styles])
        path = "".join(f"M{start} 1V{1 - height:.3f}H{stop}V1Z" for start, stop, height in cells)
        parts.append(Markup('<path class="{}" d="{}"/>').format(style, path))
    opening = Markup('<svg viewBox="0 0 {} 1" preserveAspectRatio="none" role="img" aria-label="{}"{}>')
    kind = Markup(' class="tall"') if tall else ""
    return opening.format(max(len(heights), 1), words, kind) + Markup("").join(parts) + Markup("</svg>")


def _runs(heights: Sequence[float], chosen: Sequence[bool]) -> list[tuple[int, int, float]]:
    """(start, stop, height) of neighbouring chosen cells of one height: a long strip takes a few bytes."""
    found: list[tuple[int, int, float]] = []
    for index, (height, wanted) in enumerate(zip(heights, chosen, strict=True)):
        if wanted and height > 0:
            if found and found[-1][1] == index and abs(found[-1][2] - height) < 1e-3:
                found[-1] = (found[-1][0], index + 1, height)
            else:
                found.append((index, index + 1, height))
    return found


def _chart(inside: Markup, words: str) -> Markup:
    opening = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, words)
    return opening + inside + Markup("</svg>")


def _curve(series: Series, x: Axis, y: Axis, stairs: bool) -> Markup:
    across, down = _across(x.place(np.asarray(series.x, float))), _down(y.place(np.asarray(series.y, float)))
    if not len(across):
        return Markup("")
    step = "H{0:.1f}V{1:.1f}" if stairs else "L{0:.1f} {1:.1f}"
    points = "".join(step.format(*p) for p in zip(across[1:], down[1:], strict=True))
    path = f"M{across[0]:.1f} {down[0]:.1f}{points}" + (f"H{WIDTH - _RIGHT}" if stairs else "")
    dot = ""
    if len(across) == 1:  # a curve of one point would not be seen
        dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3" class="{}"/>').format(
            across[0], down[0], series.style.replace("s", "f")
        )
    kind = series.style if series.style == "dash" else f"curve {series.style}"
    return Markup('<path class="{}" d="{}"/>').format(kind, path) + dot


def _across(places: np.ndarray) -> np.ndarray:
    return _LEFT + places * (WIDTH - _LEFT - _RIGHT)


def _down(places: np.ndarray) -> np.ndarray:
    return HEIGHT - _BOTTOM - places * (HEIGHT - _TOP - _BOTTOM)


def _axes(x: Axis, y: Axis) -> Markup:
    base, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = [Markup('<path class="axis" d="M{} {}H{}"/>').format(_LEFT, base, right)]
    for tick, down in zip(y.ticks(), _down(y.place(np.asarray(y.ticks(), float))), strict=True):
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(_LEFT, down, right))
        parts.append(_text(_LEFT - 5, down + 4, y.written(tick), "end"))
    for tick, across in zip(x.ticks(), _across(x.place(np.asarray(x.ticks(), float))), strict=True):
        anchor = "end" if across > right - 12 else "middle"
        parts.append(_text(min(across, right), base + 14, x.written(tick), anchor))
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 6, x.label, "middle", "label"))
    turned = Markup('<text class="label" text-anchor="middle" transform="translate(10 {:.0f}) rotate(-90)">{}</text>')
    parts.append(turned.format((_TOP + base) / 2, y.label))
    return Markup("").join(parts)


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> Markup:
    opening = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>')
    return opening.format(x, y, anchor, kind, words)


def steps(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    apart = max(1, math.ceil((last - first) / _TICK_ROOM / 2))
    return [10.0**power for power in range(first, last + 1, apart)]


def short(value: float) -> str:
    """A number in few characters: 1.2k, 3M, 0.05, 2e-06."""
    size = abs(value)
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}" if size >= 1e-4 or not size else f"{value:.0e}"
