"""A dataset as the trainer sees it: tokens of all modalities joined by row, split by key, checked before use.

Everything that would pair a label with another sample's picture, or mix two generations of a label, is refused when the
dataset is opened: records are compared, not trusted to agree.

Legend: B samples, L cells of a grid, T longest text, S side in pixels.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fourmill.modalities import Kind, modality
from fourmill.model.batch import RawBatch
from fourmill.model.checks import CROPS, check
from fourmill.model.config import FIRST_SENTINEL, PIXELS, ModalityInfo
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.images import BadImageError, decode
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.shards import Shard, Spec, digest, read_shard
from fourmill.pipeline.splits import is_held_out
from fourmill.pipeline.store import StoreSettings, open_store

log = logging.getLogger(__name__)

_OPEN_SHARDS = 4096  # memory maps at once; Linux allows a process 65,530
_DECODERS = 8  # threads; Pillow releases the interpreter lock while it decodes and resizes


@dataclass(frozen=True)
class DataConfig:
    """Which part of a dataset is read and how; fields as in `PretrainConfig`."""

    names: tuple[str, ...]
    image_size: int
    patch_size: int = 16
    held_out: float = 0.125
    missing: Literal["mask", "error", "skip"] = "mask"
    mixed_generations: bool = False
    max_tokens: Mapping[str, int] | None = None
    num_sentinels: int = 200
    cache_bytes: int = 512 << 20


class TokenDataset:
    """Samples of a dataset, numbered over all its shards. `train` and `held_out` are int64 arrays of those numbers.

    ValueError says which modality or shard is unfit: unknown or not tokens, absent, of mixed generations, keys or
    vocabularies that differ, ids beyond the vocabulary.
    """

    def __init__(self, uri: str, config: DataConfig, storage: StoreSettings | None = None) -> None:
        self.config, self.store = config, open_store(uri, storage)
        manifest = read_manifest(self.store)
        self._reads = (*config.names, *((CROPS,) if PIXELS in config.names else ()))
        check(manifest, self._reads, uri, config.mixed_generations)
        self.records = {(r.modality, r.shard): r for name in self._reads for r in manifest.records(name)}
        self.specs = {name: Spec.from_json(next(manifest.records(name)).spec) for name in self._reads}
        self.infos = {name: self._info(name) for name in config.names}
        self.crops = self._crops()
        self.digest = digest(*(f"{r.name} {r.digest}" for _, r in sorted(self.records.items())))
        self._open: OrderedDict[tuple[str, int], Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_DECODERS, "decode")
        self.problems: Counter[str] = Counter()
        self._number()
        self._cache, self._cached = self._pixel_cache()

    def _info(self, name: str) -> ModalityInfo:
        entry, spec, side = modality(name), self.specs[name], self.config.image_size // self.config.patch_size
        if name == PIXELS:
            return ModalityInfo(kind="pixels", tokens=side * side, grid=(side, side))
        assert spec.vocabulary is not None
        if entry.kind is Kind.GRID:
            assert spec.length is not None
            return ModalityInfo(kind="grid", vocabulary=spec.vocabulary, tokens=spec.length, grid=spec.grid)
        if spec.vocabulary < FIRST_SENTINEL + self.config.num_sentinels:
            raise ValueError(
                f"{name} has {spec.vocabulary} ids, too few for num_sentinels {self.config.num_sentinels}, which take"
                f" the ids {FIRST_SENTINEL} to {FIRST_SENTINEL + self.config.num_sentinels - 1}"
            )
        longest = (self.config.max_tokens or {}).get(name, entry.tokens or 256)
        return ModalityInfo(kind="sequence", vocabulary=spec.vocabulary, tokens=longest)

    def _crops(self) -> int:
        """Recorded crops, the same number for every modality that has one value for each."""
        counts = {name: spec.crops for name, spec in self.specs.items() if modality(name).per_crop}
        if len(set(counts.values())) > 1:
            raise ValueError(f"modalities differ in their number of crops: {counts}")
        return max(counts.values(), default=1)

    def _number(self) -> None:
        """Number the samples, split them, and apply the policy for missing labels."""
        shards, rows, held, whole = [], [], [], []
        for number in sorted({shard for _, shard in self.records}):
            name = next(n for n in self._reads if (n, number) in self.records)
            keys = self.shard(name, number).keys  # type: ignore[union-attr]
            shards.append(np.full(len(keys), number))
            rows.append(np.arange(len(keys)))
            held.append(np.array([is_held_out(key, self.config.held_out) for key in keys], dtype=bool))
            whole.append(self._complete(number, len(keys)))
        self.shard_of, self.row_of = np.concatenate(shards), np.concatenate(rows)
        is_held, is_whole = np.concatenate(held), np.concatenate(whole)
        if self.config.missing == "error" and not is_whole.all():
            first = int(np.flatnonzero(~is_whole)[0])
            where = f"shard {self.shard_of[first]} row {self.row_of[first]}"
            raise ValueError(f"{int((~is_whole).sum())} samples lack a label, the first at {where}; missing: error")
        kept = is_whole if self.config.missing == "skip" else np.ones_like(is_whole)
        self.train, self.held_out = np.flatnonzero(kept & ~is_held), np.flatnonzero(kept & is_held)
        self.left_out = int((~kept).sum())
        if not len(self.train):
            raise ValueError(f"{self.store.uri} has no sample to train on: {len(kept)} samples, {kept.sum()} usable")
        if self.left_out:
            log.warning("%s: %d samples lack a label and are left out", self.store.uri, self.left_out)

    def _complete(self, number: int, rows: int) -> np.ndarray:
        """Which rows have every modality; not looked up under the policy 'mask', where it does not matter."""
        complete = np.ones(rows, dtype=bool)
        if self.config.missing == "mask":
            return complete
        for name in self._reads:
            shard = self.shard(name, number)
            for crop in range(self.crops if modality(name).per_crop else 1):
                complete &= shard.valid(crop) if shard is not None else False
        return complete

    def missing(self) -> dict[str, int]:
        """Rows without a value, by modality, over all shards."""
        total = len(self.shard_of)
        present: Counter[str] = Counter()
        for (name, _), record in self.records.items():
            present[name] += record.present
        return {name: total - present[name] for name in self.config.names if present[name] < total}

    def shard(self, name: str, number: int) -> Shard | None:
        """An open shard, None where the modality has none; the least used are closed again."""
        record = self.records.get((name, number))
        if record is None:
            return None
        with self._lock:
            found = self._open.pop((name, number), None) or read_shard(self.store, record.name)
            self._open[name, number] = found
            while len(self._open) > 1 and not self._may_stay_open():
                self._open.popitem(last=False)
            return found

    def _may_stay_open(self) -> bool:
        if self.store.local_path("any") is not None:
            return len(self._open) <= _OPEN_SHARDS
        return sum(s.data.size for s in self._open.values()) <= self.config.cache_bytes

    def batch(
        self,
        samples_B: np.ndarray,
        crops_B: np.ndarray,
        state: dict[str, int] | None = None,
        *,
        with_pixels: bool = True,
    ) -> RawBatch:
        """Raw tokens of the samples with these numbers, each at its crop; pixels only on demand, as they cost most."""
        tokens, lengths, present = {}, {}, {}
        for name, info in self.infos.items():
            if info.kind == "grid":
                tokens[name], present[name] = self._grids(name, info, samples_B, crops_B)
            elif info.kind == "sequence":
                tokens[name], lengths[name], present[name] = self._texts(name, info, samples_B, crops_B)
        pixels = None
        if PIXELS in self.infos and with_pixels:
            pixels, present[PIXELS] = self._pixels(samples_B, crops_B)
        elif PIXELS in self.infos:
            present[PIXELS] = self._has_picture(samples_B, crops_B)
        return RawBatch(self.keys(samples_B), tokens, lengths, present, pixels, state or {})

    def keys(self, samples_B: np.ndarray) -> list[str]:
        """The samples' keys."""
        found = [""] * len(samples_B)
        for number, places in self._by_shard(samples_B):
            name = next(n for n in self._reads if (n, number) in self.records)
            column = self.shard(name, number).table["key"]  # type: ignore[union-attr]
            for place in places:
                found[place] = column[int(self.row_of[samples_B[place]])].as_py()
        return found

    def _by_shard(self, samples_B: np.ndarray) -> list[tuple[int, np.ndarray]]:
        numbers_B = self.shard_of[samples_B]
        return [(int(n), np.flatnonzero(numbers_B == n)) for n in np.unique(numbers_B)]

    def _columns(
        self, name: str, samples_B: np.ndarray, crops_B: np.ndarray
    ) -> list[tuple[Shard, int, np.ndarray, np.ndarray]]:
        """(shard, crop, places in the batch, rows in the shard) for each column that the batch touches."""
        found = []
        per_crop = modality(name).per_crop
        for number, places in self._by_shard(samples_B):
            shard = self.shard(name, number)
            if shard is None:
                continue
            for crop in np.unique(crops_B[places]) if per_crop else (0,):
                here = places[crops_B[places] == crop] if per_crop else places
                found.append((shard, int(crop), here, self.row_of[samples_B[here]]))
        return found

    def _grids(
        self, name: str, info: ModalityInfo, samples_B: np.ndarray, crops_B: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids_BL = np.zeros((len(samples_B), info.tokens), dtype=_dtype(info))
        present_B = np.zeros(len(samples_B), dtype=bool)
        for shard, crop, places, rows in self._columns(name, samples_B, crops_B):
            ids_BL[places], present_B[places] = shard.tokens(crop)[rows], shard.valid(crop)[rows]
        return torch.from_numpy(ids_BL), torch.from_numpy(present_B)

    def _texts(
        self, name: str, info: ModalityInfo, samples_B: np.ndarray, crops_B: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cut to `info.tokens`, zeros after the end."""
        ids_BT = np.zeros((len(samples_B), info.tokens), dtype=_dtype(info))
        length_B = np.zeros(len(samples_B), dtype=np.int64)
        present_B = np.zeros(len(samples_B), dtype=bool)
        place_T = np.arange(info.tokens)
        for shard, crop, places, rows in self._columns(name, samples_B, crops_B):
            column = shard.column(crop)
            offsets, values = np.asarray(column.offsets), np.asarray(column.values)
            present_B[places] = shard.valid(crop)[rows]
            length_B[places] = np.minimum(offsets[rows + 1] - offsets[rows], info.tokens) * present_B[places]
            inside = place_T < length_B[places, None]
            at = np.where(inside, offsets[rows, None] + place_T, 0)
            ids_BT[places] = np.where(inside, values[at], 0) if len(values) else 0
        longest = max(int(length_B.max(initial=0)), 1)
        return torch.from_numpy(ids_BT[:, :longest]), torch.from_numpy(length_B), torch.from_numpy(present_B)

    def _has_picture(self, samples_B: np.ndarray, crops_B: np.ndarray) -> torch.Tensor:
        present_B = np.zeros(len(samples_B), dtype=bool)
        for shard, crop, places, rows in self._columns(CROPS, samples_B, crops_B):
            present_B[places] = shard.valid(crop)[rows]
        return torch.from_numpy(present_B)

    def _pixel_cache(self) -> tuple[np.ndarray | None, np.ndarray]:
        """Room for every decoded crop, if that is within the bound; untouched pages cost nothing."""
        side, status = self.config.image_size, np.zeros((len(self.shard_of), self.crops), dtype=np.uint8)
        fits = PIXELS in self.infos and status.size * 3 * side * side <= self.config.cache_bytes
        return (np.zeros((*status.shape, 3, side, side), dtype=np.uint8) if fits else None), status

    def _pixels(self, samples_B: np.ndarray, crops_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        side = self.config.image_size
        out_B3SS = np.zeros((len(samples_B), 3, side, side), dtype=np.uint8)
        seen_B = self._cached[samples_B, crops_B] if self._cache is not None else np.zeros(len(samples_B), np.uint8)
        todo = np.flatnonzero(seen_B == 0)
        decoded = self._pool.map(self._decode, samples_B[todo], crops_B[todo])
        for place, pixels in zip(todo, decoded, strict=True):
            seen_B[place] = 1 if pixels is not None else 2
            if pixels is not None:
                out_B3SS[place] = pixels
        if self._cache is not None:
            hits = np.flatnonzero(self._cached[samples_B, crops_B] == 1)
            out_B3SS[hits] = self._cache[samples_B[hits], crops_B[hits]]
            self._cache[samples_B[todo], crops_B[todo]] = out_B3SS[todo]
            self._cached[samples_B[todo], crops_B[todo]] = seen_B[todo]
        return torch.from_numpy(out_B3SS), torch.from_numpy(seen_B == 1)

    def _decode(self, sample: int, crop: int) -> np.ndarray | None:
        """uint8 (3, S, S), or None where there is no picture or no recorded crop."""
        number, row = int(self.shard_of[sample]), int(self.row_of[sample])
        pictures, crops = self.shard(PIXELS, number), self.shard(CROPS, number)
        data = pictures.value(row) if pictures is not None else None
        where = crops.value(row, int(crop)) if crops is not None else None
        if data is None or where is None:
            return None
        try:
            square = apply_crop(decode(data), Crop(*(int(v) for v in where)), self.config.image_size)
        except BadImageError as error:
            self.problems[str(error).split(":", 1)[0]] += 1
            log.warning("shard %d row %d: the picture cannot be used: %s", number, row, error)
            return None
        return np.ascontiguousarray(square.transpose(2, 0, 1))


def _dtype(info: ModalityInfo) -> type[np.unsignedinteger]:
    return np.uint16 if info.vocabulary <= 1 << 16 else np.uint32
