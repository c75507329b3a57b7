"""Several datasets as one, each with its share of the samples, whatever their sizes.

Which dataset a sample of the sequence comes from is drawn without replacement from periods of 65,536: in each period
every dataset has its share exactly, and how many samples it gave before any step is known without counting. The draw
knows of nothing but seed and position, so ranks, batch sizes and restarts do not change it.

Legend: B samples, K datasets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from fourmill.model.batch import RawBatch
from fourmill.model.config import DatasetShare, ModalityInfo
from fourmill.model.data.dataset import TokenDataset
from fourmill.model.data.options import DataConfig
from fourmill.model.data.tars import modalities_at
from fourmill.pipeline.codecs import token_dtype
from fourmill.pipeline.shards import digest
from fourmill.pipeline.store import StoreSettings

PERIOD = 1 << 16
_DRAW = (1 << 32) - 1  # in place of a window's number, which is below


def open_data(
    shares: Sequence[DatasetShare], config: DataConfig, storage: StoreSettings | None = None
) -> TokenDataset | Mixture:
    """One dataset, or a mixture. Under the policy 'mask' a dataset may lack modalities that another one has.

    ValueError as of `TokenDataset`; also for a dataset named twice, and where they disagree on a modality's vocabulary,
    length or grid.
    """
    if len(shares) == 1:
        return TokenDataset(shares[0].uri, config, storage)
    twice = [uri for uri, count in Counter(s.uri for s in shares).items() if count > 1]
    if twice:
        raise ValueError(f"datasets: {twice[0]} is named twice; give it one larger weight")
    held = [modalities_at(share.uri, storage) for share in shares]
    datasets = []
    for share, there in zip(shares, held, strict=True):
        lacking = [n for n in config.names if n not in there and any(n in other for other in held)]
        if lacking and config.missing != "mask":
            raise ValueError(f"{share.uri} has no {', '.join(lacking)}, and missing is {config.missing!r}: say 'mask'")
        names = tuple(n for n in config.names if n not in lacking)
        if not names:
            raise ValueError(f"{share.uri} has none of {', '.join(config.names)}")
        datasets.append(TokenDataset(share.uri, replace(config, names=names), storage))
    return Mixture(datasets, [share.weight for share in shares], config)


class Mixture:
    """Datasets in a row: sample numbers go on from one to the next. Otherwise as `TokenDataset`.

    A modality that a dataset lacks is missing in all of its rows.
    """

    def __init__(self, datasets: Sequence[TokenDataset], weights: Sequence[float], config: DataConfig) -> None:
        self.parts, self.weights, self.config = tuple(datasets), tuple(weights), config
        self.firsts = np.concatenate([[0], np.cumsum([len(d) for d in datasets])]).astype(np.int64)
        self.infos = _agreed(datasets, config.names)
        self.crops = min(d.crops for d in datasets)
        self.digest = digest(*(f"{d.digest} {w!r}" for d, w in zip(datasets, weights, strict=True)))
        self.uri = " + ".join(d.uri for d in datasets)
        self.train = self._numbers("train")
        self.held_out = self._numbers("held_out")
        self.left_out = sum(d.left_out for d in datasets)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def _numbers(self, part: str) -> np.ndarray:
        dtype = np.int32 if len(self) < 1 << 31 else np.int64
        found = [getattr(d, part) + dtype(first) for d, first in zip(self.parts, self.firsts, strict=False)]
        return np.concatenate(found).astype(dtype, copy=False)

    @property
    def problems(self) -> Counter[str]:
        """Pictures that cannot be decoded, by reason."""
        return sum((d.problems for d in self.parts), Counter())

    def missing(self) -> dict[str, int]:
        """Rows without a value, by modality, over all datasets."""
        total: Counter[str] = Counter()
        for dataset in self.parts:
            total.update(dataset.missing())
            total.update({name: len(dataset) for name in self.infos if name not in dataset.infos})
        return {name: total[name] for name in self.infos if total[name]}

    def some(self, part: Literal["train", "held_out"], count: int, rng: np.random.Generator) -> np.ndarray:
        """Up to `count` numbers of samples, of each dataset by its weight."""
        shares = np.diff(np.floor(np.cumsum([0, *self.weights]) / sum(self.weights) * count + 0.5).astype(int))
        found = [d.some(part, n, rng) + first for d, n, first in zip(self.parts, shares, self.firsts, strict=False)]
        return rng.permutation(np.concatenate(found))

    def batch(
        self,
        samples_B: np.ndarray,
        crops_B: np.ndarray,
        state: dict[str, int] | None = None,
        *,
        with_pixels: bool = True,
    ) -> RawBatch:
        """As of `TokenDataset`."""
        part_B = np.searchsorted(self.firsts, samples_B, side="right") - 1
        if len(samples_B) and not (part_B.min() >= 0 and part_B.max() < len(self.parts)):
            raise IndexError(f"{self.uri} has samples 0 to {len(self) - 1}")
        places = [np.flatnonzero(part_B == k) for k in range(len(self.parts))]
        batches = [
            d.batch(samples_B[at] - self.firsts[k], crops_B[at], with_pixels=with_pixels)
            for k, (d, at) in enumerate(zip(self.parts, places, strict=True))
            if len(at)
        ]
        return _merged(batches, [at for at in places if len(at)], len(samples_B), self.infos, state)

    def keys(self, samples_B: np.ndarray) -> list[str]:
        """The samples' keys."""
        part_B = np.searchsorted(self.firsts, samples_B, side="right") - 1
        found = [""] * len(samples_B)
        for k, dataset in enumerate(self.parts):
            at = np.flatnonzero(part_B == k)
            for place, key in zip(at, dataset.keys(samples_B[at] - self.firsts[k]) if len(at) else [], strict=True):
                found[place] = key
        return found

    def close(self) -> None:
        """Stop downloads in threads."""
        for dataset in self.parts:
            dataset.close()


def _agreed(datasets: Sequence[TokenDataset], names: Sequence[str]) -> dict[str, ModalityInfo]:
    """Every modality's description, which all datasets must share."""
    found: dict[str, tuple[ModalityInfo, str]] = {}
    for dataset in datasets:
        for name, info in dataset.infos.items():
            known, uri = found.setdefault(name, (info, dataset.uri))
            if info != known:
                raise ValueError(
                    f"{name} differs between datasets: vocabulary {known.vocabulary}, {known.tokens} tokens, grid"
                    f" {known.grid} in {uri}, but {info.vocabulary}, {info.tokens}, {info.grid} in {dataset.uri}"
                )
    missing = [name for name in names if name not in found]
    assert not missing, missing  # each dataset was asked for what none has, and refused
    return {name: found[name][0] for name in names}


def _merged(
    batches: Sequence[RawBatch],
    places: Sequence[np.ndarray],
    size: int,
    infos: dict[str, ModalityInfo],
    state: dict[str, int] | None,
) -> RawBatch:
    """The rows of several batches at their places in one; what a batch lacks is absent there."""
    keys = [""] * size
    for batch, at in zip(batches, places, strict=True):
        for place, key in zip(at.tolist(), batch.keys, strict=True):
            keys[place] = key

    def spread(field: str, name: str, width: int | None, dtype: str) -> torch.Tensor:
        held = [(getattr(batch, field), at) for batch, at in zip(batches, places, strict=True)]
        return _spread([(values[name].numpy(), at) for values, at in held if name in values], size, width, dtype)

    tokens = {
        name: spread("tokens", name, info.tokens if info.kind == "grid" else 1, token_dtype(info.vocabulary))
        for name, info in infos.items()
        if info.kind in ("grid", "sequence")
    }
    lengths = {name: spread("lengths", name, None, "int64") for name, i in infos.items() if i.kind == "sequence"}
    present = {name: spread("present", name, None, "bool") for name in infos}
    pixels = None
    pictured = [(batch.pixels, at) for batch, at in zip(batches, places, strict=True) if batch.pixels is not None]
    if pictured:
        pixels = torch.zeros((size, *pictured[0][0].shape[1:]), dtype=torch.uint8)
        for values, at in pictured:
            pixels[torch.from_numpy(at)] = values
    return RawBatch(keys, tokens, lengths, present, pixels, state or {})


def _spread(parts: Sequence[tuple[np.ndarray, np.ndarray]], size: int, width: int | None, dtype: str) -> torch.Tensor:
    """Zeros (size,), or (size, the widest), with these rows at these places."""
    widest = () if width is None else (max([width, *(values.shape[1] for values, _ in parts)]),)
    out = np.zeros((size, *widest), dtype)
    for values, at in parts:
        if width is None:
            out[at] = values
        else:
            out[at, : values.shape[1]] = values
    return torch.from_numpy(out)


class Draw:
    """Which of K datasets each sample of the sequence comes from."""

    def __init__(self, weights: Sequence[float]) -> None:
        share_K = np.array(weights) / sum(weights) * PERIOD
        count_K = np.maximum(np.floor(share_K), 1).astype(np.int64)
        for k in np.argsort(count_K - share_K)[: max(PERIOD - int(count_K.sum()), 0)]:  # largest remainders
            count_K[k] += 1
        count_K[np.argmax(count_K)] += PERIOD - count_K.sum()  # where shares below one in a period were rounded up
        self.count_K = count_K
        self._base = np.repeat(np.arange(len(weights), dtype=np.int16), count_K)
        self._period: tuple[tuple[int, int], np.ndarray] | None = None

    def take(self, seed: int, start: int, count: int) -> np.ndarray:
        """(count,) numbers of datasets, from a position in the whole sequence on."""
        parts = []
        while count:
            period, at = divmod(start, PERIOD)
            parts.append(self._drawn(seed, period)[at : at + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else self._base[:0]

    def before(self, seed: int, start: int) -> np.ndarray:
        """int64 (K,): samples of each dataset before a position."""
        period, at = divmod(start, PERIOD)
        rest_K = np.bincount(self.take(seed, period * PERIOD, at), minlength=len(self.count_K))
        return np.asarray(period * self.count_K + rest_K)

    def _drawn(self, seed: int, period: int) -> np.ndarray:
        if self._period is None or self._period[0] != (seed, period):
            rng = np.random.default_rng([seed, period, _DRAW])
            self._period = (seed, period), rng.permutation(self._base)
        return self._period[1]
