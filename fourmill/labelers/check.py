"""`fourmill labelers check ID`: one teacher, loaded and run on one photo, timed, checked and drawn.

What a user wants to know before a night of GPU time: does this checkpoint load here, is its output what the modality
promises, what does it look like, how fast is it. The picture goes through the same crop, component and convention
checks as in a run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.labelers import LABELERS
from fourmill.labelers.catalogue import ENTRIES, entry
from fourmill.modalities import Kind, modality, unknown
from fourmill.pipeline import codecs, conventions, images
from fourmill.pipeline.component import Batch, Component, Failure
from fourmill.pipeline.geometry import CropConfig, apply_crop, draw_crops

_SURE = 0.5  # boxes below this score are listed but not drawn


@dataclass
class Checked:
    """What came of it. `outputs`: modality -> a line about the value; `problems`: modality -> what is wrong with it."""

    id: str
    device: str
    checkpoint: str
    licence: str
    load_s: float
    batch: int
    image_s: float
    gflops: float
    megabytes: float
    outputs: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    picture: str | None = None

    def __str__(self) -> str:
        speed = f"{self.image_s * 1e3:.1f} ms an image in batches of {self.batch} on {self.device}"
        lines = [
            f"{self.id}: {self.checkpoint or 'no checkpoint'} (weights: {self.licence})",
            f"  loaded in {self.load_s:.1f} s; {speed}",
            f"  {self.gflops:.1f} GFLOP and {self.megabytes:.0f} MB of activations an image",
        ]
        lines += [f"  {name}: {what}" for name, what in self.outputs.items()]
        lines += [f"  PROBLEM {name}: {what}" for name, what in self.problems.items()]
        return "\n".join([*lines, *([f"  picture: {self.picture}"] if self.picture else [])])


def check(
    id: str, image: str | None = None, out: str | None = None, options: Mapping[str, Any] | None = None,
    size: int = 224, batch: int = 4,
) -> Checked:  # fmt: skip
    """Run the teacher `id`: a line of the catalogue, or a labeler's name with a `checkpoint` among `options`.

    `image`: a picture file; by default a rendered scene, which only the demo's teachers understand. `out`: the PNG.
    ValueError for an unknown id, a picture that cannot be read and a checkpoint that cannot be loaded.
    """
    from fourmill.labelers.cost import measure

    labeler = _build(id, dict(options or {}))
    device = _device()
    start = time.perf_counter()
    labeler.load(device)
    load_s = time.perf_counter() - start
    pixels, crop = _pixels(image, size)
    one, many = _batch(labeler, pixels, crop, 1), _batch(labeler, pixels, crop, batch)
    cost = measure(lambda: labeler.run(one))
    labeler.run(many)
    start = time.perf_counter()
    made = labeler.run(many)
    seconds = (time.perf_counter() - start) / batch
    weights = getattr(labeler, "checkpoint", None)
    reference, licence = (weights.reference, weights.licence) if weights else ("", "none")
    gflops, megabytes = cost.flops / 1e9, cost.peak_bytes / 1e6
    checked = Checked(id, device, reference, licence, load_s, batch, seconds, gflops, megabytes)
    values = {name: _examine(checked, labeler, name, found[0]) for name, found in made.items()}
    if out:
        checked.picture = str(_draw(pixels, values, Path(out)))
    return checked


def _build(id: str, options: dict[str, Any]) -> Component:
    known = {e.id for e in ENTRIES}
    if id in known:
        configuration = {**entry(id).configuration, **options}
    elif id in LABELERS.table or ":" in id:
        configuration = {"kind": id, **options}
    else:
        raise ValueError(unknown("teacher", id, [*known, *LABELERS.table]))
    built = LABELERS.build(configuration["kind"], configuration)
    if built.reads != ("rgb",):
        raise ValueError(f"{id} reads {', '.join(built.reads)}, not a picture alone; run it in a stage to see it work")
    return built


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _pixels(image: str | None, size: int) -> tuple[np.ndarray, Any]:
    """uint8 (S, S, 3), the centre square, as crop 0 of any run."""
    if image is None:
        from fourmill.scenes import render

        scene = render(10, 2, size).image
        return scene, draw_crops("scene", size, size, CropConfig(size=max(size, 16)))[0]
    try:
        picture = images.decode(Path(image).read_bytes())
    except (OSError, images.BadImageError) as error:
        raise ValueError(f"cannot use the picture {image}: {error}") from error
    crop = draw_crops(image, picture.height, picture.width, CropConfig(size=size))[0]
    return apply_crop(picture, crop, size), crop


def _batch(labeler: Component, pixels: np.ndarray, crop: Any, count: int) -> Batch:
    stacked = np.stack([pixels.transpose(2, 0, 1)] * count)
    views = {name: [None] * count for name in labeler.also_reads}
    return Batch([f"photo {i}" for i in range(count)], stacked, views, [crop] * count)


def _examine(checked: Checked, labeler: Component, name: str, value: Any) -> Any:
    """Record what the value is like; returns it as a reader would see it, None if it would be quarantined."""
    entry = modality(name)
    if isinstance(value, Failure):
        checked.problems[name] = value.reason
        return None
    try:
        settled = codecs.settle(entry, value)
        conventions.check(entry, labeler.spec(name), settled)
    except ValueError as error:
        checked.problems[name] = str(error)
        return None
    checked.outputs[name] = _words(settled, labeler.spec(name).convention)
    return settled


def _words(value: Any, convention: str | None) -> str:
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, list):
        names = [_name(item) for item in value]
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        return f"{len(value)} ({shown})" if value else "none found"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    array = np.asarray(value)
    kind = f", {convention}" if convention else ""
    return f"{array.dtype} {array.shape}, {array.min():.4g} to {array.max():.4g}{kind}"


def _short(item: Any) -> str:
    return " ".join(map(_hex, item)) if isinstance(item, list) else f"{item:g}"


def _hex(colour: Sequence[int]) -> str:
    return "#" + bytes(colour).hex()


def _name(item: Mapping[str, Any]) -> str:
    score = f" {item['score']:.2f}" if "score" in item else ""
    return str(item.get("class_name", item.get("text", "mask"))) + score


def _draw(pixels: np.ndarray, values: Mapping[str, Any], out: Path) -> Path:
    """The photo and each label beside it."""
    from fourmill.pipeline.pictures import contact_sheet

    vectors = {n for n, v in values.items() if isinstance(v, np.ndarray) and v.ndim == 1}  # nothing to look at
    drawn = {n: _picture(n, v, pixels) for n, v in values.items() if v is not None and n not in vectors}
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet([[pixels, *drawn.values()]], ["photo", *drawn], cell=max(224, len(pixels))).save(out)
    return out


def _picture(name: str, value: Any, pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of one label, as the report draws it."""
    from fourmill.pipeline import pictures

    if name == "depth":
        return pictures.depth_picture(value, float(np.min(value)), float(np.max(value)))
    if name in _DRAWN_ALONE:
        return np.asarray(getattr(pictures, _DRAWN_ALONE[name])(value))
    if name == "det":
        return pictures.box_picture(pixels, [item for item in value if item["score"] >= _SURE])
    if name in _DRAWN_OVER:
        return np.asarray(getattr(pictures, _DRAWN_OVER[name])(pixels, value))
    if modality(name).kind is Kind.FEATURES:
        return pictures.FeaturePainter([value]).paint(value, len(pixels))
    return pictures.text_picture(value if isinstance(value, str) else "\n".join(str(item["text"]) for item in value))


_DRAWN_ALONE = {
    "normal": "normal_picture",
    "semseg": "class_picture",
    "canny_edge": "edge_picture",
    "color_palette": "palette_picture",
    "metadata": "facts_picture",
}
_DRAWN_OVER = dict.fromkeys(("panoptic", "instance", "sam_instance"), "segments_picture")
