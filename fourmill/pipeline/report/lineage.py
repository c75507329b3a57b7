"""The lineage graph: what was made from what, by which component, with which weights, under which licences; as SVG.

Components stand in layers, each right of all that it read; an arrow that a longer way makes superfluous is left out, or
every labeler would have one from the pictures and one from the crops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fourmill.pipeline.report.makers import Maker

_WIDE, _HIGH, _GAP_X, _GAP_Y, _EDGE = 182, 56, 38, 9, 2  # pixels
_LETTERS = {"title": 21, "small": 25}  # that fit into a box
_PASSES = 9  # of sorting layers by their neighbours, the last by their parents; a dozen changes nothing


@dataclass(frozen=True)
class Box:
    """One node. `lines`: what is written in it; `words`: all of it, for tooltips."""

    lines: tuple[str, str, str]
    words: str
    warn: bool = False


def graph(found: Sequence[Maker], corpus: str) -> Markup:
    """The drawing; `corpus` names where pictures came from."""
    boxes = {maker.recipe: _box(maker, corpus) for maker in found}
    parents = _parents(found)
    layers = _ordered(_layers(parents), parents)
    places = _places(layers, parents)
    width = max(x for x, _ in places.values()) + _WIDE + _EDGE
    height = max(y for _, y in places.values()) + _HIGH + _EDGE
    arrows = Markup("").join(_arrow(places[p], places[c]) for c, many in parents.items() for p in many)
    nodes = Markup("").join(_drawn(boxes[key], *places[key]) for key in boxes)
    words = f"Lineage: {len(found)} components in {len(layers)} steps, the corpus first; the table below says the same"
    opening = Markup('<svg width="{0:.0f}" height="{1:.0f}" viewBox="0 0 {0:.0f} {1:.0f}" role="img" aria-label="{2}">')
    return opening.format(width, height, words) + arrows + nodes + Markup("</svg>")


@dataclass(frozen=True)
class Branch:
    """A component in the list that stands for the drawing on a narrow screen. `also`: what else it was made from than
    what it hangs on."""

    maker: Maker
    also: tuple[str, ...]
    branches: tuple[Branch, ...]


def tree(found: Sequence[Maker]) -> tuple[Branch, ...]:
    """Each component under the first of those that it was made from."""
    parents, known = _parents(found), {maker.recipe: maker for maker in found}
    layers = _layers(parents)
    order = [key for layer in _ordered(layers, parents) for key in layer]
    depth = {key: level for level, layer in enumerate(layers) for key in layer}
    above = {
        key: min((p for p in parents[key] if depth[p] < depth[key]), key=order.index, default=None) for key in order
    }

    def under(parent: str | None) -> tuple[Branch, ...]:
        return tuple(Branch(known[key], others(key), under(key)) for key in order if above[key] == parent)

    def others(key: str) -> tuple[str, ...]:
        return tuple(known[p].shown for p in order if p in parents[key] and p != above[key])

    return under(None)


def _box(maker: Maker, corpus: str) -> Box:
    """What was ingested names its corpus, all else its weights and their licences."""
    weights = " + ".join(w.reference for w in maker.weights)
    licences = " + ".join(dict.fromkeys(w.licence or "unknown" for w in maker.weights)) or "no weights"
    warn = maker.non_commercial
    licences = f"NON-COMMERCIAL {licences}" if warn else licences
    second, third = (weights or maker.title, licences) if maker.inputs else (maker.title, corpus)
    made = f"{maker.shown}: {maker.title} from {', '.join(maker.inputs) or corpus}"
    words = f"{made}; weights: {weights or 'none'}, {licences}; code: {maker.licence or 'not stated'}"
    lines = (_cut(maker.shown, "title"), _cut(second, "small"), _cut(third, "title" if warn else "small"))
    return Box(lines, words, warn)


def _cut(text: str, kind: str) -> str:
    most = _LETTERS[kind]
    return text if len(text) <= most else text[: most - 1] + "…"


def _parents(found: Sequence[Maker]) -> dict[str, set[str]]:
    """Of each component those it read from, without the ones that another of them has read from already."""
    ingest = {name: m.recipe for m in found if not m.inputs for name in m.modalities}
    recipes = {m.recipe for m in found}
    direct: dict[str, set[str]] = {}
    for maker in found:
        read = {ingest.get(name) if recipe == "corpus" else recipe for name, recipe in maker.inputs.items()}
        direct[maker.recipe] = {str(recipe) for recipe in read if recipe in recipes and recipe != maker.recipe}
    before = {key: _all_before(key, direct) for key in direct}
    return {key: {p for p in many if not any(p in before[q] for q in many if q != p)} for key, many in direct.items()}


def _all_before(key: str, direct: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(direct[key])
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += direct[one]
    return found - {key}


def _layers(parents: Mapping[str, set[str]]) -> list[list[str]]:
    """Each one step right of the furthest of its parents. A manifest with a circle, which nothing could have made,
    is cut after as many steps as there are components."""
    depth = dict.fromkeys(parents, 0)
    for _ in range(len(parents)):
        new = {key: 1 + max((depth[p] for p in many), default=-1) for key, many in parents.items()}
        if new == depth or max(new.values()) >= len(parents):
            break
        depth = new
    return [[key for key in parents if depth[key] == level] for level in range(max(depth.values()) + 1)]


def _ordered(layers: list[list[str]], parents: Mapping[str, set[str]]) -> list[list[str]]:
    """Layers sorted so that arrows cross little: by the mean place of their parents, of their children, by turns."""
    children: dict[str, set[str]] = {key: set() for key in parents}
    for child, many in parents.items():
        for parent in many:
            children[parent].add(child)
    for turn in range(_PASSES):
        place = {key: i / max(len(layer), 1) for layer in layers for i, key in enumerate(layer)}
        near = parents if turn % 2 == 0 else children
        layers = [sorted(layer, key=lambda k: (_mean(place, near[k], place[k]), place[k])) for layer in layers]
    return layers


def _mean(place: Mapping[str, float], keys: set[str], own: float) -> float:
    return sum(place[k] for k in keys) / len(keys) if keys else own


def _places(layers: Sequence[Sequence[str]], parents: Mapping[str, set[str]]) -> dict[str, tuple[float, float]]:
    """x, y of each box: layers from left to right, boxes as near to their parents as those above and below allow."""
    step = _HIGH + _GAP_Y
    middle = max(len(layer) for layer in layers) * step / 2
    places: dict[str, tuple[float, float]] = {}
    for level, layer in enumerate(layers):
        x = _EDGE + level * (_WIDE + _GAP_X)
        around = [[places[p][1] for p in parents[key] if p in places] for key in layer]
        wanted = [sum(ys) / len(ys) if ys else middle + (i - len(layer) / 2) * step for i, ys in enumerate(around)]
        places |= {key: (x, y) for key, y in zip(layer, _apart(wanted, step), strict=True)}
    top = min(y for _, y in places.values()) - _EDGE
    return {key: (x, y - top) for key, (x, y) in places.items()}


def _apart(wanted: Sequence[float], step: float) -> list[float]:
    """The places nearest to the wanted ones, by squares, that keep their order and are a step apart: neighbours that
    are too near are pooled (isotonic regression by pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean of wanted - index * step, and how many
    for index, place in enumerate(wanted):
        pools.append((place - index * step, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    flat = [mean for mean, many in pools for _ in range(many)]
    return [mean + index * step for index, mean in enumerate(flat)]


def _arrow(start: tuple[float, float], stop: tuple[float, float]) -> Markup:
    x0, y0, x1, y1 = start[0] + _WIDE, start[1] + _HIGH / 2, stop[0], stop[1] + _HIGH / 2
    bend = min((x1 - x0) / 2, 40)
    path = f"M{x0:.0f} {y0:.0f}C{x0 + bend:.0f} {y0:.0f} {x1 - bend:.0f} {y1:.0f} {x1:.0f} {y1:.0f}"
    return Markup('<path class="edge" d="{}"/>').format(path)


def _drawn(box: Box, x: float, y: float) -> Markup:
    kinds = ("label", "", "nc" if box.warn else "")
    texts = Markup("").join(
        Markup('<text x="10" y="{}" class="{}"{}>{}</text>').format(
            18 + 15 * row, kind, Markup(' style="font-weight:600;font-size:12.5px"') if row == 0 else "", line
        )
        for row, (line, kind) in enumerate(zip(box.lines, kinds, strict=True))
        if line
    )
    frame = Markup('<rect class="node{}" width="{}" height="{}" rx="7"/>').format(
        " warn" if box.warn else "", _WIDE, _HIGH
    )
    opening = Markup('<g transform="translate({:.0f} {:.0f})"><title>{}</title>').format(x, y, box.words)
    return opening + frame + texts + Markup("</g>")
