"""The report: one self-contained HTML page and one contact sheet that show whether a dataset makes sense.

For a dozen held-out samples: the picture, each label, the label decoded back from its tokens, what a trained 4M
predicts from RGB alone, and, where it is known, the truth; and how good labels, tokens and predictions are in figures.
Everything from the corpus is escaped; nothing is fetched.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourmill.config import Config
from fourmill.evaluate.labels import crop_size, evaluate_labels
from fourmill.evaluate.page import section, true_objects, true_segments
from fourmill.evaluate.tokens.page import Loaded, tokens_section
from fourmill.evaluate.tokens.rebuild import Rebuilt, producers_of
from fourmill.evaluate.tokens.run import evaluate_tokens, rebuild_all
from fourmill.evaluate.tokens.sources import SOURCES as TOKEN_SOURCES
from fourmill.evaluate.tokens.sources import Backdrop, painted, reference_of
from fourmill.evaluate.truth import PARTS, Truth, TruthSource, open_truth
from fourmill.modalities import Kind, modality
from fourmill.pipeline import images, measures
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.inspect import ModalitySummary, summarise
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.page import data_uri, rendered, whole_page
from fourmill.pipeline.pictures import contact_sheet, segments_picture, text_picture
from fourmill.pipeline.shards import read_shard
from fourmill.pipeline.splits import is_held_out
from fourmill.pipeline.store import Store, open_store

_FIRST = ("rgb", "depth", "normal", "semseg", "panoptic", "instance", "sam_instance", "det", "clip")
PICTURED = (*_FIRST, *(name for name, kind in TOKEN_SOURCES.items() if kind.draw and name not in _FIRST))
LABELS = (*PICTURED[1:], "caption", "alt_text")
SOURCES = ("truth", "label", "decoded", "predicted")
HEADINGS = {
    "truth": "truth",
    "label": "label",
    "decoded": "decoded from tokens",
    "predicted": "4M from RGB alone",
}
_NOT_ON_SHEET = {("instance", "truth"), ("det", "truth"), ("sam_instance", "truth")}  # the sheet would be too wide
_PREDICTION_STEPS = 1  # passes to fill a grid; for the demo's model more were no better (docs/LOG.md)
_MEASURED = 64  # held-out samples that figures are taken over; the dozen shown are the first of them


@dataclass
class SampleViews:
    """All views of one sample at its first crop: `values[modality][source]`, sources as in `SOURCES`; `rgb` is uint8
    (S, S, 3). `producers`: who made each modality's value."""

    key: str
    crop: Crop
    producers: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    def get(self, modality: str, source: str) -> Any:
        return self.values.get(modality, {}).get(source)

    def put(self, modality: str, source: str, value: Any) -> None:
        if value is not None:
            self.values.setdefault(modality, {})[source] = value


def write_report(
    dataset: str,
    out: str | Path,
    config: Config | None = None,
    checkpoint: str | None = None,
    count: int = 12,
    truth: str | None = None,
) -> tuple[Path, Path]:
    """Write the page at `out` and the contact sheet beside it; returns both paths.

    Tokens are decoded by the tokenizers of `config`, else by those that the manifest names; predictions are shown if
    `checkpoint` is a trained 4M. `truth`: where it lies; without it, that of scenes.
    """
    store = open_store(dataset)
    manifest = read_manifest(store)
    wanted = _held_out(checkpoint)
    samples = collect(store, manifest, wanted, max(count, _MEASURED))
    source = open_truth(truth)
    _add_truth(samples, source)
    loaded = rebuild_all(manifest, producers_of(manifest), config)
    _add_decoded(samples, loaded)
    if checkpoint:
        _add_predictions(samples, checkpoint, loaded)
    page = Path(out)
    page.parent.mkdir(parents=True, exist_ok=True)
    sheet = page.with_suffix(".png")
    shown = _paint(samples[:count], samples)
    _sheet(shown).save(sheet)
    against_truth = _labels_section(dataset, truth, source, wanted)
    tokens = _tokens_section(dataset, truth, config, wanted, loaded)
    body = _body(dataset, manifest, samples, shown, _training(checkpoint), against_truth, tokens)
    page.write_text(whole_page("Fourmill report", body), encoding="utf-8")
    return page, sheet


def _labels_section(dataset: str, truth: str | None, source: TruthSource, wanted: Callable[[str], bool]) -> Any:
    """The figures of labels, and the worst of them; nothing if there is no truth."""
    evaluation = evaluate_labels(dataset, truth, count=_MEASURED, wanted=wanted)
    return section(evaluation, source) if evaluation.ok else ""


def _tokens_section(
    dataset: str, truth: str | None, config: Config | None, wanted: Callable[[str], bool], loaded: Loaded
) -> Any:
    """The figures of tokens, the use of their codes, and the worst of them; nothing if there are none."""
    if not loaded:
        return ""
    found = evaluate_tokens(dataset, truth, count=_MEASURED, config=config, wanted=wanted, rebuilt=loaded)
    return tokens_section(found, loaded)


def collect(store: Store, manifest: Manifest, wanted: Callable[[str], bool], count: int) -> list[SampleViews]:
    """The first `count` of the wanted samples that have a picture, with labels and tokens."""
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
                    sample.producers = {m: manifest.records[m, shard].producer for m in names}
                    found.append(sample)
    return found


def _held_out(checkpoint: str | None) -> Callable[[str], bool]:
    """Which keys training never saw; all, if nothing was trained."""
    if checkpoint is None:
        return lambda key: True
    fraction = json.loads(_read(checkpoint, "pretrain.json"))["config"]["held_out"]
    return lambda key: is_held_out(key, fraction)


def _views(key: str, row: int, shards: Mapping[str, Any]) -> SampleViews | None:
    data, found = shards["rgb"].value(row), shards["crop_settings"].value(row) if "crop_settings" in shards else None
    if data is None or found is None:
        return None
    crop = Crop(*map(int, found))
    sample = SampleViews(key, crop)
    size = crop_size(shards["crop_settings"])
    sample.put("rgb", "label", apply_crop(images.decode(data), crop, size))
    sample.put("source", "label", shards["source"].value(row))
    for name, shard in shards.items():
        if name in LABELS:
            sample.put(name, "label", shard.value(row))
        if shard.entry.is_tokens:
            sample.put(name, "tokens", shard.value(row))
    return sample


def _add_truth(samples: Sequence[SampleViews], source: TruthSource) -> None:
    """What the source knows of each sample; truth that is unusable is told by the evaluation."""
    for sample in samples:
        described = sample.get("source", "label")
        with contextlib.suppress(ValueError):
            truth = source.find(sample.key, described, frozenset(PARTS))
            if truth is not None:
                size = sample.get("rgb", "label").shape[0]
                _put_truth(sample, truth.moved(sample.crop, described["height"], described["width"], size))


def _put_truth(sample: SampleViews, truth: Truth) -> None:
    for name in ("depth", "normal", "semseg"):
        sample.put(name, "truth", getattr(truth, name))
    if truth.panoptic is not None:
        sample.put("panoptic", "truth", true_segments(truth))
    if truth.objects is not None:
        objects = true_objects(truth)
        sample.put("det", "truth", objects)
        if all("mask" in o for o in objects):
            sample.put("instance", "truth", objects)
            sample.put("sam_instance", "truth", [{**o, "class_name": ""} for o in objects])
    if truth.captions:
        sample.put("caption", "truth", truth.captions[0])


def _add_decoded(samples: Sequence[SampleViews], loaded: Loaded) -> None:
    """Tokens decoded by whoever made them; what cannot be decoded is told in the section on tokens."""
    for (name, producer), rebuilt in loaded.items():
        having = [s for s in samples if s.get(name, "tokens") is not None and s.producers[name] == producer]
        if having and isinstance(rebuilt, Rebuilt):
            found = rebuilt.restore_each([s.get(name, "tokens") for s in having])
            for sample, value in zip(having, found, strict=True):
                if not isinstance(value, Exception):
                    sample.put(rebuilt.tokenizer.source, "decoded", value[0])


def _add_predictions(samples: Sequence[SampleViews], checkpoint: str, loaded: Loaded) -> None:
    from fourmill.model.predict import load_model, predict

    model = load_model(checkpoint)
    pixels = np.stack([s.get("rgb", "label") for s in samples]).transpose(0, 3, 1, 2)
    decoders = {name: rebuilt for (name, _), rebuilt in loaded.items() if isinstance(rebuilt, Rebuilt)}
    targets = [name for name in model.architecture.domains_out if name in decoders]
    for name, tokens in predict(model, {"rgb": pixels}, targets, steps=_PREDICTION_STEPS).items():
        found = decoders[name].restore_each([np.asarray(row) for row in tokens])
        for sample, value in zip(samples, found, strict=True):
            if not isinstance(value, Exception):
                sample.put(decoders[name].tokenizer.source, "predicted", value[0])


def _paint(shown: Sequence[SampleViews], reference: Sequence[SampleViews]) -> list[dict[tuple[str, str], np.ndarray]]:
    """For each sample, a picture for every (modality, source) that it has."""
    features = [name for name in PICTURED if modality(name).kind is Kind.FEATURES]
    painters = {n: reference_of(n, [v for s in reference if (v := s.get(n, "label")) is not None]) for n in features}
    return [_paint_one(sample, painters) for sample in shown]


def _paint_one(sample: SampleViews, painters: Mapping[str, Any]) -> dict[tuple[str, str], np.ndarray]:
    image = sample.get("rgb", "label")
    pictures: dict[tuple[str, str], np.ndarray] = {}
    for name in PICTURED:
        views = {source: value for source in SOURCES if (value := sample.get(name, source)) is not None}
        on = Backdrop(image, painters[name] if name in painters else reference_of(name, list(views.values())))
        for source, value in views.items():
            picture = segments_picture(image, value) if name == "panoptic" else painted(name, value, on)
            if picture is not None:
                pictures[name, source] = picture
    for source, text in sample.values.get("caption", {}).items():
        if source in SOURCES:
            pictures["caption", source] = text_picture(str(text))
    return pictures


def _sheet(painted: Sequence[Mapping[tuple[str, str], np.ndarray]]) -> Image.Image:
    columns = [(m, s) for m in (*PICTURED, "caption") for s in SOURCES if any((m, s) in p for p in painted)]
    columns = [column for column in columns if column not in _NOT_ON_SHEET]
    blank = np.full((8, 8, 3), 235, np.uint8)
    rows = [[pictures.get(column, blank) for column in columns] for pictures in painted]
    return contact_sheet(rows, [_short(m, s) for m, s in columns])


def _short(modality: str, source: str) -> str:
    if modality == "rgb" and source == "label":
        return "image"
    return f"{modality.removesuffix('_instance')} {({'decoded': 'tokens', 'predicted': '4M'}).get(source, source)}"


def _read(folder: str, name: str) -> bytes:
    return open_store(folder).get(name)


def _training(checkpoint: str | None) -> dict[str, Any] | None:
    return json.loads(_read(checkpoint, "metrics.json")) if checkpoint else None


def _body(
    dataset: str,
    manifest: Manifest,
    samples: Sequence[SampleViews],
    painted: Sequence[Mapping[tuple[str, str], np.ndarray]],
    training: Mapping[str, Any] | None,
    against_truth: Any,
    tokens: Any,
) -> Any:
    return rendered(
        Path(__file__).parent / "report.html.j2",
        labels_section=against_truth,
        tokens_section=tokens,
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
    grid = {m: {s: data_uri(pictures[m, s]) for s in SOURCES if (m, s) in pictures} for m in PICTURED}
    texts = {m: {s: v for s, v in sample.values.get(m, {}).items() if s in SOURCES} for m in ("alt_text", "caption")}
    return {
        "key": sample.key,
        "grid": {m: g for m, g in grid.items() if g},
        "texts": {m: t for m, t in texts.items() if t},
    }
