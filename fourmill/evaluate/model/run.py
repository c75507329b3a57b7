"""The pass: held-out samples of a dataset through a trained model, and everything it is compared with.

A chunk of samples is read, predicted, decoded and measured at a time. The same checkpoint, dataset and seed give the
same figures; the order of the samples is that of the dataset.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fourmill.evaluate.labels import MEASURES
from fourmill.evaluate.measure import IncomparableError
from fourmill.evaluate.model.constants import FIT_BYTES, Constant, fits
from fourmill.evaluate.model.predictors import Model, Output, Said, output_of
from fourmill.evaluate.model.results import ModelEvaluation
from fourmill.evaluate.model.samples import Chosen, Reader, Sample, label_values
from fourmill.evaluate.model.split import Split, Training, refuse_trained, training_of, wanted_keys
from fourmill.evaluate.model.spread import draws
from fourmill.evaluate.model.tallies import Comparison, FeatureComparison, TruthComparison
from fourmill.evaluate.model.token_tally import TokenTally
from fourmill.evaluate.tokens.rows import chosen_rows
from fourmill.evaluate.truth import PARTS, DepthFiles, TruthSource, open_truth
from fourmill.evaluate.words import TextEncoder, text_encoder
from fourmill.model.config import PIXELS
from fourmill.model.generate.names import resolve_name, source_name, token_name
from fourmill.model.generate.tokenizers import load_tokenizers
from fourmill.model.network import FourM
from fourmill.model.predict import load_model
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.store import Store, StoreError, open_store

FEATURES = ("clip", "clip_global")
_ORDER = (*(name for name in MEASURES if name != "caption"), *FEATURES, "caption")  # of the table


@dataclass(frozen=True)
class Settings:
    """How a model is evaluated."""

    given: tuple[str, ...] = ("rgb",)
    """What the model sees."""
    targets: tuple[str, ...] | None = None
    """What it predicts; None: all that can be measured."""
    count: int | None = None
    """Samples, those of lowest rank among the held-out ones; None: all."""
    fit: int = 2048
    """Training samples that constants and token frequencies are fitted on, at most."""
    split: Split = "held-out"
    steps: int = 1
    """Passes to fill a grid."""
    temperature: float = 0.0
    seed: int = 0
    """Of the bootstrap, and of drawn tokens."""
    resamples: int = 1000
    """Bootstrap draws of the samples."""
    tokenizers: tuple[str, ...] = ()
    """Where tokenizers lie, if not where the checkpoint says: depth=PATH."""
    device: str = "cpu"
    depth_files: DepthFiles = field(default_factory=DepthFiles)


@dataclass
class Evaluated:
    """The outcome, and what a page needs to show samples again."""

    evaluation: ModelEvaluation
    dataset: str
    outputs: tuple[Output, ...]
    ids: dict[tuple[int, int], dict[str, np.ndarray]]
    """By shard and row: the predicted ids by modality of the model."""
    reader: Reader
    source: TruthSource
    chosen: Chosen


def evaluate_model(
    checkpoint: str,
    dataset: str,
    truth: str | None = None,
    settings: Settings = Settings(),
    progress: Callable[[int, int], None] | None = None,
) -> Evaluated:
    """Measure what `checkpoint` predicts on samples of `dataset` against the truth at `truth` (None: scenes, rendered).

    ValueError for samples that were trained on, and for modalities, tokenizers or truth that are not there.
    """
    training = training_of(checkpoint)
    store = open_store(dataset)
    manifest = read_manifest(store)
    source = open_truth(truth, settings.depth_files)
    wanted = wanted_keys(training, settings.split, checkpoint)
    network = load_model(checkpoint, settings.device)
    inputs = tuple(resolve_name(name, network.architecture.domains_in, "input") for name in settings.given)
    chosen = chosen_rows(store, manifest, settings.count, wanted)
    if not chosen:
        raise ValueError(f"{dataset} holds no {settings.split} sample")
    reader = Reader(store, manifest, network.architecture.image_size)
    notes = refuse_trained(training, reader.keys(chosen))
    outputs = _outputs(checkpoint, network, manifest, inputs, settings)
    walk = _Walk(Model(network, outputs, settings.steps, settings.temperature, settings.seed), reader, source, chosen)
    fitting = _fitting(store, manifest, training, settings)
    walk.prepare(fitting)
    walk.run(inputs, progress)
    evaluation = _evaluation(checkpoint, store, manifest, settings, inputs, walk, fitting, notes)
    return Evaluated(evaluation, dataset, tuple(outputs), walk.ids, reader, source, chosen)


def _outputs(
    checkpoint: str, network: FourM, manifest: Manifest, inputs: Sequence[str], settings: Settings
) -> list[Output]:
    """The modalities to predict. Those asked for must be there; by default those that can be measured."""
    known = network.architecture.domains_out
    measured = [n for n in known if source_name(n) in (*MEASURES, *FEATURES) and n not in inputs]
    names = [resolve_name(n, known, "target") for n in settings.targets] if settings.targets else measured
    names = sorted(dict.fromkeys(names), key=lambda name: _ORDER.index(source_name(name)) if name in measured else 0)
    for name in names:
        if name not in measured:
            raise ValueError(
                f"{name} cannot be evaluated: it is an input, or there is no measure against truth; measured are "
                f"{', '.join(measured) or 'none of what this model predicts'}"
            )
    lacking = [source_name(name) for name in names if source_name(name) not in manifest.modalities]
    if lacking and settings.targets:
        raise ValueError(f"the dataset has no labels {', '.join(lacking)}: a teacher's labels stand in the table")
    if len(lacking) == len(names):
        raise ValueError(f"the dataset has no labels of what the model predicts ({', '.join(lacking) or 'nothing'})")
    tokenizers = load_tokenizers(checkpoint, network.architecture, settings.tokenizers)
    return [output_of(name, tokenizers, manifest) for name in names if source_name(name) not in lacking]


@dataclass(frozen=True)
class _Fitting:
    """Training samples that constants are fitted on: rows of a dataset, none of which is evaluated."""

    store: Store
    manifest: Manifest
    chosen: Chosen
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        return sum(len(rows) for rows in self.chosen.values())


def _fitting(store: Store, manifest: Manifest, training: Training, settings: Settings) -> _Fitting:
    """Samples that are not held out, of the evaluated dataset; if all of that is evaluated, of the one trained on."""
    if settings.split == "all":
        try:
            store = open_store(training.datasets[0])
            manifest = read_manifest(store)
        except (IndexError, OSError, ValueError, StoreError):
            why = "all samples are evaluated, and the dataset trained on, to fit them on, cannot be read"
            return _Fitting(store, manifest, {}, (f"no constants: {why}",))
    return _Fitting(store, manifest, chosen_rows(store, manifest, settings.fit, lambda key: not training.is_new(key)))


class _Walk:
    """The state of one pass."""

    def __init__(self, model: Model, reader: Reader, source: TruthSource, chosen: Chosen) -> None:
        self.model, self.reader, self.source, self.chosen = model, reader, source, chosen
        self.comparisons: dict[str, Comparison] = {}
        self.tokens: dict[str, TokenTally] = {}
        self.skipped: list[str] = []
        self.problems: dict[str, Counter[str]] = defaultdict(Counter)
        self.ids: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self.samples = 0

    def prepare(self, fitting: _Fitting) -> None:
        """Fit constants and count tokens of training samples; measures that cannot be taken are told."""
        size = self.reader.size(self.chosen)
        for output in self.model.outputs:
            try:
                self.comparisons[output.name] = self._comparison(output, fitting, size)
            except IncomparableError as error:
                self.skipped.append(f"{output.source} not compared: {error}")
            if output.stored:
                there = output.tokens in fitting.manifest.modalities
                rows = label_values(fitting.store, fitting.manifest, fitting.chosen, output.tokens) if there else ()
                self.tokens[output.name] = TokenTally(self.model.network, output.name, rows)

    def _comparison(self, output: Output, fitting: _Fitting, size: int) -> Comparison:
        spec = self.reader.spec(output.source, self.chosen)
        constant = self._constant(output.source, fitting, spec, size)
        if output.source in FEATURES:
            return FeatureComparison(output, constant, spec, _text_tower(self.reader.manifest, output.source))
        return TruthComparison(output, constant, spec, self.source, size)

    def _constant(self, source: str, fitting: _Fitting, spec: Spec, size: int) -> Constant | None:
        """None, and told, where training samples have no such labels, or labels of another kind."""
        if source not in fits() or source not in fitting.manifest.modalities or not fitting.chosen:
            return None
        theirs = Reader(fitting.store, fitting.manifest, size)
        there = theirs.spec(source, fitting.chosen)
        alike = (there.convention, there.classes, theirs.size(fitting.chosen)) == (spec.convention, spec.classes, size)
        if not alike:
            self.skipped.append(f"{source}: no constant, as labels of the training samples are of another kind or size")
            return None
        labels = list(label_values(fitting.store, fitting.manifest, fitting.chosen, source, FIT_BYTES))
        return fits()[source](labels, spec, self.source) if labels else None

    def run(self, inputs: Sequence[str], progress: Callable[[int, int], None] | None) -> None:
        """Every chosen sample once."""
        names = [*(o.source for o in self.model.outputs), *(o.tokens for o in self.model.outputs if o.stored)]
        parts = frozenset(
            part for o in self.model.outputs if o.source in MEASURES for part in MEASURES[o.source].parts
        ) | ({"captions"} if any(o.source in FEATURES for o in self.model.outputs) else set())
        assert parts <= set(PARTS)
        total = sum(len(rows) for rows in self.chosen.values())
        stored = [PIXELS if name == PIXELS else token_name(name) for name in inputs]
        for chunk in self.reader.chunks(self.chosen, stored, names, self.source, parts):
            for sample in chunk:
                sample.inputs = {name: sample.inputs[kept] for name, kept in zip(inputs, stored, strict=True)}
            self._chunk(chunk, self.model.say(chunk, self.problems))
            self.samples += len(chunk)
            if progress:
                progress(self.samples, total)

    def _chunk(self, samples: Sequence[Sample], said: Sequence[Said]) -> None:
        for sample, one in zip(samples, said, strict=True):
            self.ids[sample.place.shard, sample.place.row] = {n: ids.astype(np.uint32) for n, ids in one.ids.items()}
        for output in self.model.outputs:
            trips = output.round_trip(samples, self.problems[output.name])
            comparison, tally = self.comparisons.get(output.name), self.tokens.get(output.name)
            for sample, one, trip in zip(samples, said, trips, strict=True):
                likely = one.likely[output.name]
                if likely is not None and tally is not None:
                    tally.add(sample.tokens[output.tokens], likely)
                if comparison is not None:
                    comparison.add(sample, one.values[output.name], trip)


def _text_tower(manifest: Manifest, source: str) -> TextEncoder | str:
    """The text tower of the teacher that made the features, or why there is none."""
    try:
        return text_encoder(manifest.producers.get(next(iter(manifest.generations(source))), {}))
    except IncomparableError as error:
        return str(error)


def _evaluation(
    checkpoint: str,
    store: Store,
    manifest: Manifest,
    settings: Settings,
    inputs: tuple[str, ...],
    walk: _Walk,
    fitting: _Fitting,
    notes: Sequence[str],
) -> ModelEvaluation:
    weights = _Weights(settings.resamples, settings.seed)
    problems = [f"{name}: {n} not decoded: {why}" for name, found in walk.problems.items() for why, n in found.items()]
    tokens = tuple(tally.score(weights) for tally in walk.tokens.values() if tally.rows)
    chosen = ("count", "fit", "steps", "temperature", "seed", "resamples", "device")
    parameters: dict[str, Any] = {name: getattr(settings, name) for name in chosen}
    return ModelEvaluation(
        checkpoint,
        store.uri,
        manifest.snapshot,
        walk.source.name,
        settings.split,
        walk.samples,
        fitting.samples,
        inputs,
        parameters,
        tuple(comparison.score(weights) for comparison in walk.comparisons.values()),
        tokens,
        (*notes, *fitting.notes, *walk.skipped, *problems),
        dict(walk.reader.without),
        dict(walk.reader.bad_truth),
    )


class _Weights(Mapping[int, np.ndarray]):
    """Draws of so many samples, made when they are asked for: modalities with equally many share them."""

    def __init__(self, resamples: int, seed: int) -> None:
        self.resamples, self.seed = resamples, seed
        self._made: dict[int, np.ndarray] = {}

    def __getitem__(self, samples: int) -> np.ndarray:
        if samples not in self._made:
            self._made[samples] = draws(samples, self.resamples, self.seed)
        return self._made[samples]

    def __iter__(self) -> Any:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)
