"""A dataset as the trainer sees it: tokens of all modalities joined by row, split by key, checked before use.

Everything that would pair a label with another sample's picture, or mix two generations of a label, is refused when the
dataset is opened: records are compared, not trusted to agree. Opening reads the manifest and, to split, the keys; of a
sample 4 bytes stay in memory, whatever the number of modalities.

Legend: B samples, L cells of a grid, T longest text, S side in pixels.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from fourmill.modalities import Kind, modality
from fourmill.model.batch import RawBatch
from fourmill.model.checks import CROPS
from fourmill.model.config import FIRST_SENTINEL, PIXELS, ModalityInfo
from fourmill.model.data.opened import OpenShards
from fourmill.model.data.options import DataConfig
from fourmill.model.data.pictures import Pictures
from fourmill.model.data.source import Source, in_threads
from fourmill.model.data.splits import held_out
from fourmill.model.data.tars import open_source
from fourmill.pipeline.shards import Spec, open_shard
from fourmill.pipeline.store import StoreSettings

log = logging.getLogger(__name__)


class TokenDataset:
    """Samples of a dataset, numbered over all its shards. `train` and `held_out` are int32 arrays of those numbers,
    ascending (int64 above 2^31 samples).

    ValueError says which modality or shard is unfit: unknown or not tokens, absent, of mixed generations, keys or
    vocabularies that differ, ids beyond the vocabulary. Pickles as it was opened, to the same samples even if the
    dataset has grown since; works in a forked process; safe to use from threads.
    """

    def __init__(self, uri: str, config: DataConfig, storage: StoreSettings | None = None) -> None:
        self.config = config
        names = (*config.names, *((CROPS,) if PIXELS in config.names else ()))
        self.source: Source = open_source(uri, names, config, storage)
        self.uri, self.digest, self.specs = self.source.uri, self.source.digest, self.source.specs
        self.infos = {name: _info(name, self.specs[name], config) for name in config.names}
        self.crops = _crops(self.specs)
        self.starts = np.concatenate([[0], np.cumsum(self.source.rows)])  # of each shard, and the end
        self.problems: Counter[str] = Counter()
        self._number()
        self._open_shards()

    def _open_shards(self) -> None:
        """What belongs to this process: maps, locks, threads."""
        tokens = [name for name in self.specs if name != PIXELS]
        window = self.source.window
        # Of copies in a bounded folder no more stay open than are in use: the disk keeps what is mapped.
        self.shards = OpenShards(self.source, tokens, None if window is None else 3 * window)
        self._pictures: tuple[int, Pictures] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("shards", "_pictures")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_shards()

    def __len__(self) -> int:
        """Samples, with those held out or left out."""
        return int(self.starts[-1])

    def _number(self) -> None:
        """Split the samples, and apply the policy for missing labels."""
        is_held = held_out(self.source, self.config.held_out, self.config.shard_cache)
        is_whole = self._complete()
        if self.config.missing == "error" and not is_whole.all():
            place, row = self.place(np.flatnonzero(~is_whole)[:1])
            where = f"shard {self.source.numbers[place[0]]} row {row[0]}"
            raise ValueError(f"{int((~is_whole).sum())} samples lack a label, the first at {where}; missing: error")
        dtype = np.int32 if len(self) < 1 << 31 else np.int64
        self.train = np.flatnonzero(is_whole & ~is_held).astype(dtype)
        self.held_out = np.flatnonzero(is_whole & is_held).astype(dtype)
        self.left_out = int((~is_whole).sum())
        if not len(self.train):
            raise ValueError(f"{self.uri} has no sample to train on: {len(self)} samples, {is_whole.sum()} usable")
        if self.left_out:
            log.warning("%s: %d samples lack a label and are left out", self.uri, self.left_out)

    def _complete(self) -> np.ndarray:
        """Which samples have every modality. Only shards with gaps are opened; under the policy 'mask' none is."""
        whole = np.ones(len(self), dtype=bool)
        for name in self.specs if self.config.missing != "mask" else ():
            gaps = np.flatnonzero(self.source.present(name) < self.source.rows)
            valid = in_threads(partial(self._valid, name), gaps.tolist(), self.config.shard_cache.threads)
            for place, rows in zip(gaps, valid, strict=True):
                whole[self.starts[place] : self.starts[place + 1]] &= rows
        return whole

    def _valid(self, name: str, place: int) -> np.ndarray | bool:
        """Which rows of a shard hold a value in every crop."""
        if not self.source.has(name)[place]:
            return False
        shard = open_shard(self.source.open(name, place), f"{name} shard {self.source.numbers[place]} of {self.uri}")
        crops = range(self.crops if modality(name).per_crop else 1)
        return np.logical_and.reduce([shard.valid(crop) for crop in crops])

    def missing(self) -> dict[str, int]:
        """Rows without a value, by modality, over all shards."""
        absent = {name: len(self) - int(self.source.present(name).sum()) for name in self.config.names}
        return {name: count for name, count in absent.items() if count}

    def place(self, samples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples' shards, by place, and rows."""
        place_B = np.searchsorted(self.starts, samples_B, side="right") - 1
        return place_B, samples_B - self.starts[place_B]

    def some(self, part: Literal["train", "held_out"], count: int, rng: np.random.Generator) -> np.ndarray:
        """Up to `count` numbers of samples, drawn at random; of few shards where each must be fetched."""
        samples = self.train if part == "train" else self.held_out
        if self.source.window is None:
            return rng.permutation(samples)[:count]
        shards = np.split(samples, np.searchsorted(samples, self.starts[1:-1]))
        chosen = [rng.permutation(shards[place]) for place in rng.permutation(len(shards))]
        return np.concatenate(chosen)[:count]

    def batch(
        self,
        samples_B: np.ndarray,
        crops_B: np.ndarray,
        state: dict[str, int] | None = None,
        *,
        with_pixels: bool = True,
    ) -> RawBatch:
        """Raw tokens of the samples with these numbers, each at its crop; pixels only on demand, as they cost most.

        IndexError for a number or a crop that there is not.
        """
        samples_B, crops_B = self._checked(samples_B, crops_B)
        place_B, row_B = self.place(samples_B)
        tokens, lengths, present, pixels = {}, {}, {}, None
        with self.shards.lock:
            self.shards.need(np.unique(place_B))
            keys = self.shards.keys(place_B, row_B)
            for name, info in self.infos.items():
                if info.kind == "grid":
                    tokens[name], present[name] = self.shards.grids(name, place_B, row_B, crops_B)
                elif info.kind == "sequence":
                    tokens[name], lengths[name], present[name] = self.shards.texts(
                        name, info.tokens, place_B, row_B, crops_B
                    )
            squares = self.shards.grids(CROPS, place_B, row_B, crops_B) if PIXELS in self.infos else None
        if squares is not None:
            present[PIXELS] = squares[1]
            if with_pixels:
                pixels, present[PIXELS] = self.pictures.batch(samples_B, crops_B, place_B, row_B, *squares)
        return RawBatch(
            keys,
            {name: torch.from_numpy(ids) for name, ids in tokens.items()},
            {name: torch.from_numpy(length_B) for name, length_B in lengths.items()},
            {name: torch.from_numpy(present[name]) for name in present},
            None if pixels is None else torch.from_numpy(pixels),
            state or {},
        )

    def _checked(self, samples_B: np.ndarray, crops_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As int64. Values become addresses, so none may be out of range."""
        for what, values, end in (("sample", samples_B, len(self)), ("crop", crops_B, self.crops)):
            if len(values) and not (values.min() >= 0 and values.max() < end):
                raise IndexError(f"{self.uri}: {what} {values.min()} or {values.max()}; they go from 0 to {end - 1}")
        return np.asarray(samples_B, np.int64), np.asarray(crops_B, np.int64)

    @property
    def pictures(self) -> Pictures:
        """Made anew in a forked process, whose parent's threads are not there."""
        if self._pictures is None or self._pictures[0] != os.getpid():
            side, size = self.config.image_size, self.config.cache_bytes
            self._pictures = os.getpid(), Pictures(self.source, side, self.crops, size, self.problems)
        return self._pictures[1]

    def keys(self, samples_B: np.ndarray) -> list[str]:
        """The samples' keys; of the shards' objects nothing else is read."""
        place_B, row_B = self.place(self._checked(samples_B, np.zeros(0))[0])
        known = {place: self.source.keys(place) for place in np.unique(place_B).tolist()}
        return [known[place][row] for place, row in zip(place_B.tolist(), row_B.tolist(), strict=True)]

    def close(self) -> None:
        """Stop downloads in threads."""
        self.source.close()


def _info(name: str, spec: Spec, config: DataConfig) -> ModalityInfo:
    entry, side = modality(name), config.image_size // config.patch_size
    if name == PIXELS:
        return ModalityInfo(kind="pixels", tokens=side * side, grid=(side, side))
    assert spec.vocabulary is not None
    if entry.kind is Kind.GRID:
        assert spec.length is not None
        return ModalityInfo(kind="grid", vocabulary=spec.vocabulary, tokens=spec.length, grid=spec.grid)
    if spec.vocabulary < FIRST_SENTINEL + config.num_sentinels:
        raise ValueError(
            f"{name} has {spec.vocabulary} ids, too few for num_sentinels {config.num_sentinels}, which take"
            f" the ids {FIRST_SENTINEL} to {FIRST_SENTINEL + config.num_sentinels - 1}"
        )
    longest = (config.max_tokens or {}).get(name, entry.tokens or 256)
    return ModalityInfo(kind="sequence", vocabulary=spec.vocabulary, tokens=longest)


def _crops(specs: dict[str, Spec]) -> int:
    """Recorded crops, the same number for every modality that has one value for each."""
    counts = {name: spec.crops for name, spec in specs.items() if modality(name).per_crop}
    if len(set(counts.values())) > 1:
        raise ValueError(f"modalities differ in their number of crops: {counts}")
    return max(counts.values(), default=1)
