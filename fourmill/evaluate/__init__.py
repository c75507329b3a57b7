"""How good labels are: `fourmill evaluate labels` compares a dataset's labels with truth, in each field's own figures.

    truth.py, truth_*.py   what is right, from scenes, COCO annotations or an NYUv2 folder, moved into the recorded crop
    dense.py               depth, normals, semantic classes
    panoptic.py            panoptic quality
    objects.py             detections, instances, SAM's masks: COCO's average precision and recall
    words.py               captions, and retrieval by CLIP embeddings
    labels.py              the pass over a dataset's shards
    results.py, page.py    what it found: typed, as JSON, as a table, as HTML with the worst samples pictured

Invariant: nothing is left out silently. Values that are missing, quarantined, without truth or unusable are counted,
and classes that only one side knows are listed.
"""

from __future__ import annotations

from fourmill.evaluate.labels import evaluate_labels
from fourmill.evaluate.results import Evaluation, LabelScore
from fourmill.evaluate.truth import Truth, TruthSource, open_truth

__all__ = ["Evaluation", "LabelScore", "Truth", "TruthSource", "evaluate_labels", "open_truth"]
