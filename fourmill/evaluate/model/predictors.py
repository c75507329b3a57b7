"""What is compared of each modality: what 4M says, the teacher's labels through the tokenizer and back, the labels.

Invariant: tokens are decoded by the tokenizers that made the model's tokens; `load_tokenizers` refuses others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fourmill.evaluate.labels import count_reason
from fourmill.evaluate.model.forced import Forced, context_of, forced
from fourmill.evaluate.model.samples import Sample
from fourmill.evaluate.model.spread_boxes import SAID
from fourmill.evaluate.tokens.rebuild import BAD_VALUE, Rebuilt
from fourmill.model.generate.names import source_name, token_name
from fourmill.model.generate.tokenizers import Tokenizers
from fourmill.model.network import FourM
from fourmill.model.predict import predict
from fourmill.pipeline.manifest import Manifest


@dataclass(frozen=True)
class Output:
    """A modality that the model predicts. `name`: the model's; `tokens`, `source`: the catalogue's."""

    name: str
    tokens: str
    source: str
    rebuilt: Rebuilt
    stored: bool
    """Whether the dataset's tokens are of this tokenizer, so that the round trip need not be made again."""

    def restored(self, rows: Sequence[np.ndarray], problems: Counter[str]) -> list[Any]:
        """Values of rows of ids; None, and counted, for those that cannot be decoded."""
        values: list[Any] = []
        for found in self.rebuilt.restore_each(rows) if rows else ():
            if isinstance(found, Exception):
                count_reason(problems, found)
                values.append(None)
            else:
                values.append(found[0])
        return values

    def round_trip(self, samples: Sequence[Sample], problems: Counter[str]) -> list[Any]:
        """Labels through the tokenizer and back, by way of the stored tokens if they are of this tokenizer; None where
        there is no label, and, counted, where it cannot go through."""
        rows: list[np.ndarray | None] = [self._ids(sample, problems) for sample in samples]
        values = iter(self.restored([row for row in rows if row is not None], problems))
        return [None if row is None else next(values) for row in rows]

    def _ids(self, sample: Sample, problems: Counter[str]) -> np.ndarray | None:
        label, stored = sample.labels.get(self.source), sample.tokens.get(self.tokens)
        if label is None or (self.stored and stored is not None):
            return None if label is None else stored
        try:
            found: np.ndarray = self.rebuilt.tokenizer.encode([label])[0]
        except BAD_VALUE as error:
            count_reason(problems, error)
            return None
        return found


def output_of(name: str, tokenizers: Tokenizers, manifest: Manifest) -> Output:
    """One modality of the model with its tokenizer, loaded. ValueError says why it cannot be decoded."""
    rebuilt, tokens = tokenizers.get(name), token_name(name)
    here = (rebuilt.tokenizer.lineage().get("checkpoint") or {}).get("digest")
    makers = manifest.generations(tokens) if tokens in manifest.modalities else ()
    digests = {(manifest.producers.get(maker, {}).get("checkpoint") or {}).get("digest") for maker in makers}
    return Output(name, tokens, source_name(name), rebuilt, stored=digests == {here})


@dataclass(frozen=True)
class Said:
    """What the model says of one sample: its ids and their value by modality of the model; None where the value cannot
    be decoded. `likely`: of the dataset's own tokens."""

    ids: dict[str, np.ndarray]
    values: dict[str, Any]
    likely: dict[str, Forced | None]


@dataclass(frozen=True)
class Model:
    """A trained model as a predictor. `steps`, `temperature`, `seed`: as of `predict`; greedy by default."""

    network: FourM
    outputs: Sequence[Output]
    steps: int = 1
    temperature: float = 0.0
    seed: int = 0

    def say(self, samples: Sequence[Sample], problems: Mapping[str, Counter[str]]) -> list[Said]:
        """Predictions for a batch of samples from their inputs alone, each target by itself."""
        given = {name: [sample.inputs[name] for sample in samples] for name in samples[0].inputs}
        views = {name: self._whole(name, rows) for name, rows in given.items()}
        first = [samples[0].place.shard, samples[0].place.row]
        draw = np.random.default_rng([self.seed, *first]).integers(1 << 62)  # of this batch, whatever came before
        generator = torch.Generator(self.network.mask_token.device).manual_seed(int(draw))
        settings: dict[str, Any] = {"steps": self.steps, "temperature": self.temperature, "generator": generator}
        found = predict(self.network, views, [output.name for output in self.outputs], **settings)
        context, valid = context_of(self.network, given)
        said = [Said({}, {}, {}) for _ in samples]
        for output in self.outputs:
            rows = [np.asarray(row.cpu()) for row in found[output.name]]
            values = output.restored(rows, problems[output.name])
            if output.source == "det":
                sure = forced(self.network, context, valid, output.name, rows)
                values = [ranked(*parts, output.rebuilt) for parts in zip(values, rows, sure, strict=True)]
            stored = [sample.tokens.get(output.tokens) if output.stored else None for sample in samples]
            likely = forced(self.network, context, valid, output.name, stored)
            for one, row, value, chances in zip(said, rows, values, likely, strict=True):
                one.ids[output.name], one.values[output.name], one.likely[output.name] = row, value, chances
        return said

    def _whole(self, name: str, rows: Sequence[np.ndarray]) -> Any:
        """A batch of one modality as `predict` takes it."""
        if self.network.architecture.modalities[name].kind == "sequence":
            return [row.astype(np.int64) for row in rows]
        stacked = np.stack(rows)
        return stacked if stacked.ndim == 4 else stacked.astype(np.int64)


def ranked(objects: Any, ids: np.ndarray, sure: Forced | None, rebuilt: Rebuilt) -> Any:
    """Boxes with scores, which tokens do not carry: half of 1 + the geometric mean of the probabilities of a box's
    tokens, so that every box counts as said and the surest come first. All 1 where tokens and boxes do not agree."""
    if not objects or sure is None:
        return objects
    starts = _starts(ids, rebuilt)
    scores = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        ((piece, _),) = rebuilt.restore([ids[start:end]])
        scores += [SAID + (1 - SAID) * float(np.exp(sure.log_probability[start:end].mean()))] * len(piece)
    if len(scores) != len(objects):
        return objects
    return [{**item, "score": score} for item, score in zip(objects, scores, strict=True)]


def _starts(ids: np.ndarray, rebuilt: Rebuilt) -> list[int]:
    """Where boxes begin in a row of ids: at the words v0=…"""
    text = getattr(rebuilt.tokenizer, "text", None)
    if text is None:
        return [0]
    begins = {int(i): text(np.array([i])).startswith("v0=") for i in np.unique(ids)}
    return [place for place, i in enumerate(ids) if begins[int(i)]] or [0]
