"""What a training run reports: the line people watch, the scalars, and the result at the end.

Rates are those of the steps since the last report, evaluations and saves left out. MFU is the share of the device's
peak that the model's own arithmetic makes up (`fourmill.model.flops`), and None where the peak is not known.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fourmill.model.config import Architecture, PretrainConfig
from fourmill.model.flops import flops_per_sample
from fourmill.pipeline.store import LocalStore, Store

log = logging.getLogger(__name__)

# Dense bfloat16 multiply-adds in float32, operations a second, by a part of the device's name: the makers' data sheets.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10G": 70e12,
    "L4": 121e12,
}


def peak_of(device: torch.device, autocast: bool) -> float | None:
    """Operations a second that the device could do at most, or None where no data sheet says."""
    return peak_named(torch.cuda.get_device_name(device)) if device.type == "cuda" and autocast else None


def peak_named(name: str) -> float | None:
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@dataclass(frozen=True)
class Progress:
    """One report, of the steps since the last one.

    `loss`: what was minimised; `losses`: nats a token by target modality; `grad_norm`: mean, before clipping.
    `data_share`: of the time, waiting for samples. `held_out`, `held_out_ema`: nats a token, when just evaluated.
    `events`: what the watch has found.
    """

    step: int
    steps: int
    loss: float
    losses: dict[str, float]
    lr: float
    grad_norm: float
    samples_per_s: float
    tokens_per_s: float
    mfu: float | None
    data_share: float
    eta_s: float
    held_out: dict[str, float] | None = None
    held_out_ema: dict[str, float] | None = None
    events: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"step {self.step:,}/{self.steps:,}",
            f"loss {self.loss:.3f}",
            f"lr {self.lr:.1e}",
            f"|g| {self.grad_norm:.2f}",
            f"{shortened(self.tokens_per_s)} tok/s",
            *([] if self.mfu is None else [f"MFU {100 * self.mfu:.0f} %"]),
            f"data {100 * self.data_share:.1f} %",
            f"ETA {duration(self.eta_s)}",
        ]
        for title, losses in (("held out", self.held_out), ("held out, EMA", self.held_out_ema)):
            if losses:
                parts.append(f"{title}: " + "  ".join(f"{name} {value:.3f}" for name, value in losses.items()))
        return "\n".join(["  ".join(parts), *(f"  ! {event}" for event in self.events)])

    def scalars(self) -> dict[str, float]:
        """By TensorBoard's names."""
        names = ("loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "data_share", "mfu")
        found = {f"train/{name}": getattr(self, name) for name in names}
        groups = {"loss": self.losses, "held_out": self.held_out or {}, "held_out_ema": self.held_out_ema or {}}
        found |= {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class PretrainResult:
    """What a run came to. Losses in nats a token on held-out samples, by modality.

    `frequencies`: the loss of predicting each token with its frequency in the training samples, on the same targets.
    `curve`: one entry per report. `missing`: rows of the dataset without a label, by modality. `seconds`:
    spent on steps, evaluations left out; `tokens_per_s`: inputs and targets. `mixture`: samples taken of
    each dataset; `input_tokens`, `target_tokens`: by modality, of the whole run. `skipped`: steps without an update;
    `events`: spikes, steps left out, dead modalities.
    """

    out: str
    steps: int
    parameters: int
    seconds: float
    samples_per_s: float
    held_out_samples: int
    held_out: dict[str, float]
    frequencies: dict[str, float]
    missing: dict[str, int]
    curve: list[dict[str, Any]]
    held_out_ema: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float = 0.0
    mfu: float | None = None
    mixture: dict[str, int] = field(default_factory=dict)
    input_tokens: dict[str, int] = field(default_factory=dict)
    target_tokens: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    events: list[str] = field(default_factory=list)

    @property
    def beats_frequencies(self) -> bool:
        """Whether the model is better than token frequencies in every modality."""
        return all(loss < self.frequencies[name] for name, loss in self.held_out.items())

    def __str__(self) -> str:
        mfu = "" if self.mfu is None else f", MFU {100 * self.mfu:.0f} %"
        head = (
            f"{self.parameters / 1e6:.1f} M parameters, {self.steps} steps in {self.seconds:.0f} s "
            f"({self.samples_per_s:.0f} samples/s, {shortened(self.tokens_per_s)} tok/s{mfu}); "
            f"nats a token on {self.held_out_samples} held-out samples:"
        )
        lines = [
            f"  {name:14} {loss:.3f}   (token frequencies {self.frequencies[name]:.3f}"
            + (f", EMA {self.held_out_ema[name]:.3f})" if name in self.held_out_ema else ")")
            for name, loss in self.held_out.items()
        ]
        events = [f"  ! {event}" for event in self.events]
        return "\n".join([head, *lines, *events, f"checkpoint: {self.out}"])


def shortened(number: float) -> str:
    """12.3k, 4.56M: three digits."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.2 h, 2.1 d."""
    for unit, name, digits in ((86_400, "d", 1), (7_200, "h", 1), (120, "min", 0)):
        if seconds >= unit:
            return f"{seconds / (3600 if name == 'h' else 60 if name == 'min' else unit):.{digits}f} {name}"
    return f"{seconds:.0f} s"


@dataclass(frozen=True)
class StepFigures:
    """One step over all processes. `sums`: cross-entropies in nats by target modality; `targets`, `inputs`: tokens."""

    loss: float
    grad_norm: float
    sums: dict[str, float]
    targets: dict[str, int]
    inputs: dict[str, int]


class Meter:
    """Adds up the steps since the last report, and the tokens of the whole run."""

    def __init__(self, architecture: Architecture, config: PretrainConfig, peak: float | None) -> None:
        """`peak`: of all devices together, operations a second."""
        self.architecture, self.config, self.peak = architecture, config, peak
        self.inputs: Counter[str] = Counter()
        self.targets: Counter[str] = Counter()
        self.steps, self.seconds = 0, 0.0  # of the whole run
        self._recent: deque[tuple[int, float]] = deque(maxlen=10)  # reports that the rest of the run is judged by
        self._clear()

    def _clear(self) -> None:
        self._steps: list[StepFigures] = []
        self._waited = self._spent = 0.0

    def add(self, figures: StepFigures, waited: float, spent: float) -> None:
        """`waited`: seconds of `spent` in which there were no samples yet."""
        self._steps.append(figures)
        self.inputs.update(figures.inputs)
        self.targets.update(figures.targets)
        self._waited, self._spent = self._waited + waited, self._spent + spent
        self.steps, self.seconds = self.steps + 1, self.seconds + spent

    def report(self, step: int, lr: float, **found: Any) -> Progress:
        """Of the steps since the last report, of which there must be one."""
        steps, count = self._steps, len(self._steps)
        finite = [one for one in steps if math.isfinite(one.loss) and math.isfinite(one.grad_norm)]
        sums, asked = Counter[str](), Counter[str]()
        for one in finite:
            sums.update(one.sums)
            asked.update(one.targets)
        tokens = [sum(sum(getattr(one, side).values()) for one in steps) for side in ("inputs", "targets")]
        self._recent.append((count, self._spent))
        pace = sum(s for _, s in self._recent) / sum(n for n, _ in self._recent)
        report = Progress(
            step=step,
            steps=self.config.steps,
            loss=_mean([one.loss for one in finite]),
            losses={name: sums[name] / asked[name] for name in self.architecture.domains_out if asked[name]},
            lr=lr,
            grad_norm=_mean([one.grad_norm for one in finite]),
            **self._rates(count, self._spent, *tokens),
            data_share=self._waited / self._spent,
            eta_s=(self.config.steps - step) * pace,
            **found,
        )
        self._clear()
        return report

    def totals(self) -> dict[str, Any]:
        """Of the whole run, compilation included: fields of `PretrainResult`."""
        rates = self._rates(self.steps, self.seconds, self.inputs.total(), self.targets.total())
        return {
            **{name: value if value is None else round(value, 4) for name, value in rates.items()},
            "seconds": round(self.seconds, 3),
            "input_tokens": dict(self.inputs),
            "target_tokens": dict(self.targets),
        }

    def _rates(self, steps: int, seconds: float, inputs: int, targets: int) -> dict[str, Any]:
        samples, mfu = steps * self.config.batch_size, None
        if self.peak is not None:
            flops = flops_per_sample(self.architecture, round(inputs / samples), round(targets / samples))
            mfu = samples * flops / seconds / self.peak
        return {"samples_per_s": samples / seconds, "tokens_per_s": (inputs + targets) / seconds, "mfu": mfu}

    def state_dict(self) -> dict[str, Any]:
        since = {"since": [asdict(one) for one in self._steps], "waited": self._waited, "spent": self._spent}
        sides = {"inputs": dict(self.inputs), "targets": dict(self.targets)}
        return {**sides, **since, "steps": self.steps, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inputs, self.targets = Counter(state["inputs"]), Counter(state["targets"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        self._steps = [StepFigures(**one) for one in state["since"]]
        self._waited, self._spent = state["waited"], state["spent"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


Sink = Callable[[Progress], None]


@contextlib.contextmanager
def boards(store: Store, config: PretrainConfig, step: int) -> Iterator[Sequence[Sink]]:
    """What reports go to besides the user: TensorBoard in a local `out`, Weights & Biases if asked for."""
    sinks: list[Sink] = []
    if config.tensorboard and not isinstance(store, LocalStore):
        log.warning("tensorboard: true has no effect: %s is not a local folder", config.out)
    with contextlib.ExitStack() as stack:
        if config.tensorboard is not False and isinstance(store, LocalStore):
            from fourmill.tokenizers.training.board import Board

            board = Board(str(Path(store.root) / "tensorboard"), step)
            stack.callback(board.writer.close)
            sinks.append(lambda report: board.scalars(report.step, report.scalars()))
        if config.wandb is not None:
            run = _wandb(config)
            stack.callback(run.finish)
            sinks.append(lambda report: run.log(report.scalars(), step=report.step))
        yield sinks


def _wandb(config: PretrainConfig) -> Any:
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(f"wandb: {config.wandb!r} needs the package; `pip install wandb`, or leave it out") from error
    name = config.out.rstrip("/").rpartition("/")[2]
    return wandb.init(project=config.wandb, name=name, config=config.model_dump(mode="json"), resume="allow", id=name)


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        return spent
