"""Pictures decoded ahead of the networks: while a batch is labelled, the next are decoded and cropped.

Invariant: a picture is decoded once for all components and all crops of a stage, through the recorded crops only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from fourmill.pipeline import images
from fourmill.pipeline.component import Failure
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.shards import Shard

Picture = list[np.ndarray] | Failure | None  # uint8 (S, S, 3) per crop; None: quarantined at ingest
_AHEAD = 2  # chunks decoded or being decoded beyond the one in use


def decoded(
    chunks: Iterable[Sequence[int]], rgb: Shard, crops: Shard, count: int, size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[Sequence[int], dict[int, Picture]]]:
    """(rows, {row: Picture}) for each chunk in turn; `count` crops of `size` pixels, by the threads of `pool`."""

    def start(rows: Sequence[int]) -> tuple[Sequence[int], list[Future[Picture]]]:
        return rows, [pool.submit(_picture, rgb, crops, row, count, size) for row in rows]

    waiting: deque[tuple[Sequence[int], list[Future[Picture]]]] = deque()
    for rows in chunks:
        waiting.append(start(rows))
        if len(waiting) > _AHEAD:
            yield _collect(waiting.popleft())
    while waiting:
        yield _collect(waiting.popleft())


def _collect(started: tuple[Sequence[int], list[Future[Picture]]]) -> tuple[Sequence[int], dict[int, Picture]]:
    rows, futures = started
    return rows, {row: future.result() for row, future in zip(rows, futures, strict=True)}


def _picture(rgb: Shard, crops: Shard, row: int, count: int, size: int) -> Picture:
    data = rgb.value(row)
    recorded = [crops.value(row, c) for c in range(count)]
    if data is None or any(c is None for c in recorded):
        return None
    try:
        image = images.decode(data)
        return [apply_crop(image, Crop(*map(int, c)), size) for c in recorded]
    except images.BadImageError as error:
        return Failure(str(error))
