"""The evaluation as HTML: figures of every teacher, and its worst labels pictured beside the truth and the error."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.evaluate.dense import DepthMeasure, SemsegMeasure, angles
from fourmill.evaluate.labels import crop_size, crops_of
from fourmill.evaluate.results import Evaluation, LabelScore, Place, shown, title
from fourmill.evaluate.truth import PARTS, DepthFiles, Truth, TruthSource, open_truth
from fourmill.modalities import modality
from fourmill.pipeline import images, masks
from fourmill.pipeline.geometry import apply_crop
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.page import data_uri, rendered, whole_page
from fourmill.pipeline.pictures import (
    box_picture,
    class_picture,
    depth_picture,
    error_picture,
    normal_picture,
    segments_picture,
)
from fourmill.pipeline.shards import Spec, read_shard
from fourmill.pipeline.store import Store, open_store

_HIGH_ABSREL, _HIGH_ANGLE = 0.5, 60.0  # errors that are drawn in the brightest colour
Pictures = list[tuple[str, np.ndarray]]


@dataclass
class Card:
    """One of the worst labels: where it stands, its pictures as data URIs, its texts."""

    key: str
    crop: int
    badness: float
    pictures: list[tuple[str, str]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)


def write_page(evaluation: Evaluation, out: str | Path, truth: str | None, depth_files: DepthFiles) -> Path:
    """Write the page of one evaluation at `out`."""
    page = Path(out)
    page.parent.mkdir(parents=True, exist_ok=True)
    body = section(evaluation, open_truth(truth, depth_files))
    page.write_text(whole_page(f"Labels of {evaluation.dataset}", body), encoding="utf-8")
    return page


def section(evaluation: Evaluation, source: TruthSource) -> Any:
    """The section 'labels against truth', for a page."""
    store = open_store(evaluation.dataset)
    manifest = read_manifest(store, evaluation.snapshot)
    worst = {
        f"{s.modality}, {s.producer}": [_card(store, manifest, source, s, place) for place in s.worst]
        for s in evaluation.scores
        if s.worst and modality(s.modality).name != "clip_global"
    }
    template = Path(__file__).parent / "labels.html.j2"
    return rendered(template, evaluation=evaluation, worst=worst, title=title, shown=shown)


def _card(store: Store, manifest: Manifest, source: TruthSource, score: LabelScore, at: Place) -> Card:
    """A value read again and painted."""
    records = {m: manifest.record(m, at.shard) for m in ("rgb", "source", "crop_settings", score.modality)}
    shards = {m: read_shard(store, record.name) for m, record in records.items() if record is not None}
    described, size = shards["source"].value(at.row), crop_size(shards["crop_settings"])
    crop = dict(crops_of(at.row, described, shards["crop_settings"]))[at.crop]
    image = apply_crop(images.decode(shards["rgb"].value(at.row)), crop, size)
    truth = source.find(at.key, described, frozenset(PARTS))
    assert truth is not None  # it was found when the figures were taken
    truth = truth.moved(crop, described["height"], described["width"], size)
    label = shards[score.modality].value(at.row, at.crop)
    card = Card(at.key, at.crop, at.badness)
    name = modality(score.modality).name
    painted = [("image", image), *paint(name, image, label, truth, shards[score.modality].spec, source)]
    card.pictures = [(heading, data_uri(picture)) for heading, picture in painted]
    if name in ("caption", "captions"):
        texts = [label] if isinstance(label, str) else [f"{c['text']} ({c['source']})" for c in label]
        card.texts = [("label", " · ".join(texts)), ("truth", " · ".join(truth.captions))]
    return card


def paint(name: str, image: np.ndarray, label: Any, truth: Truth, spec: Spec, source: TruthSource) -> Pictures:
    """Label, truth and, where it can be drawn, the error."""
    if name == "depth" and truth.depth is not None:
        return _depth(DepthMeasure(spec, source, len(image)), label, truth)
    if name == "normal" and truth.normal is not None:
        known = truth.normal.any(axis=0) & label.any(axis=0)
        error = error_picture(angles(label, truth.normal), _HIGH_ANGLE, known)
        label, right = normal_picture(label), normal_picture(truth.normal)
        return [("label", label), ("truth", right), (f"error, 0 to {_HIGH_ANGLE:.0f} degrees", error)]
    if name == "semseg" and truth.semseg is not None:
        measure = SemsegMeasure(spec, source, len(image))
        wrong, known = measure.wrong(label, truth.semseg)
        pictures = [class_picture(measure.translated(label)), class_picture(truth.semseg)]
        return [*zip(("label", "truth"), pictures, strict=True), ("wrong", error_picture(wrong, 1.0, known))]
    if name == "det":
        return [("label", box_picture(image, label)), ("truth", box_picture(image, true_objects(truth)))]
    if name in ("panoptic", "instance", "sam_instance"):
        segments = true_segments(truth) if name == "panoptic" else true_objects(truth)
        return [("label", segments_picture(image, label)), ("truth", segments_picture(image, segments))]
    return []


def _depth(measure: DepthMeasure, label: np.ndarray, truth: Truth) -> Pictures:
    aligned = measure.aligned(label, truth)
    assert aligned is not None
    assert truth.depth is not None
    known = (aligned > 0) & (truth.depth > 0)
    low, high = np.percentile(truth.depth[known], [1, 99])
    error = np.abs(aligned - truth.depth) / np.maximum(truth.depth, 1e-3)
    pictures = [depth_picture(m, float(low), float(high)) for m in (aligned, truth.depth)]
    heading = f"|d - t| / t, 0 to {_HIGH_ABSREL}"
    return [("label", pictures[0]), ("truth", pictures[1]), (heading, error_picture(error, _HIGH_ABSREL, known))]


def true_objects(truth: Truth) -> list[dict[str, Any]]:
    """True things in the form of labels, for pictures; masks only where all have one."""
    objects = [o for o in truth.objects or () if not o.crowd]
    with_masks = all(o.mask is not None for o in objects)
    return [
        {"class_name": o.class_name, "score": 1.0, "box": list(o.box)}
        | ({"mask": masks.encode(o.mask)} if with_masks and o.mask is not None else {})
        for o in objects
    ]


def true_segments(truth: Truth) -> list[dict[str, Any]]:
    """True segments in the form of labels, for pictures."""
    if truth.panoptic is None:
        return []
    found = [(s.class_name, truth.panoptic == s.number) for s in truth.segments]
    return [{"class_name": name, "score": 1.0, "mask": masks.encode(mask)} for name, mask in found if mask.any()]
