"""The evaluation of tokens as HTML: figures, use of codes, bits, and the worst reconstructions beside their labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.evaluate.page import Card
from fourmill.evaluate.results import Place, shown, title
from fourmill.evaluate.tokens.rebuild import Rebuilt
from fourmill.evaluate.tokens.results import TokenEvaluation, TokenScore
from fourmill.evaluate.tokens.rows import Rows
from fourmill.evaluate.tokens.sources import Backdrop, painted, reference_of
from fourmill.modalities import modality
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.page import data_uri, rendered, whole_page
from fourmill.pipeline.store import Store, open_store

Loaded = Mapping[tuple[str, str], Rebuilt | str]
_GREY = 128


def page_of(evaluation: TokenEvaluation, loaded: Loaded) -> str:
    """The whole page. `loaded`: the tokenizers that the evaluation was made with."""
    return whole_page(f"Tokens of {evaluation.dataset}", tokens_section(evaluation, loaded))


def tokens_section(evaluation: TokenEvaluation, loaded: Loaded, with_worst: bool = True) -> Any:
    """The section 'tokens against labels', for a page."""
    worst = _worst(evaluation, loaded) if with_worst else {}
    bars = {(s.modality, s.producer): _bars(s) for s in evaluation.scores}
    template = Path(__file__).parent / "page.html.j2"
    return rendered(template, evaluation=evaluation, worst=worst, bars=bars, title=title, shown=shown)


def _bars(score: TokenScore) -> list[tuple[float, float, float, float]]:
    """x, y, width, height of the bars of a histogram in a box of 128 x 32: the highest bar fills it."""
    bars = score.use.bars
    if not bars:
        return []
    width = 128 / len(bars)
    heights = [32 * bar / max(bars) for bar in bars]
    return [(round(i * width, 2), round(32 - h, 2), round(width, 2), round(h, 2)) for i, h in enumerate(heights)]


def _worst(evaluation: TokenEvaluation, loaded: Loaded) -> dict[str, list[Card]]:
    store = open_store(evaluation.dataset)
    manifest = read_manifest(store, evaluation.snapshot)
    found: dict[str, list[Card]] = {}
    for score in evaluation.scores:
        cards = [_card(store, manifest, score, place, loaded) for place in score.worst if place.badness > 0]
        if shown_cards := [card for card in cards if card.pictures or card.texts]:
            found[f"{score.modality}, {score.producer}"] = shown_cards
    return found


def _card(store: Store, manifest: Manifest, score: TokenScore, at: Place, loaded: Loaded) -> Card:
    """A value decoded again and painted beside its label."""
    rows = Rows(store, manifest, at.shard)
    source = str(modality(score.modality).source)
    card = Card(at.key, at.crop, at.badness)
    record = manifest.record(score.modality, at.shard)
    rebuilt = loaded[score.modality, record.producer] if record is not None else None
    assert isinstance(rebuilt, Rebuilt)
    ((value, _),) = rebuilt.restore([rows.value(score.modality, at.row, at.crop)])
    label = rows.label(source, at.row, at.crop)
    if isinstance(value, str):
        card.texts = [("label", str(label)), ("decoded", value)]
        return card
    picture = rows.picture(at.row, at.crop)
    size = rows.size or 224
    backdrop = np.full((size, size, 3), _GREY, np.uint8) if picture is None else picture
    on = Backdrop(backdrop, reference_of(source, [label, value]))
    drawn = [("label", painted(source, label, on)), ("decoded", painted(source, value, on))]
    if picture is not None and source != "rgb":
        drawn = [("image", picture), *drawn]
    card.pictures = [(heading, data_uri(pixels)) for heading, pixels in drawn if pixels is not None]
    return card
