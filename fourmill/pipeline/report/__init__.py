"""The report: one self-contained HTML page and one contact sheet: what a dataset is, and whether it makes sense.

Size, health, cost, errors, distributions and lineage come from the manifest, for any number of shards. For a dozen
held-out samples: the picture, each label, the label decoded back from its tokens, what a trained 4M predicts from RGB
alone, and, where it is known, the truth; and how good labels, tokens and predictions are in figures. Everything from
the corpus is escaped; nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourmill.config import Config
from fourmill.evaluate.labels import evaluate_labels
from fourmill.evaluate.page import section
from fourmill.evaluate.tokens.page import Loaded, tokens_section
from fourmill.evaluate.tokens.rebuild import producers_of
from fourmill.evaluate.tokens.run import evaluate_tokens, rebuild_all
from fourmill.evaluate.truth import TruthSource, open_truth
from fourmill.pipeline import measures
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.page import rendered, whole_page
from fourmill.pipeline.report.bins import Bins, binned
from fourmill.pipeline.report.charts import short
from fourmill.pipeline.report.cost import costs, history, over_time
from fourmill.pipeline.report.distributions import distributions
from fourmill.pipeline.report.errors import errors
from fourmill.pipeline.report.facts import described, duration, lines, percent, provenance, size, tiles
from fourmill.pipeline.report.health import SUMMARY, Check, checks, tally, worst
from fourmill.pipeline.report.lineage import graph, tree
from fourmill.pipeline.report.makers import makers, without_secrets
from fourmill.pipeline.report.presence import presence
from fourmill.pipeline.report.samples import SampleViews, add_decoded, add_predictions, add_truth, collect, held_out
from fourmill.pipeline.report.sheets import HEADINGS, Card, card, paint, sheet
from fourmill.pipeline.report.verified import verified
from fourmill.pipeline.store import Store, StoreError, open_store

_MEASURED = 64  # held-out samples that figures are taken over; those shown are among them
_CONTENTS = (
    ("dataset", "dataset"),
    ("health", "health"),
    ("cost", "throughput and cost"),
    ("errors", "errors"),
    ("values", "codes and values"),
    ("presence", "what is there"),
    ("samples", "samples"),
    ("lineage", "lineage"),
)


@dataclass
class _Looked:
    """What was found by looking at samples; `remarks`: what could not be shown, and why."""

    samples: list[SampleViews]
    loaded: Loaded
    labels_section: Any = ""
    tokens_section: Any = ""
    training: Mapping[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)


def write_report(
    dataset: str,
    out: str | Path,
    config: Config | None = None,
    checkpoint: str | None = None,
    count: int = 12,
    truth: str | None = None,
    snapshot: int | None = None,
    verification: str | Path | None = None,
) -> tuple[Path, Path]:
    """Write the page at `out` and the contact sheet beside it; returns both paths.

    Tokens are decoded by the tokenizers of `config`, else by those that the manifest names; predictions are shown if
    `checkpoint` is a trained 4M. `truth`: where it lies; without it, that of scenes. `snapshot`: by default the newest.
    `verification`: output of `manifest verify --json`, or the journal of a deep one.
    """
    store = open_store(dataset)
    manifest = read_manifest(store, snapshot)
    asked = None if verification is None else verified(verification, manifest)
    looked = _look(store, manifest, dataset, config, checkpoint, max(count, _MEASURED), truth)
    page = Path(out)
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = page.with_suffix(".png")
    shown = sorted(looked.samples[:count], key=lambda s: (s.shard, s.row))
    painted = paint(shown, looked.samples)
    sheet(painted).save(pictures)
    cards = [card(s, p) for s, p in zip(shown, painted, strict=True)]
    body = _body(store, manifest, looked, cards, asked)
    page.write_text(whole_page(f"{_title(manifest)} · Fourmill", body), encoding="utf-8")
    return page, pictures


def _look(
    store: Store,
    manifest: Manifest,
    dataset: str,
    config: Config | None,
    checkpoint: str | None,
    count: int,
    truth: str | None,
) -> _Looked:
    """Samples with everything that is known of them, and how good it is in figures."""
    wanted, source = held_out(checkpoint), open_truth(truth)
    loaded = rebuild_all(manifest, producers_of(manifest), config)
    samples, problems = collect(store, manifest, wanted, count)
    looked = _Looked(samples, loaded, remarks=problems)
    looked.remarks += [f"tokens are not shown decoded: {why}" for why in _reasons(loaded)]
    add_truth(looked.samples, source)
    add_decoded(looked.samples, loaded)
    if checkpoint:
        add_predictions(looked.samples, checkpoint, loaded)
        looked.training = json.loads(open_store(checkpoint).get("metrics.json"))
    if samples:
        _measure(looked, dataset, manifest, config, wanted, truth, source)
    return looked


def _measure(
    looked: _Looked,
    dataset: str,
    manifest: Manifest,
    config: Config | None,
    wanted: Callable[[str], bool],
    truth: str | None,
    source: TruthSource,
) -> None:
    """The sections with figures, over the shards that samples were taken from; or why there are none, which must not
    cost a reader the rest of the page."""
    chosen: dict[str, Any] = {
        "count": _MEASURED,
        "wanted": wanted,
        "snapshot": manifest.snapshot,
        "shards": {sample.shard for sample in looked.samples},
    }
    try:
        labels = evaluate_labels(dataset, truth, **chosen)
        looked.labels_section = section(labels, source) if labels.ok else ""
        if looked.loaded:
            tokens = evaluate_tokens(dataset, truth, config=config, rebuilt=looked.loaded, **chosen)
            looked.tokens_section = tokens_section(tokens, looked.loaded)
    except (OSError, ValueError, StoreError) as error:
        looked.remarks.append(f"Labels and tokens are not measured: {error}")


def _reasons(loaded: Loaded) -> list[str]:
    return sorted({found for found in loaded.values() if isinstance(found, str)})


def _body(store: Store, manifest: Manifest, looked: _Looked, cards: Sequence[Card], asked: Check | None) -> Any:
    template = Path(__file__).parent / "report.html.j2"
    words = {"percent": percent, "size": size, "short": short, "duration": duration, "headings": HEADINGS}
    return rendered(template, **words, **_of_samples(looked, cards), **_of_manifest(store, manifest, asked))


def _of_manifest(store: Store, manifest: Manifest, asked: Check | None) -> dict[str, Any]:
    """What the sections show that need no object."""
    found, bins, spread = makers(manifest), binned(manifest), distributions(manifest)
    modalities, moments = lines(manifest, found), history(store, manifest)
    order = [line.name for line in modalities]
    tokens = {name for name in spread if described(name)[0] in ("grid", "sequence")}
    answers = checks(manifest, found, spread, asked)
    return {
        "title": _title(manifest),
        "dataset": without_secrets(store.uri),
        "manifest": manifest,
        "tiles": tiles(manifest),
        "provenance": provenance(manifest),
        "lines": modalities,
        "checks": answers,
        "verdict": worst(answers),
        "verdict_words": SUMMARY[worst(answers)],
        "tally": tally(answers),
        "costs": costs(found, bins),
        "span": _span(bins),
        "over_time": over_time(moments),
        "moments": moments,
        "errors": errors(manifest, order),
        "code_distributions": [spread[name] for name in order if name in tokens],
        "value_distributions": [spread[name] for name in order if name in spread and name not in tokens],
        "presence": presence(manifest, bins, order),
        "makers": found,
        "tree": tree(found),
        "graph": graph(found, _corpus_name(manifest)) if found else "",
        "lineage_json": without_secrets(json.dumps(manifest.producers, indent=1, sort_keys=True)),
    }


def _of_samples(looked: _Looked, cards: Sequence[Card]) -> dict[str, Any]:
    """What the sections show of samples, and which sections there are."""
    measured = measures.table(looked.samples)
    sections = {
        "labels": looked.labels_section,
        "tokens": looked.tokens_section,
        "predictions": measured,
        "training": looked.training,
    }
    return {
        "contents": [*_CONTENTS, *((name, name) for name, shown in sections.items() if shown)],
        "cards": cards,
        "remarks": looked.remarks,
        "labels_section": looked.labels_section,
        "tokens_section": looked.tokens_section,
        "measured": measured,
        "num_measured": len(looked.samples),
        "training": looked.training,
        "trained": looked.training is not None,
    }


def _title(manifest: Manifest) -> str:
    return without_secrets(manifest.store.uri.rstrip("/").rpartition("/")[2]) or "dataset"


def _corpus_name(manifest: Manifest) -> str:
    sources = manifest.corpus.get("sources") or ["not recorded"]
    return without_secrets(", ".join(map(str, sources)))


def _span(bins: Mapping[str, Bins]) -> tuple[int, int]:
    """The first and the last shard of all."""
    edges = next((b.edges for b in bins.values()), None)
    return (0, 0) if edges is None or not len(edges) else (int(edges[0]), int(edges[-1]) - 1)
