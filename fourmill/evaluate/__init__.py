"""How good labels are: `fourmill evaluate labels` compares a dataset's labels with truth, in each field's own figures.

    truth.py, truth_*.py   what is right, from scenes, COCO annotations or an NYUv2 folder, moved into the recorded crop
    dense.py               depth, normals, semantic classes
    panoptic.py            panoptic quality
    objects.py             detections, instances, SAM's masks: COCO's average precision and recall
    words.py               captions, and retrieval by CLIP embeddings
    labels.py              the pass over a dataset's shards
    results.py, page.py    what it found: typed, as JSON, as a table, as HTML with the worst samples pictured

And what tokens keep of labels: `fourmill evaluate tokens`, `fourmill decode`.

    tokens_rebuild.py      tokenizers brought back from a manifest
    tokens_sources.py      the table of modalities: how a reconstruction is measured, drawn and written
    tokens_dense.py, tokens_rgb.py, tokens_objects.py, tokens_words.py    the measures
    tokens_codes.py        use of codes, and bits
    tokens_rows.py         rows of a shard side by side, and which rows are looked at
    tokens.py, tokens_tally.py            the pass over a dataset's shards
    tokens_results.py, tokens_page.py     what it found
    tokens_decode.py       one sample's tokens as files

Invariant: nothing is left out silently. Values that are missing, quarantined, without truth or unusable are counted,
and classes that only one side knows are listed.

And what a trained model predicts: `fourmill evaluate model`, the package `model`.
"""

from __future__ import annotations

from fourmill.evaluate.labels import evaluate_labels
from fourmill.evaluate.results import Evaluation, LabelScore
from fourmill.evaluate.truth import Truth, TruthSource, open_truth

__all__ = ["Evaluation", "LabelScore", "Truth", "TruthSource", "evaluate_labels", "open_truth"]
