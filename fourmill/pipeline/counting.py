"""What is counted of a shard's values, kind by kind, for `fourmill.pipeline.statistics`, which adds it up.

    tokens            values, tokens, histogram of ids, min, max; beyond: ids outside of the vocabulary; constant grids;
                      lengths of sequences
    maps, features    rows_read, shapes, constant, invalid of pixels, values (normals: x, y, z)
    class maps        rows_read, shapes, constant, pixels, void of them; pixels (`classes`) and `maps` by class
    edges             rows_read, shapes, constant, edges of pixels, `shares` of edge pixels
    texts             characters, words, empty; of `captions` also texts of a sample, and `sources`
    objects           objects of a sample, empty samples, scores, areas of boxes, objects by class (`classes`)
    the rest          bytes of pictures; width, height, short_side and formats in `source`; sides of crops; colours of
                      palettes; samples with facts, and each of the `facts`

Maps have to be decoded for this, so at most 32 rows of a shard are, evenly spaced; `rows_read` says how many. All else
rests on every row. Objects can be a stranger's: a value that cannot be read is counted as `unreadable`. No sum of
fractions is taken, so that every machine derives the same record from the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from fourmill.modalities import Kind
from fourmill.pipeline.conventions import VOID, valid_mask
from fourmill.pipeline.distributions import COARSE, FINE, count_halves, of_halves, of_numbers
from fourmill.tokenizers.sequences.metadata import BOUNDS, RANGES
from fourmill.tokenizers.sequences.metadata import NAMES as FACTS

if TYPE_CHECKING:
    from fourmill.pipeline.shards import Shard

ROWS_READ = 32  # of maps: 2 to 6 % of what encoding 1,000 of them costs, without their teacher
MOST_IDS = 1 << 24  # ids above are `beyond`: a histogram of them would take 32 GB, and no tokenizer has so many
_STRANGE_NAMES = 1000
_LONGEST_NAME = 60
_OTHERS = "(other names)"

Tree = dict[str, Any]


def counted(shard: Shard) -> Tree:
    """Everything that is counted of one shard; zeros are not left out yet."""
    found = _BY_NAME.get(shard.entry.name) or _BY_KIND.get(shard.entry.kind)
    return found(shard) if found else {}


def _tokens(shard: Shard) -> Tree:
    columns = [shard.column(i).drop_null() for i in _crops(shard)]
    ids = np.concatenate([np.asarray(c.flatten()) for c in columns])
    inside = ids[ids < min(shard.spec.vocabulary or MOST_IDS, MOST_IDS)]
    found: Tree = {"vocabulary": shard.spec.vocabulary or 0, "values": sum(map(len, columns)), "tokens": len(ids)}
    if shard.entry.kind is Kind.SEQUENCE:
        lengths = np.concatenate([np.asarray(pc.list_value_length(c)) for c in columns])
        found |= {"lengths": of_numbers(lengths, whole=True)}
    elif shard.spec.length and shard.spec.length > 1:
        grids = ids.reshape(-1, shard.spec.length)
        found |= {"constant": int((grids == grids[:, :1]).all(axis=1).sum())}
    if not len(ids):
        return found
    bounds = {"min": int(ids.min()), "max": int(ids.max()), "beyond": len(ids) - len(inside)}
    return found | bounds | {"histogram": np.bincount(inside)}


# Maps


def _maps(shard: Shard) -> Tree:
    """Depth and features: all values together. Normals: each axis of its own."""
    counts: dict[str, np.ndarray] = {}
    tally: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for value in _some(shard, tally):
        shapes[_shape(value)] += 1
        tally["constant"] += int(value.size > 1 and bool((value == value.flat[0]).all()))
        if shard.entry.name in ("depth", "normal"):
            valid = valid_mask(shard.entry, value)
            tally.update(pixels=valid.size, invalid=int(np.count_nonzero(~valid)))
        axes = shard.entry.name == "normal" and value.shape[:1] == (3,)
        parts = dict(zip("xyz", value, strict=True)) if axes else {"values": value}
        for name, part in parts.items():
            counts[name] = counts.get(name, 0) + count_halves(part)
    return {**tally, "shapes": _names(shapes), **{name: of_halves(c) for name, c in counts.items()}}


def _classes(shard: Shard) -> Tree:
    tally: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    pixels, maps = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for value in _some(shard, tally):
        shapes[_shape(value)] += 1
        counts = np.bincount(value.reshape(-1), minlength=256)
        pixels += counts
        maps += counts > 0
        tally.update(pixels=value.size, constant=int(value.size > 1 and counts.max() == value.size))
    tally["void"] = int(pixels[VOID])
    names = shard.spec.classes or ()
    by_class: Counter[str] = Counter()
    in_maps: Counter[str] = Counter()
    for i in np.flatnonzero(pixels[:VOID]).tolist():  # two ids may share a name
        name = names[i] if i < len(names) else f"id {i}"
        by_class[name] += int(pixels[i])
        in_maps[name] += int(maps[i])
    return {**tally, "shapes": _names(shapes), "classes": dict(by_class), "maps": dict(in_maps)}


def _edges(shard: Shard) -> Tree:
    tally: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    shares = []
    for value in _some(shard, tally):
        shapes[_shape(value)] += 1
        edges = int(np.count_nonzero(value > VOID // 2))
        tally.update(pixels=value.size, edges=edges, constant=int(edges in (0, value.size)))
        shares.append(edges / max(value.size, 1))
    return {**tally, "shapes": _names(shapes), "shares": of_numbers(shares)}


def _some(shard: Shard, tally: Counter[str]) -> Iterator[np.ndarray]:
    """The decoded values, all crops, of rows evenly spaced among those that have one in the first."""
    present = np.flatnonzero(shard.valid(0))
    count = min(ROWS_READ, len(present))
    rows = present[np.arange(count) * len(present) // max(count, 1)]
    tally["rows_read"] += len(rows)
    for row in rows.tolist():
        for crop in _crops(shard):
            try:
                value = shard.value(row, crop)
            except Exception:  # the codecs raise whatever Pillow, zstd and struct raise
                tally["unreadable"] += 1
                continue
            if np.ndim(value):
                yield np.asarray(value)
            elif value is not None:  # a single number is no map
                tally["unreadable"] += 1


def _shape(value: np.ndarray) -> str:
    return "x".join(map(str, value.shape))


def _crops(shard: Shard) -> range:
    return range(shard.spec.crops if shard.entry.per_crop else 1)


# Pictures and texts


def _pictures(shard: Shard) -> Tree:
    return {"bytes": of_numbers(np.asarray(pc.binary_length(shard.column().drop_null())), whole=True)}


def _texts(shard: Shard) -> Tree:
    return _words(shard.column().drop_null().to_pylist())


def _words(texts: list[str]) -> Tree:
    words = [len(text.split()) for text in texts]
    characters = of_numbers([len(text) for text in texts], whole=True)
    return {"characters": characters, "words": of_numbers(words, whole=True), "empty": words.count(0)}


def _captions(shard: Shard) -> Tree:
    """All texts of each sample."""
    tally: Counter[str] = Counter()
    texts: list[str] = []
    sources: Counter[str] = Counter()
    counts = []
    for value in _parsed(shard, tally, _caption_list):
        counts.append(len(value))
        texts += (text for text, _ in value)
        sources.update(source for _, source in value)
    return {**tally, "texts": of_numbers(counts, whole=True), **_words(texts), "sources": _names(sources)}


def _caption_list(value: Any) -> list[tuple[str, str]]:
    return [(str(item["text"]), str(item.get("source", "?"))) for item in value]


def _sources(shard: Shard) -> Tree:
    """Sizes and formats of the pictures, as ingest found them."""
    tally: Counter[str] = Counter()
    found = list(_parsed(shard, tally, _size_and_format))
    formats = Counter(name for _, name in found if name)
    sizes = np.array([size for size, _ in found if size], dtype=np.float64).reshape(-1, 2)
    columns = {"width": sizes[:, 0], "height": sizes[:, 1], "short_side": sizes.min(axis=1)}
    spread = {name: of_numbers(column, whole=True) for name, column in columns.items()}
    return {**tally, **spread, "formats": _names(formats)}


def _size_and_format(value: Any) -> tuple[tuple[float, float] | None, str]:
    """Both are missing where the picture was not usable."""
    width, height, name = value["width"], value["height"], value.get("format")
    return None if width is None or height is None else (float(width), float(height)), str(name or "")


# Structured labels


def _objects(shard: Shard) -> Tree:
    """Boxes, segments, masks, people: a list for each sample."""
    tally: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    counts, scores, areas = [], [], []
    for value in _parsed(shard, tally, _object_list):
        counts.append(len(value))
        for name, score, area in value:
            if name is not None:
                classes[name] += 1
            scores += [] if score is None else [score]
            areas += [] if area is None else [area]
    return {
        **tally,
        "empty": counts.count(0),
        "objects": of_numbers(counts, whole=True),
        "scores": of_numbers(scores),
        "areas": of_numbers(areas),
        "classes": _names(classes, shard.spec.classes or ()),
    }


def _object_list(value: Any) -> list[tuple[str | None, float | None, float | None]]:
    """(class, score, the box's share of the crop) of each object, None for what it has not."""
    found = []
    for item in value:
        name, box = item.get("class_name"), item.get("box")
        area = (float(box[2]) - float(box[0])) * (float(box[3]) - float(box[1])) if box else None
        score = item.get("score")
        found.append((None if name is None else str(name), None if score is None else float(score), area))
    return found


def _palettes(shard: Shard) -> Tree:
    """How many colours the largest palette has, and the one colour that stands for each picture."""
    tally: Counter[str] = Counter()
    found = np.array(list(_parsed(shard, tally, _palette)), dtype=np.float64).reshape(-1, 4)
    named = zip(("colours", "red", "green", "blue"), found.T, strict=True)
    return {**tally, **{name: of_numbers(column, whole=True) for name, column in named}}


def _palette(value: Any) -> tuple[float, float, float, float]:
    red, green, blue = value["1"][0]
    return float(max(map(len, value.values()))), float(red), float(green), float(blue)


def _facts(shard: Shard) -> Tree:
    tally: Counter[str] = Counter()
    values: dict[str, list[float]] = {}
    samples = 0
    for facts in _parsed(shard, tally, lambda v: [(n, float(x)) for n, x in v.items() if n in FACTS]):
        samples += 1
        for name, number in facts:
            values.setdefault(name, []).append(number)
    return {**tally, "samples": samples, "facts": {name: _of_fact(name, numbers) for name, numbers in values.items()}}


def _of_fact(name: str, numbers: list[float]) -> Tree:
    """Facts are scores of some range, or sizes and counts."""
    whole = name not in RANGES and name not in BOUNDS
    return of_numbers(numbers, FINE if whole else COARSE, whole)


def _crop_settings(shard: Shard) -> Tree:
    columns = [np.asarray(shard.column(i).drop_null().flatten()).reshape(-1, 5) for i in _crops(shard)]
    crops = np.concatenate(columns)
    height, width = of_numbers(crops[:, 2], whole=True), of_numbers(crops[:, 3], whole=True)
    return {"crops": len(crops), "flipped": int((crops[:, 4] != 0).sum()), "height": height, "width": width}


def _parsed(shard: Shard, tally: Counter[str], read: Callable[[Any], Any]) -> Iterator[Any]:
    """What `read` makes of each JSON value, all rows and crops; counted as unreadable where it cannot."""
    for crop in _crops(shard):
        for text in shard.column(crop).drop_null().to_pylist():
            try:
                found = read(json.loads(text))
            except Exception:  # any type where another was expected
                tally["unreadable"] += 1
            else:
                yield found


def _names(counts: Mapping[str, int], announced: Iterable[str] = ()) -> dict[str, int]:
    """Counts by name. Names may be a stranger's: a thousand that were not announced, the commonest, and the rest."""
    known = set(announced)
    found: Counter[str] = Counter({name: count for name, count in counts.items() if name in known})
    strange: Counter[str] = Counter()
    for name, count in counts.items():
        if name not in known:
            strange[name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"] += count
    ranked = sorted(strange.items(), key=lambda item: (-item[1], item[0]))
    found.update(dict(ranked[:_STRANGE_NAMES]))
    found[_OTHERS] += sum(count for _, count in ranked[_STRANGE_NAMES:])
    return dict(found)


_BY_NAME: dict[str, Callable[[Shard], Tree]] = {
    "source": _sources,
    "captions": _captions,
    "color_palette": _palettes,
    "metadata": _facts,
    **dict.fromkeys(("panoptic", "instance", "sam_instance", "det", "human_poses"), _objects),
}
_BY_KIND: dict[Kind, Callable[[Shard], Tree]] = {
    Kind.IMAGE: _pictures,
    Kind.TEXT: _texts,
    Kind.MAP: _maps,
    Kind.FEATURES: _maps,
    Kind.CLASSES: _classes,
    Kind.EDGES: _edges,
    Kind.CROP: _crop_settings,
    Kind.GRID: _tokens,
    Kind.SEQUENCE: _tokens,
}
