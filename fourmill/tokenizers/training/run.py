"""Training a tokenizer on the labels of a dataset: what `fourmill train-tokenizer` does.

A run is a function of its configuration and the dataset: weights, order and restarts come from the seed, and a run that
was interrupted goes on from its state to the same weights. Figures are taken on held-out samples with the weights as
they are stored. A collapsed codebook is never published; a checkpoint is complete once its `config.json` is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fourmill.modalities import Kind, modality
from fourmill.pipeline.store import open_store
from fourmill.tokenizers.config import CheckpointConfig, NormalisationConfig
from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.networks.weights import pack, unpack
from fourmill.tokenizers.sources import source_of
from fourmill.tokenizers.sources.maps import MIN_DEPTH
from fourmill.tokenizers.spatial import CONFIG, WEIGHTS, SpatialCodec
from fourmill.tokenizers.training.config import PARTS, TrainTokenizerConfig
from fourmill.tokenizers.training.examples import Examples, PartExamples, ShardExamples, split, texts
from fourmill.tokenizers.training.fitting import Report, SpatialTraining
from fourmill.tokenizers.training.health import health_of, refuse_collapse
from fourmill.tokenizers.training.starting import settings_from

TEXT_SOURCES = ("caption", "alt_text")
_STATISTICS = 256  # depth maps that the logarithm's mean and deviation are taken from
_CLASS_CHANNELS = 8  # of a class id's embedding; 4M has 64 for 134 classes, but the patch projection mixes them at once
_USAGE = 512  # most samples that code usage is counted on
_BATCH = 32  # values measured at a time
_SHOWN = 4  # reconstructions drawn in TensorBoard


@dataclass(frozen=True)
class TrainResult:
    """`checkpoint`: where it is. `losses`: mean of each `report_every` steps. `figures`: on held-out samples, by name.
    `usage`: share of codes in use; `perplexity`: effective number of them; `entropy`: bits a token; the mean of several
    codebooks. `seconds`: of the optimizer steps. Other processes than the first have no figures."""

    checkpoint: str
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    usage: float = 0.0
    perplexity: float = 0.0
    entropy: float = 0.0
    vocabulary: int = 0

    def __str__(self) -> str:
        figures = "".join(f"\n  {name:20} {value:.4f}" for name, value in self.figures.items())
        codes = (
            f"\n  codes                {self.usage:.1%} of {self.vocabulary} used, perplexity {self.perplexity:.1f}, "
        )
        codes += f"{self.entropy:.2f} bits a token"
        return f"checkpoint: {self.checkpoint}, {self.steps} steps in {self.seconds:.0f} s" + (
            f"; on held-out samples:{figures}{codes}" if figures else ""
        )


def train_tokenizer(config: TrainTokenizerConfig, progress: Callable[[Report], None] | None = None) -> TrainResult:
    """Train on the dataset's labels, measure, and publish the checkpoint at `config.out`.

    ValueError if the dataset has no such labels or `out` holds a checkpoint; `CodebookCollapseError` on collapse.
    """
    _refuse_existing(config.out)
    if modality(config.modality).kind is Kind.SEQUENCE:
        return _train_text(config)
    examples = _examples(config)
    classes = len(examples.spec.classes or ())
    return train_spatial(examples, config, classes, progress)


def _examples(config: TrainTokenizerConfig) -> ShardExamples:
    base, at, variant = config.modality.partition("@")
    name = modality(base).source or base
    kind = PartExamples if name in PARTS else ShardExamples
    name = f"{name}{at}{variant}" if name != "rgb" else name
    return kind(
        config.dataset,
        name,
        config.largest,
        max_shards=config.max_shards,
        open_shards=2 * config.shards_in_memory,
        mixed_generations=config.mixed_generations,
    )


def train_spatial(
    examples: Examples,
    config: TrainTokenizerConfig,
    classes: int = 0,
    progress: Callable[[Report], None] | None = None,
) -> TrainResult:
    """Train one tokenizer on numbered examples. `classes`: of semseg; 0 counts them in the first maps."""
    train, held_out = split(examples.keys, config.held_out)
    if not train:
        raise ValueError(f"{config.modality}: no samples to train on; {len(examples.keys)} rows hold a value")
    settings = settings_of(examples, train, config, classes)
    run = SpatialTraining(examples, train, config, settings, progress, (held_out or train)[:_SHOWN])
    run.fit()
    result = TrainResult(config.out, run.step, run.seconds, run.losses)
    if not run.workers.is_first:
        return result
    with run.average.applied():
        # A frozen encoder stays as it was to the last bit, and so do its tokens.
        weights = pack(run.network, half=not config.freeze_encoder)
    network = unpack(settings, weights, WEIGHTS)
    chosen = (held_out or train)[: config.eval_samples]
    figures, counts = evaluate(network, settings, examples, chosen, run.device, config.largest)
    if len(chosen) < _USAGE:  # few held-out samples cannot use all codes
        more = train[: _USAGE - len(chosen)]
        counts = counts + count_codes(network, settings, examples, more, run.device, config.largest)
    health = health_of(counts)
    refuse_collapse(health, config, run.step)
    result = replace(
        result,
        figures=figures,
        usage=health.usage,
        perplexity=health.perplexity,
        entropy=health.entropy,
        vocabulary=settings.network.vocabulary,
    )
    publish(config.out, {WEIGHTS: weights, "README.md": _card(config, result), CONFIG: _json(settings)})
    return result


def settings_of(
    examples: Examples, train: Sequence[int], config: TrainTokenizerConfig, classes: int
) -> CheckpointConfig:
    """The checkpoint's configuration; what the user did not say is read off the data, or is that of `init`."""
    if config.init:
        return settings_from(config)
    source = config.source
    first = np.asarray(examples.values(train[:1])[0])
    channels = 1 if first.ndim == 2 else len(first)
    if source == "semseg":
        channels, classes = _CLASS_CHANNELS, classes or _count_classes(examples, train)
    return CheckpointConfig.model_validate(
        {
            "source": source,
            "channels": channels,
            "classes": classes if source == "semseg" else 0,
            "normalisation": _normalisation(examples, train, config),
            "network": config.network,
        }
    )


def _normalisation(examples: Examples, train: Sequence[int], config: TrainTokenizerConfig) -> NormalisationConfig:
    if config.source == "depth" and config.normalisation in (None, "log"):
        return _depth_normalisation(examples, train)
    kinds = {"rgb": "signed", "canny_edge": "signed", "semseg": "classes", "mask": "binary", "human_pose": "raw"}
    return NormalisationConfig.model_validate({"kind": config.normalisation or kinds.get(config.source, "unit")})


def _depth_normalisation(examples: Examples, train: Sequence[int]) -> NormalisationConfig:
    spread = train[:: max(1, len(train) // _STATISTICS)][:_STATISTICS]
    known = (v[v > 0] for v in map(np.asarray, examples.values(spread)))  # 0 is not known
    logs = np.concatenate([np.log(np.maximum(v, MIN_DEPTH)) for v in known])
    if not len(logs):
        raise ValueError(f"the {len(spread)} depth maps looked at hold no depth above 0")
    # Four decimals: enough for any range, and the same file whatever the order of summation.
    offset, scale = round(float(logs.mean(dtype=np.float64)), 4), round(float(logs.std(dtype=np.float64)), 4)
    return NormalisationConfig(kind="log", offset=offset, scale=max(scale, 1e-3))


def _count_classes(examples: Examples, train: Sequence[int]) -> int:
    ids = [int(v[v != 255].max(initial=0)) for v in map(np.asarray, examples.values(train[:_STATISTICS]))]
    return max(ids) + 1


def evaluate(
    network: VQNetwork,
    settings: CheckpointConfig,
    examples: Examples,
    rows: Sequence[int],
    device: str,
    size: int | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """Figures of merit of the reconstructions of `rows`, and how often each code was used, (H, K).

    `size`: side of the examples; by default the checkpoint's.
    """
    codec = SpatialCodec(settings, network.to(device).eval(), source_of(settings, size), device)
    truth: list[Any] = []
    restored: list[Any] = []
    counts = np.zeros((settings.network.num_codebooks, settings.network.vocabulary), dtype=np.int64)
    for start in range(0, len(rows), _BATCH):
        values = examples.values(rows[start : start + _BATCH])
        tokens = codec.encode(values)
        counts += _histogram(tokens, *counts.shape)
        truth, restored = truth + values, restored + codec.decode(tokens)
    return codec.source.measure(truth, restored), counts


def count_codes(
    network: VQNetwork,
    settings: CheckpointConfig,
    examples: Examples,
    rows: Sequence[int],
    device: str,
    size: int | None = None,
) -> np.ndarray:
    """How often each code was used for `rows`, (H, K); nothing is decoded, which diffusion makes dear."""
    codec = SpatialCodec(settings, network.to(device).eval(), source_of(settings, size), device)
    counts = np.zeros((settings.network.num_codebooks, settings.network.vocabulary), dtype=np.int64)
    for start in range(0, len(rows), _BATCH):
        counts += _histogram(codec.encode(examples.values(rows[start : start + _BATCH])), *counts.shape)
    return counts


def _histogram(tokens: Sequence[np.ndarray], books: int, vocabulary: int) -> np.ndarray:
    """Of B rows of ids (L,), for H codebooks (H,)."""
    ids_BHL = np.stack(tokens).astype(np.int64).reshape(len(tokens), books, -1)
    return np.stack([np.bincount(ids_BHL[:, book].ravel(), minlength=vocabulary) for book in range(books)])


def _refuse_existing(out: str) -> None:
    if open_store(out).head(CONFIG) is not None or open_store(out).head("tokenizer.json") is not None:
        raise ValueError(f"{out} holds a checkpoint already; give another `out`, objects are never overwritten")


def publish(out: str, files: dict[str, bytes]) -> None:
    """Create the files in order, the one that makes the checkpoint complete last."""
    store = open_store(out)
    for name, data in files.items():
        if not store.create(name, data) and store.get(name) != data:
            raise ValueError(f"{out} holds another {name} already; give another `out`, objects are never overwritten")


def _json(settings: CheckpointConfig) -> bytes:
    return (settings.model_dump_json(indent=1) + "\n").encode()


def _card(config: TrainTokenizerConfig, result: TrainResult) -> bytes:
    """Without times: a run that was cut off while publishing publishes the same files when it is run again."""
    figures = "".join(f"- {name}: {value:.4f}\n" for name, value in result.figures.items())
    return (
        f"---\nlicense: {config.licence}\n---\n\n# {config.modality}\n\nTrained by `fourmill train-tokenizer` on "
        f"{config.dataset}: {result.steps} steps of {config.batch_size} samples.\n\n"
        f"On held-out samples:\n\n{figures}- codes used: {result.usage:.1%} of {result.vocabulary}\n"
        f"- codes in effective use: {result.perplexity:.1f}\n"
        f"- entropy: {result.entropy:.2f} bits a token\n"
    ).encode()


def _train_text(config: TrainTokenizerConfig) -> TrainResult:
    from fourmill.tokenizers.text import FILE, train_text_tokenizer, vocabulary_size

    layout = config.vocabulary
    data = train_text_tokenizer(
        texts(config.dataset, TEXT_SOURCES, config.mixed_generations),
        layout.vocabulary_size,
        layout.num_sentinels,
        layout.coordinate_bins,
        layout.class_names,
        layout.markers,
    )
    result = TrainResult(config.out, vocabulary=vocabulary_size(data))
    card = f"---\nlicense: {config.licence}\n---\n\n# Text vocabulary\n\nTrained on {config.dataset}: "
    publish(config.out, {"README.md": f"{card}{result.vocabulary} entries.\n".encode(), FILE: data})
    return result
