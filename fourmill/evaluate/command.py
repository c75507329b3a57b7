"""`fourmill evaluate labels`: what the command does, once its arguments are read."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fourmill.evaluate.labels import evaluate_labels
from fourmill.evaluate.results import print_table
from fourmill.evaluate.truth import DepthFiles


def run_evaluate_labels(
    dataset: str,
    truth: str | None = None,
    labels: Sequence[str] | None = None,
    count: int | None = None,
    out: str | None = None,
    as_json: bool = False,
    depth_per_metre: float = 1000.0,
    eigen_crop: bool = True,
) -> int:
    """Print figures as a table or as JSON, write the page at `out`; 1 if nothing could be compared, else 0."""
    files = DepthFiles(depth_per_metre, eigen_crop)
    evaluation = evaluate_labels(dataset, truth, labels, count, depth_files=files)
    if as_json:
        print(json.dumps(evaluation.to_json(), indent=1))
    else:
        print_table(evaluation)
    if out:
        from fourmill.evaluate.page import write_page

        page = write_page(evaluation, out, truth, files)
        if not as_json:
            print(f"report: {page}")
    return 0 if evaluation.ok else 1
