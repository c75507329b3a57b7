"""Raw pixels of the samples of a batch: decoded by threads, kept in memory if all of them fit.

Legend: B samples, S side in pixels.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fourmill.model.config import PIXELS
from fourmill.model.data.source import Source
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.images import BadImageError, decode
from fourmill.pipeline.shards import Shard, open_shard

log = logging.getLogger(__name__)

_DECODERS = 8  # threads; Pillow releases the interpreter lock while it decodes and resizes
_OPEN_SHARDS = 4096  # memory maps at once
_NEW, _THERE, _ABSENT = 0, 1, 2


class Pictures:
    """Crops of a source's pictures. `problems` counts those that cannot be decoded, by reason."""

    def __init__(self, source: Source, side: int, crops: int, cache_bytes: int, problems: Counter[str]) -> None:
        self.source, self.side, self.problems = source, side, problems
        self.has_S = source.has(PIXELS)
        self.most = _OPEN_SHARDS if source.window is None else 2 * source.window
        status = np.zeros((int(source.rows.sum()), crops), dtype=np.uint8)
        fits = status.size * 3 * side * side <= cache_bytes
        # Room for every decoded crop; untouched pages cost nothing.
        self._cache = np.zeros((*status.shape, 3, side, side), dtype=np.uint8) if fits else None
        self._status = status if fits else np.zeros((0, 0), np.uint8)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_DECODERS, "decode")

    def batch(
        self,
        samples_B: np.ndarray,
        crops_B: np.ndarray,
        place_B: np.ndarray,
        row_B: np.ndarray,
        square_B5: np.ndarray,
        has_square_B: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (B, 3, S, S), zero where there is no picture or no recorded crop; bool (B,) tells where there is."""
        out_B3SS = np.zeros((len(samples_B), 3, self.side, self.side), dtype=np.uint8)
        kept = self._cache is not None
        seen_B = self._status[samples_B, crops_B] if kept else np.full(len(samples_B), _NEW, np.uint8)
        seen_B[~has_square_B | ~self.has_S[place_B]] = _ABSENT
        todo = np.flatnonzero(seen_B == _NEW)
        hits = np.flatnonzero(seen_B == _THERE)
        for i, pixels in zip(
            todo, self._pool.map(self._decode, place_B[todo], row_B[todo], square_B5[todo]), strict=True
        ):
            seen_B[i] = _ABSENT if pixels is None else _THERE
            if pixels is not None:
                out_B3SS[i] = pixels
        if self._cache is not None:
            out_B3SS[hits] = self._cache[samples_B[hits], crops_B[hits]]
            self._cache[samples_B[todo], crops_B[todo]] = out_B3SS[todo]
            self._status[samples_B[todo], crops_B[todo]] = seen_B[todo]
        return out_B3SS, seen_B == _THERE

    def _decode(self, place: int, row: int, square_5: np.ndarray) -> np.ndarray | None:
        data = self._shard(int(place)).value(int(row))
        if data is None:
            return None
        try:
            square = apply_crop(decode(data), Crop(*(int(v) for v in square_5)), self.side)
        except BadImageError as error:
            self.problems[str(error).split(":", 1)[0]] += 1
            log.warning(
                "shard %d row %d: the picture cannot be used: %s", self.source.numbers[int(place)], int(row), error
            )
            return None
        return np.ascontiguousarray(square.transpose(2, 0, 1))

    def _shard(self, place: int) -> Shard:
        """An open shard; those used longest ago are closed again."""
        with self._lock:
            found = self._open.pop(place, None)
            if found is None:
                data = self.source.open(PIXELS, place)
                found = open_shard(data, f"{PIXELS} shard {self.source.numbers[place]} of {self.source.uri}")
            self._open[place] = found
            while len(self._open) > self.most:
                self._open.popitem(last=False)
            return found
