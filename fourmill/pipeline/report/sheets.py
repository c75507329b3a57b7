"""Samples as contact sheets: each view drawn as people expect it, with the scale or the legend that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fourmill.evaluate.tokens.sources import Backdrop, painted, reference_of
from fourmill.modalities import Kind, modality
from fourmill.pipeline.page import data_uri
from fourmill.pipeline.pictures import class_colour, contact_sheet, depth_ramp, segments_picture, text_picture
from fourmill.pipeline.report.makers import without_secrets
from fourmill.pipeline.report.samples import PICTURED, SOURCES, TEXTS, SampleViews

HEADINGS = {
    "truth": "truth",
    "label": "label",
    "decoded": "decoded from tokens",
    "predicted": "4M from RGB alone",
}
_NOT_ON_SHEET = {("instance", "truth"), ("det", "truth"), ("sam_instance", "truth")}  # the sheet would be too wide
_VOID = 255
_FACTS = "metadata"
_LONGEST_NAME = 40  # letters of a class in a legend
_UNITS = {"metric": "m", "relative": "(up to scale)", "inverse": "(inverse depth)"}
Pictures = Mapping[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class View:
    """One modality of one sample. `figures`: (heading, data URI, alternative text); `ramp`: (low, CSS gradient, high);
    `legend`: (colour, class name)."""

    name: str
    figures: tuple[tuple[str, str, str], ...]
    ramp: tuple[str, str, str] | None = None
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Card:
    """One sample on the page. `texts`: (modality, heading, text). `facts`: numbers by name, a column a source, under
    `fact_headings`."""

    key: str
    place: str
    origin: str
    views: tuple[View, ...]
    texts: tuple[tuple[str, str, str], ...]
    fact_headings: tuple[str, ...] = ()
    facts: tuple[tuple[str, tuple[str, ...]], ...] = ()


def paint(shown: Sequence[SampleViews], reference: Sequence[SampleViews]) -> list[Pictures]:
    """For each sample a picture of every (modality, source) that it has; features by the axes of all `reference`."""
    features = [name for name in PICTURED if modality(name).kind is Kind.FEATURES]
    painters = {n: reference_of(n, [v for s in reference if (v := s.get(n, "label")) is not None]) for n in features}
    return [_paint_one(sample, painters) for sample in shown]


def _paint_one(sample: SampleViews, painters: Mapping[str, Any]) -> Pictures:
    image = sample.get("rgb", "label")
    pictures: dict[tuple[str, str], np.ndarray] = {}
    for name in PICTURED:
        views = _views(sample, name)
        on = Backdrop(image, painters[name] if name in painters else reference_of(name, list(views.values())))
        for source, value in views.items():
            picture = segments_picture(image, value) if name == "panoptic" else painted(name, value, on)
            if picture is not None:
                pictures[name, source] = picture
    for source, text in sample.values.get("caption", {}).items():
        if source in SOURCES:
            pictures["caption", source] = text_picture(str(text))
    return pictures


def _views(sample: SampleViews, name: str) -> dict[str, Any]:
    return {source: value for source in SOURCES if (value := sample.get(name, source)) is not None}


def sheet(shown: Sequence[Pictures]) -> Image.Image:
    """All samples in one picture, a row each."""
    columns = [(m, s) for m in (*PICTURED, "caption") for s in SOURCES if any((m, s) in p for p in shown)]
    columns = [column for column in columns if column not in _NOT_ON_SHEET]
    blank = np.full((8, 8, 3), 235, np.uint8)
    rows = [[pictures.get(column, blank) for column in columns] for pictures in shown]
    return contact_sheet(rows, [_short(m, s) for m, s in columns])


def _short(name: str, source: str) -> str:
    if name == "rgb" and source == "label":
        return "image"
    return f"{name.removesuffix('_instance')} {({'decoded': 'tokens', 'predicted': '4M'}).get(source, source)}"


def card(sample: SampleViews, pictures: Pictures) -> Card:
    """A sample as the page shows it."""
    views = tuple(view for name in PICTURED if name != _FACTS and (view := _view(sample, name, pictures)).figures)
    texts = [(m, HEADINGS[s], str(v)) for m in TEXTS for s in SOURCES if (v := sample.get(m, s)) is not None]
    described = sample.get("source", "label") or {}
    origin = str(described.get("url") or described.get("origin") or "") if isinstance(described, Mapping) else ""
    headings, facts = _facts(sample)
    place = f"shard {sample.shard}, row {sample.row}"
    return Card(sample.key, place, without_secrets(origin), views, tuple(texts), headings, facts)


def _facts(sample: SampleViews) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """Metadata as a table, which is easier read than a picture of one."""
    views = {s: v for s, v in _views(sample, _FACTS).items() if isinstance(v, Mapping)}
    names = dict.fromkeys(name for value in views.values() for name in value)
    rows = ((name, tuple(f"{v[name]:g}" if name in v else "–" for v in views.values())) for name in names)
    return tuple(HEADINGS[s] for s in views), tuple(rows)


def _view(sample: SampleViews, name: str, pictures: Pictures) -> View:
    figures = tuple(
        (_heading(name, source), data_uri(pictures[name, source]), f"{name}, {_heading(name, source)}")
        for source in SOURCES
        if (name, source) in pictures
    )
    return View(name, figures, _ramp(sample, name), _legend(sample, name))


def _heading(name: str, source: str) -> str:
    return "picture" if (name, source) == ("rgb", "label") else HEADINGS[source]


def _ramp(sample: SampleViews, name: str) -> tuple[str, str, str] | None:
    """What the colours of a depth map stand for: the range that `sources` draws it in."""
    views = _views(sample, name)
    if name != "depth" or not views:
        return None
    source, value = next(iter(views.items()))
    low, high = (float(v) for v in np.percentile(value, [1, 99]))
    convention = "metric" if source == "truth" else sample.specs["depth"].convention if "depth" in sample.specs else ""
    return f"{low:.2g}", depth_ramp(), f"{high:.2g} {_UNITS.get(convention or '', '')}".strip()


def _legend(sample: SampleViews, name: str) -> tuple[tuple[str, str], ...]:
    """The classes that occur in any view of a class map."""
    spec, views = sample.specs.get(name), _views(sample, name)
    if modality(name).kind is not Kind.CLASSES or not views or spec is None or not spec.classes:
        return ()
    ids = sorted({int(i) for value in views.values() for i in np.unique(value)} - {_VOID})
    return tuple((class_colour(i), _class_name(spec.classes, i)) for i in ids)


def _class_name(names: Sequence[str], index: int) -> str:
    name = names[index] if index < len(names) else f"class {index}"
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
