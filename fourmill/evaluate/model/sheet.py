"""A contact sheet of held-out samples: the photo, then truth, teacher and 4M of each modality. One row a sample."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fourmill.evaluate.model.run import Evaluated
from fourmill.evaluate.model.views import HEADINGS, painters, views_of
from fourmill.evaluate.results import Place
from fourmill.pipeline.pictures import contact_sheet
from fourmill.pipeline.splits import held_out_rank

_ROWS = 6
_CELL = 112  # pixels
_PICTURED = ("depth", "normal", "semseg", "det", "clip")
_SHORT = {"normal": "normals", "semseg": "classes", "det": "boxes", "clip": "CLIP"}
_BLANK = np.full((8, 8, 3), 235, np.uint8)


def sheet_of(found: Evaluated, rows: int = _ROWS) -> Image.Image:
    """The sheet. The samples are those of lowest rank, not chosen by how good they are. ValueError if there is nothing
    to picture."""
    outputs = [output for name in _PICTURED for output in found.outputs if output.source == name]
    keys = found.reader.keys(found.chosen)
    at = [(number, row) for number, row_numbers in found.chosen.items() for row in row_numbers]
    ranked = sorted(zip(keys, at, strict=True), key=lambda pair: held_out_rank(pair[0]))
    places = [Place(key, *where, 0, 0.0) for key, where in ranked if where in found.ids][:rows]
    if not outputs or not places:
        raise ValueError(f"--picture: none of {', '.join(_PICTURED)} was predicted of any sample")
    views = views_of(found, places, outputs)
    axes = painters(views)
    drawn = [[view.pictures(axes.get(view.output.source)) for view in row] for row in views]
    columns = [(i, who) for i in range(len(outputs)) for who in HEADINGS if any(who in row[i] for row in drawn)]
    table = [
        [row[0].sample.image, *(pictures[i].get(who, _BLANK) for i, who in columns)]
        for row, pictures in zip(views, drawn, strict=True)
    ]
    headings = [f"{_SHORT.get(outputs[i].source, outputs[i].source)}: {HEADINGS[who]}" for i, who in columns]
    return contact_sheet(table, ["photo", *headings], _CELL)
