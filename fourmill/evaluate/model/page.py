"""The evaluation of a model as HTML: the table, and of each modality the worst, middle and best samples pictured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourmill.evaluate.model.results import (
    HEADINGS,
    TOKEN_HEADINGS,
    ModalityScore,
    all_remarks,
    cells,
    figure_title,
    headline,
    token_cells,
)
from fourmill.evaluate.model.run import Evaluated
from fourmill.evaluate.model.views import HEADINGS as WHO
from fourmill.evaluate.model.views import painters, views_of
from fourmill.evaluate.page import Card
from fourmill.pipeline.page import data_uri, rendered, whole_page

_NOT_PICTURED = ("clip_global",)


def page_of(found: Evaluated) -> str:
    """The whole page."""
    return whole_page(f"{found.evaluation.checkpoint} on {found.evaluation.dataset}", section(found))


def section(found: Evaluated) -> Any:
    """The section 'the model against truth', for a page."""
    evaluation = found.evaluation
    cards = {score.modality: _cards(found, score) for score in evaluation.scores if score.places}
    return rendered(
        Path(__file__).parent / "page.html.j2",
        evaluation=evaluation,
        headline=headline(evaluation),
        headings=HEADINGS,
        token_headings=TOKEN_HEADINGS,
        remarks=all_remarks(evaluation),
        shown={name: parts for name, parts in cards.items() if parts},
        cells=cells,
        token_cells=token_cells,
        figure_title=figure_title,
    )


def _cards(found: Evaluated, score: ModalityScore) -> dict[str, list[Card]]:
    """'worst', 'median' and 'best' with their samples painted."""
    if score.modality in _NOT_PICTURED:
        return {}
    output = next(output for output in found.outputs if output.name == score.tokens)
    places = [place for part in score.places.values() for place in part]
    views = views_of(found, places, [output])
    axes = painters(views)
    made = []
    for place, (view,) in zip(places, views, strict=True):
        pictures = view.pictures(axes.get(score.modality))
        drawn = [("photo", data_uri(view.sample.image)), *((WHO[who], data_uri(p)) for who, p in pictures.items())]
        made.append(Card(place.key, 0, place.badness, drawn, view.texts()))
    cards = iter(made)
    return {part: [next(cards) for _ in places] for part, places in score.places.items()}
