"""Training a tokenizer on the labels of a dataset: what `fourmill train-tokenizer` does.

A run is a function of its configuration and the dataset: weights, order and restarts come from the seed, and a run that
was interrupted goes on from its state to the same weights. Figures are taken on held-out samples with the weights as
they are stored. A collapsed codebook is never published; a checkpoint is complete once its `config.json` is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fourmill.modalities import Kind, modality
from fourmill.pipeline.store import open_store
from fourmill.tokenizers.config import (
    FEATURES,
    NormalisationConfig,
    SpatialCheckpointConfig,
    TrainTokenizerConfig,
)
from fourmill.tokenizers.examples import Examples, ShardExamples, split, texts
from fourmill.tokenizers.fitting import SpatialTraining, perplexity_of, refuse_collapse
from fourmill.tokenizers.networks import SpatialNetwork, pack, unpack
from fourmill.tokenizers.sources import MIN_DEPTH, source_of
from fourmill.tokenizers.spatial import CONFIG, WEIGHTS, SpatialCodec

TEXT_SOURCES = ("caption", "alt_text")
_STATISTICS = 256  # depth maps that the logarithm's mean and deviation are taken from
_CLASS_CHANNELS = 8  # of a class id's embedding; 4M has 64 for 134 classes, but the patch projection mixes them at once
_USAGE = 512  # most samples that code usage is counted on


@dataclass(frozen=True)
class TrainResult:
    """`checkpoint`: where it is. `losses`: mean of each `report_every` steps. `figures`: on held-out samples, by name.
    `usage`: share of codes in use; `perplexity`: effective number of them. `seconds`: of the optimizer steps."""

    checkpoint: str
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    usage: float = 0.0
    perplexity: float = 0.0
    vocabulary: int = 0


def train_tokenizer(config: TrainTokenizerConfig) -> TrainResult:
    """Train on the dataset's labels, measure, and publish the checkpoint at `config.out`.

    ValueError if the dataset has no such labels or `out` holds a checkpoint; `CodebookCollapseError` on collapse.
    """
    _refuse_existing(config.out)
    entry = modality(config.modality)
    assert entry.source is not None
    if entry.kind is Kind.SEQUENCE:
        return _train_text(config)
    variant = config.modality.partition("@")[2]
    name = f"{entry.source}@{variant}" if variant and entry.source != "rgb" else entry.source
    examples = ShardExamples(
        config.dataset, name, config.network.size, max_shards=config.max_shards, open_shards=2 * config.shards_in_memory
    )
    classes = len(examples.spec.classes or ())
    return train_spatial(examples, config, classes)


def train_spatial(examples: Examples, config: TrainTokenizerConfig, classes: int = 0) -> TrainResult:
    """Train one spatial tokenizer on numbered examples. `classes`: of semseg; 0 counts them in the first maps."""
    train, held_out = split(examples.keys, config.held_out)
    if not train:
        raise ValueError(f"{config.modality}: no samples to train on; {len(examples.keys)} rows hold a value")
    settings = settings_of(examples, train, config, classes)
    run = SpatialTraining(examples, train, config, settings)
    run.fit()
    weights = pack(run.network)
    network = unpack(settings, weights, WEIGHTS)
    chosen = (held_out or train)[: config.eval_samples]
    figures, counts = evaluate(network, settings, examples, chosen, run.device)
    if len(chosen) < _USAGE:  # few held-out samples cannot use all codes
        counts = counts + evaluate(network, settings, examples, train[: _USAGE - len(chosen)], run.device)[1]
    perplexity = perplexity_of(counts)
    refuse_collapse(perplexity, config, run.step)
    result = TrainResult(
        checkpoint=config.out,
        steps=run.step,
        seconds=run.seconds,
        losses=run.losses,
        figures=figures,
        usage=float(np.count_nonzero(counts) / len(counts)),
        perplexity=perplexity,
        vocabulary=len(counts),
    )
    publish(config.out, {WEIGHTS: weights, "README.md": _card(config, result), CONFIG: _json(settings)})
    return result


def settings_of(
    examples: Examples, train: Sequence[int], config: TrainTokenizerConfig, classes: int
) -> SpatialCheckpointConfig:
    """The checkpoint's configuration; what the user did not say is read off the data."""
    source = modality(config.modality).source
    first = np.asarray(examples.values(train[:1])[0])
    normalisation = NormalisationConfig(kind="signed" if source == "rgb" else "unit")
    channels = len(first) if source in ("rgb", "normal", *FEATURES) else 1
    if source == "depth":
        normalisation = _depth_normalisation(examples, train, config)
    if source == "semseg":
        normalisation, channels = NormalisationConfig(kind="classes"), _CLASS_CHANNELS
        classes = classes or _count_classes(examples, train)
    return SpatialCheckpointConfig.model_validate(
        {
            "source": source,
            "channels": channels,
            "classes": classes if source == "semseg" else 0,
            "normalisation": normalisation,
            "network": config.network,
        }
    )


def _depth_normalisation(examples: Examples, train: Sequence[int], config: TrainTokenizerConfig) -> NormalisationConfig:
    if config.normalisation == "standardise":
        return NormalisationConfig(kind="standardise")
    spread = train[:: max(1, len(train) // _STATISTICS)][:_STATISTICS]
    logs = np.concatenate([np.log(np.maximum(v, MIN_DEPTH)).ravel() for v in examples.values(spread)])
    # Four decimals: enough for any range, and the same file whatever the order of summation.
    offset, scale = round(float(logs.mean(dtype=np.float64)), 4), round(float(logs.std(dtype=np.float64)), 4)
    return NormalisationConfig(kind="log", offset=offset, scale=max(scale, 1e-3))


def _count_classes(examples: Examples, train: Sequence[int]) -> int:
    ids = [int(v[v != 255].max(initial=0)) for v in map(np.asarray, examples.values(train[:_STATISTICS]))]
    return max(ids) + 1


def evaluate(
    network: SpatialNetwork,
    settings: SpatialCheckpointConfig,
    examples: Examples,
    rows: Sequence[int],
    device: str,
) -> tuple[dict[str, float], np.ndarray]:
    """Figures of merit of the reconstructions of `rows`, and how often each code was used (vocabulary,)."""
    codec = SpatialCodec(settings, network.to(device).eval(), source_of(settings), device)
    truth: list[Any] = []
    restored: list[Any] = []
    counts = np.zeros(settings.network.vocabulary, dtype=np.int64)
    for start in range(0, len(rows), 32):
        values = examples.values(rows[start : start + 32])
        tokens = codec.encode(values)
        counts += np.bincount(np.concatenate(tokens), minlength=len(counts))
        truth, restored = truth + values, restored + codec.decode(tokens)
    return codec.source.measure(truth, restored), counts


def _refuse_existing(out: str) -> None:
    if open_store(out).head(CONFIG) is not None or open_store(out).head("tokenizer.json") is not None:
        raise ValueError(f"{out} holds a checkpoint already; give another `out`, objects are never overwritten")


def publish(out: str, files: dict[str, bytes]) -> None:
    """Create the files in order, the one that makes the checkpoint complete last."""
    store = open_store(out)
    for name, data in files.items():
        if not store.create(name, data) and store.get(name) != data:
            raise ValueError(f"{out} holds another {name} already; give another `out`, objects are never overwritten")


def _json(settings: SpatialCheckpointConfig) -> bytes:
    return (settings.model_dump_json(indent=1) + "\n").encode()


def _card(config: TrainTokenizerConfig, result: TrainResult) -> bytes:
    """Without times: a run that was cut off while publishing publishes the same files when it is run again."""
    figures = "".join(f"- {name}: {value:.4f}\n" for name, value in result.figures.items())
    return (
        f"---\nlicense: {config.licence}\n---\n\n# {config.modality}\n\nTrained by `fourmill train-tokenizer` on "
        f"{config.dataset}: {result.steps} steps of {config.batch_size} samples.\n\n"
        f"On held-out samples:\n\n{figures}- codes used: {result.usage:.1%} of {result.vocabulary}\n"
        f"- codes in effective use: {result.perplexity:.1f}\n"
    ).encode()


def _train_text(config: TrainTokenizerConfig) -> TrainResult:
    from fourmill.tokenizers.text import FILE, train_text_tokenizer, vocabulary_size

    layout = config.vocabulary
    data = train_text_tokenizer(
        texts(config.dataset, TEXT_SOURCES),
        layout.vocabulary_size,
        layout.num_sentinels,
        layout.coordinate_bins,
        layout.class_names,
    )
    result = TrainResult(config.out, vocabulary=vocabulary_size(data))
    card = f"---\nlicense: {config.licence}\n---\n\n# Text vocabulary\n\nTrained on {config.dataset}: "
    publish(config.out, {"README.md": f"{card}{result.vocabulary} entries.\n".encode(), FILE: data})
    return result
