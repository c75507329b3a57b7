"""The report: one self-contained HTML page and one contact sheet that show whether a dataset makes sense.

For a dozen held-out samples: the picture, each label, the label decoded back from its tokens, what a trained 4M
predicts from RGB alone, and, for scenes, the truth. Everything from the corpus is escaped; nothing is fetched.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourmill.config import Config
from fourmill.pipeline import images, measures
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.inspect import ModalitySummary, summarise
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.pictures import FeaturePainter, box_picture, class_picture, contact_sheet, depth_picture
from fourmill.pipeline.shards import read_shard
from fourmill.pipeline.splits import is_held_out
from fourmill.pipeline.store import Store, open_store
from fourmill.tokenizers import TOKENIZERS

LABELS = ("depth", "semseg", "clip", "det", "caption", "alt_text")
PICTURED = ("rgb", "depth", "semseg", "clip", "det")
SOURCES = ("truth", "label", "decoded", "predicted")
HEADINGS = {
    "truth": "truth",
    "label": "label",
    "decoded": "decoded from tokens",
    "predicted": "4M from RGB alone",
}
_PREDICTION_STEPS = 1  # passes to fill a grid; for the demo's model more were no better (docs/LOG.md)
_MEASURED = 64  # held-out samples that figures are taken over; the dozen shown are the first of them


@dataclass
class SampleViews:
    """All views of one sample: `values[modality][source]`, sources as in `SOURCES`; `rgb` is uint8 (S, S, 3)."""

    key: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    def get(self, modality: str, source: str) -> Any:
        return self.values.get(modality, {}).get(source)

    def put(self, modality: str, source: str, value: Any) -> None:
        if value is not None:
            self.values.setdefault(modality, {})[source] = value


def write_report(
    dataset: str, out: str | Path, config: Config | None = None, checkpoint: str | None = None, count: int = 12
) -> tuple[Path, Path]:
    """Write the page at `out` and the contact sheet beside it; returns both paths.

    Tokens are decoded if `config` names their tokenizers; predictions are shown if `checkpoint` is a trained 4M.
    """
    store = open_store(dataset)
    manifest = read_manifest(store)
    samples = collect(store, manifest, checkpoint, max(count, _MEASURED))
    _add_truth(samples)
    decoders = _decoders(config)
    _add_decoded(samples, decoders)
    if checkpoint:
        _add_predictions(samples, checkpoint, decoders)
    page = Path(out)
    page.parent.mkdir(parents=True, exist_ok=True)
    sheet = page.with_suffix(".png")
    painted = _paint(samples[:count], samples)
    _sheet(painted).save(sheet)
    page.write_text(_page(dataset, manifest, samples, painted, _training(checkpoint)), encoding="utf-8")
    return page, sheet


def collect(store: Store, manifest: Manifest, checkpoint: str | None, count: int) -> list[SampleViews]:
    """The first `count` samples that training never saw (any, if nothing was trained), with labels and tokens."""
    wanted = _held_out(checkpoint)
    found: list[SampleViews] = []
    for shard in manifest.shards:
        if len(found) >= count:
            break
        names = {m: manifest.records[m, shard].name for m in manifest.modalities if (m, shard) in manifest.records}
        open_shards = {m: read_shard(store, name) for m, name in names.items()}
        for row, key in enumerate(open_shards["rgb"].keys):
            if len(found) < count and wanted(key):
                sample = _views(key, row, open_shards)
                if sample is not None:
                    found.append(sample)
    return found


def _held_out(checkpoint: str | None) -> Any:
    if checkpoint is None:
        return lambda key: True
    fraction = json.loads(_read(checkpoint, "pretrain.json"))["config"]["held_out"]
    return lambda key: is_held_out(key, fraction)


def _views(key: str, row: int, shards: Mapping[str, Any]) -> SampleViews | None:
    sample = SampleViews(key)
    data, crop = shards["rgb"].value(row), shards["crop_settings"].value(row) if "crop_settings" in shards else None
    if data is None or crop is None:
        return None
    size = _crop_size(shards)
    sample.put("rgb", "label", apply_crop(images.decode(data), Crop(*map(int, crop)), size))
    sample.put("crop", "label", Crop(*map(int, crop)))
    sample.put("source", "label", shards["source"].value(row))
    for name, shard in shards.items():
        if name in LABELS:
            sample.put(name, "label", shard.value(row))
        if shard.entry.is_tokens:
            sample.put(name, "tokens", shard.value(row))
    return sample


def _crop_size(shards: Mapping[str, Any]) -> int:
    """The side that labels were made at, from the recorded lineage of the crops."""
    return int(shards["crop_settings"].meta["producer"]["config"]["crops"]["size"])


def _add_truth(samples: Sequence[SampleViews]) -> None:
    """A scene's truth can be made again from its seed and index; other corpora have none."""
    from fourmill import scenes

    for sample in samples:
        origin = sample.get("source", "label").get("metadata", {}).get("scene")
        if not origin:
            continue
        scene = scenes.render(int(origin["seed"]), int(origin["index"]), int(origin["size"]))
        crop, size = sample.get("crop", "label"), sample.get("rgb", "label").shape[0]
        sample.put("depth", "truth", _cropped(scene.depth, crop, size))
        sample.put("semseg", "truth", _cropped(scene.semantic, crop, size))
        sample.put("caption", "truth", scene.caption)


def _cropped(array: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """Nearest-neighbour crop of a truth map (H, W): classes and depth edges must not be blended."""
    rows = crop.top + (np.arange(size) + 0.5) * crop.height / size
    columns = crop.left + (np.arange(size) + 0.5) * crop.width / size
    columns = columns[::-1] if crop.flip else columns
    return array[rows.astype(int)[:, None], columns.astype(int)[None, :]]


def _decoders(config: Config | None) -> dict[str, Any]:
    decoders: dict[str, Any] = {}
    for name, options in (config.tokenizers if config else {}).items():
        tokenizer = TOKENIZERS.build(name, options)
        tokenizer.load("cpu")
        decoders[name] = tokenizer
    return decoders


def _add_decoded(samples: Sequence[SampleViews], decoders: Mapping[str, Any]) -> None:
    for name, tokenizer in decoders.items():
        having = [s for s in samples if s.get(name, "tokens") is not None]
        if having:
            for sample, value in zip(having, tokenizer.decode([s.get(name, "tokens") for s in having]), strict=True):
                sample.put(tokenizer.source, "decoded", value)


def _add_predictions(samples: Sequence[SampleViews], checkpoint: str, decoders: Mapping[str, Any]) -> None:
    from fourmill.model.predict import load_model, predict

    model = load_model(checkpoint)
    pixels = np.stack([s.get("rgb", "label") for s in samples]).transpose(0, 3, 1, 2)
    targets = [name for name in model.architecture.domains_out if name in decoders]
    for name, tokens in predict(model, {"rgb": pixels}, targets, steps=_PREDICTION_STEPS).items():
        values = decoders[name].decode([np.asarray(row) for row in tokens])
        for sample, value in zip(samples, values, strict=True):
            sample.put(decoders[name].source, "predicted", value)


def _paint(shown: Sequence[SampleViews], reference: Sequence[SampleViews]) -> list[dict[tuple[str, str], np.ndarray]]:
    """For each sample, a picture for every (modality, source) that it has."""
    features = [s.get("clip", "label") for s in reference if s.get("clip", "label") is not None]
    painter = FeaturePainter(features) if features else None
    return [_paint_one(sample, painter) for sample in shown]


def _paint_one(sample: SampleViews, painter: FeaturePainter | None) -> dict[tuple[str, str], np.ndarray]:
    image = sample.get("rgb", "label")
    pictures: dict[tuple[str, str], np.ndarray] = {}
    reference = (
        sample.get("depth", "truth") if sample.get("depth", "truth") is not None else sample.get("depth", "label")
    )
    low, high = np.percentile(reference, [1, 99]) if reference is not None else (0.0, 1.0)
    for modality in PICTURED:
        for source, value in sample.values.get(modality, {}).items():
            if modality == "rgb":
                pictures[modality, source] = value
            elif modality == "depth":
                pictures[modality, source] = depth_picture(value, float(low), float(high))
            elif modality == "semseg":
                pictures[modality, source] = class_picture(value)
            elif modality == "clip" and painter is not None:
                pictures[modality, source] = painter.paint(value, len(image))
            elif modality == "det":
                pictures[modality, source] = box_picture(image, value)
    return pictures


def _sheet(painted: Sequence[Mapping[tuple[str, str], np.ndarray]]) -> Image.Image:
    columns = [(m, s) for m in PICTURED for s in SOURCES if any((m, s) in p for p in painted)]
    blank = np.full((8, 8, 3), 235, np.uint8)
    rows = [[pictures.get(column, blank) for column in columns] for pictures in painted]
    return contact_sheet(rows, [_short(m, s) for m, s in columns])


def _short(modality: str, source: str) -> str:
    if modality == "rgb" and source == "label":
        return "image"
    return f"{modality} {({'decoded': 'tokens', 'predicted': '4M'}).get(source, source)}"


def _read(folder: str, name: str) -> bytes:
    return open_store(folder).get(name)


def _training(checkpoint: str | None) -> dict[str, Any] | None:
    return json.loads(_read(checkpoint, "metrics.json")) if checkpoint else None


def _page(
    dataset: str,
    manifest: Manifest,
    samples: Sequence[SampleViews],
    painted: Sequence[Mapping[tuple[str, str], np.ndarray]],
    training: Mapping[str, Any] | None,
) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        dataset=dataset,
        manifest=manifest,
        modalities=[_line(m) for m in summarise(manifest)],
        lineage=json.dumps(manifest.producers, indent=1, sort_keys=True),
        measured=measures.table(samples),
        num_measured=len(samples),
        training=training,
        samples=[_card(s, p) for s, p in zip(samples[: len(painted)], painted, strict=True)],
        headings=HEADINGS,
        sources=SOURCES,
    )


def _line(m: ModalitySummary) -> dict[str, Any]:
    return {
        "name": m.name,
        "shards": m.shards,
        "rows": m.rows,
        "present": m.present,
        "megabytes": m.num_bytes / 1e6,
        "use": f"{m.used} of {m.vocabulary} (perplexity {m.perplexity:.0f})" if m.vocabulary else "",
        "quarantined": ", ".join(f"{n} x {r}" for r, n in m.quarantined.items()),
        "producer": "; ".join(str(p.get("class", "?")) for p in m.producers),
    }


def _card(sample: SampleViews, pictures: Mapping[tuple[str, str], np.ndarray]) -> dict[str, Any]:
    grid = {m: {s: _data_uri(pictures[m, s]) for s in SOURCES if (m, s) in pictures} for m in PICTURED}
    texts = {m: {s: v for s, v in sample.values.get(m, {}).items() if s in SOURCES} for m in ("alt_text", "caption")}
    return {
        "key": sample.key,
        "grid": {m: g for m, g in grid.items() if g},
        "texts": {m: t for m, t in texts.items() if t},
    }


def _data_uri(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
