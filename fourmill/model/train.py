"""Pretraining: from a dataset of tokens to a checkpoint folder.

    model.safetensors, config.json   the model, with fourmill.json (see `fourmill.model.weights`)
    ema/                             the same of the averaged weights, if there is an average
    tokenizers.json                  what made the tokens, so that they can be turned back into pictures and texts
    pretrain.json                    the resolved configuration and the digest of the data, written first
    metrics.json                     curve, held-out loss by modality, the yardstick beside it; written last
    tensorboard/                     scalars
    state/                           while the run lasts (see `fourmill.model.state`)

Stopped in whatever way, the same command goes on from the newest state and, on a CPU, ends with the same weights.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fourmill.model.batch import RawBatch
from fourmill.model.config import FREE, Architecture, DatasetShare, PretrainConfig
from fourmill.model.data import Mixture, TokenDataset, data_config, open_data
from fourmill.model.distributed import Workers, joined, whole_state
from fourmill.model.evaluate import HeldOut, count_tokens
from fourmill.model.loader import Loader, read_ahead
from fourmill.model.masking import Masker
from fourmill.model.memory import keep_memory
from fourmill.model.progress import Meter, PretrainResult, Progress, Stopwatch, boards, peak_of
from fourmill.model.state import States
from fourmill.model.step import Slice, Training, new_model, seed_of
from fourmill.model.weights import save_model
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.store import Store, StoreSettings, join_uri, open_store
from fourmill.tokenizers.training.progress import Interruption

__all__ = ["PretrainResult", "Progress", "pretrain", "seed_of"]

log = logging.getLogger(__name__)


def pretrain(
    dataset: str,
    config: PretrainConfig,
    progress: Callable[[Progress], None] | None = None,
    storage: StoreSettings | None = None,
) -> PretrainResult:
    """Train a model on `dataset` (path or s3:// URI) and write its checkpoint to `config.out`.

    A finished run is not repeated: its result is read. ValueError if `out` holds a run of another configuration or of
    other data, or if the dataset is unfit. SIGTERM or Ctrl-C end the step, save the state and raise KeyboardInterrupt.
    Of several processes that call this (torchrun), the first alone reports and writes; all return the result.
    """
    if config.workers is not None:
        from fourmill.model.ray_train import pretrain_on_ray

        return pretrain_on_ray(dataset, config, progress, storage)
    store = open_store(config.out, storage)
    shares = config.datasets or (DatasetShare(uri=dataset),)
    with (
        joined(config) as workers,
        _threads(config.num_threads),
        contextlib.closing(open_data(shares, data_config(config), storage)) as data,
    ):
        _claim(store, config, data, dataset)
        if workers.gather(store.head("metrics.json") is None)[0]:
            run = _Run(store, data, config, workers)
            with contextlib.closing(run.states):
                run.fit(progress or (lambda report: log.info("%s", report)))
                run.publish(dataset, storage)
            workers.gather(None)  # the first process has published
        return PretrainResult(**json.loads(store.get("metrics.json")))


class _Run:
    """A run from its data to its checkpoint: what surrounds `Training`."""

    def __init__(self, store: Store, data: TokenDataset | Mixture, config: PretrainConfig, workers: Workers) -> None:
        self.store, self.data, self.config, self.workers = store, data, config, workers
        self.device = torch.device(workers.device)
        if self.device.type == "cpu":
            keep_memory()
        a = self.architecture = Architecture(
            **dict(config.model), domains_in=config.inputs, domains_out=config.targets, modalities=data.infos
        )
        self.masker = Masker(a, config.masking)
        self.held_out = HeldOut(data, self.masker, config.eval_samples, config.batch_size, config.crop)
        self.frequencies: dict[str, float] = {}
        if workers.is_first:
            counts = count_tokens(data, self.masker, a.names, a.domains_out)
            self.frequencies = self.held_out.frequency_loss(a.names, counts)

        self.training = Training(a, config, workers)
        self.loader = Loader(
            data,
            config.batch_size,
            config.seed,
            crop=config.crop,
            rank=workers.rank,
            world_size=workers.count,
            accumulate=config.accumulate,
        )
        peak = peak_of(self.device, config.autocast)
        self.meter = Meter(a, config, peak and peak * workers.count)
        self.states = States(store, workers, config.keep_states)
        self.curve, self.loader_state = list[dict[str, Any]](), self.loader.state_dict()
        self._restore()
        self._drawn = self.training.step  # steps whose masks are drawn, in the reading thread
        self._generator = torch.Generator(self.device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def fit(self, progress: Callable[[Progress], None]) -> None:
        """From the step that the state was of to the last one."""
        config, training, clock = self.config, self.training, Stopwatch()
        with (
            boards(self.store, config, training.step) if self.workers.is_first else contextlib.nullcontext(()) as sinks,
            contextlib.closing(read_ahead(self.loader, self._mask)) as batches,
            Interruption() as interruption,
        ):
            while training.step < config.steps:
                clock.lap()
                slices, state = next(batches)
                waited = clock.lap()
                figures, stopped = training.advance(slices, interruption)
                self.meter.add(figures, waited, waited + clock.lap())
                last = training.step == config.steps
                evaluated = last or training.step % config.eval_every == 0
                if evaluated or training.step % config.log_every == 0:
                    report = self._report(evaluated)
                    for sink in (*sinks, progress) if self.workers.is_first else ():
                        sink(report)
                self.loader_state = state
                if last or stopped or training.step % config.checkpoint_every == 0:
                    self._save()
                if stopped and not last:
                    self.states.wait()
                    raise KeyboardInterrupt(f"stopped at step {training.step} of {config.steps}; the state is saved")

    def _mask(self, batches: Sequence[RawBatch]) -> tuple[list[Slice], dict[str, Any]]:
        """This process's slices of the next step, and the loader's state after it. Runs in the reading thread."""
        config, first = self.config, self.workers.rank * self.config.accumulate
        slices = []
        with torch.cuda.stream(self._stream):  # on a CPU it does nothing
            for number, batch in enumerate(batches, first):
                self._generator.manual_seed(seed_of(config.seed, "mask", self._drawn, number))
                slices.append(self.masker(batch.to(self.device), self._generator))
        if self._stream is not None:
            self._stream.synchronize()  # this thread waits, so that the other one need not
        self._drawn += 1
        return slices, batches[-1].state

    def _report(self, evaluated: bool) -> Progress:
        found: dict[str, Any] = {}
        if evaluated:
            found["held_out"] = self._evaluate()
            if self.workers.is_first:  # who has counted, and who reports
                self.training.watch.evaluated(self.training.step, found["held_out"], self.frequencies)
            if self.config.ema is not None:
                with self.training.ema.applied():
                    found["held_out_ema"] = self._evaluate()
        step, events = self.training.step, self.training.watch.drain()
        report = self.meter.report(step, self.training.lr(step - 1), events=events, **found)
        seen = {"step": step, "loss": report.loss, "losses": report.losses, "grad_norm": report.grad_norm}
        self.curve.append({**seen, **found})
        return report

    def _evaluate(self) -> dict[str, float]:
        model = self.training.model
        losses = self.held_out.loss(model, self.device, self.config.autocast, self.workers)
        if hasattr(model, "reshard"):
            model.reshard()  # without a backward pass FSDP keeps what it has gathered, while the averages come and go
        return losses

    def _save(self) -> None:
        parts = {"watch": self.training.watch.state_dict(), "meter": self.meter.state_dict()}
        facts = {"loader": self.loader_state, "curve": self.curve, **parts}
        self.states.save(self.training.model, self.training.optimizer, self.training.ema, self.training.step, facts)

    def _restore(self) -> None:
        facts = self.states.restore(self.training.model, self.training.optimizer, self.training.ema)
        if facts is None:
            return
        self.training.step, self.curve, self.loader_state = facts["step"], facts["curve"], facts["loader"]
        self.loader.load_state_dict(self.loader_state)
        self.training.watch.load_state_dict(facts["watch"])
        self.meter.load_state_dict(facts["meter"])
        if self.workers.is_first:
            log.info("continuing at step %d of %d", self.training.step, self.config.steps)

    def publish(self, dataset: str, storage: StoreSettings | None) -> None:
        """Write the checkpoint, its result last, and drop the training state. All processes take part."""
        self.states.wait()
        self._publish_model(self.store)
        if self.config.ema is not None:
            with self.training.ema.applied():
                self._publish_model(open_store(join_uri(self.config.out, "ema"), storage))
        if not self.workers.is_first:
            return
        share = max(self.config.datasets, key=lambda s: s.weight, default=DatasetShare(uri=dataset))
        if (described := _tokenizers(share.uri, self.architecture.names, storage)) is not None:
            self.store.create("tokenizers.json", json.dumps(described, indent=1).encode())
        self.store.create("metrics.json", json.dumps(asdict(self._result()), indent=1).encode())
        self.states.drop()

    def _publish_model(self, store: Store) -> None:
        state = whole_state(self.training.model)
        if self.workers.is_first:
            plain = new_model(self.architecture, self.config.seed)  # not wrapped, not in shards
            plain.load_state_dict(state)
            save_model(plain, store)

    def _result(self) -> PretrainResult:
        last = self.curve[-1]
        self.loader.load_state_dict(self.loader_state)  # it has read ahead
        return PretrainResult(
            out=self.config.out,
            steps=self.config.steps,
            parameters=sum(p.numel() for p in self.training.model.parameters()),
            held_out_samples=self.held_out.samples,
            held_out=last["held_out"],
            held_out_ema=last.get("held_out_ema", {}),
            frequencies=self.frequencies,
            missing=self.data.missing(),
            curve=self.curve,
            mixture=self.loader.realised(),
            skipped=self.training.watch.skipped,
            events=self.training.watch.events,
            **self.meter.totals(),
        )


def _tokenizers(dataset: str, names: Sequence[str], storage: StoreSettings | None) -> dict[str, Any] | None:
    """What made the tokens of the dataset (of several the one with the largest share); None if nobody knows."""
    from fourmill.model.generate.tokenizers import describe

    try:
        return describe(read_manifest(open_store(dataset, storage)), names)
    except FileNotFoundError as error:  # an export as tars has no manifest
        log.warning("no tokenizers.json is written: %s", error)
        return None


def _claim(store: Store, config: PretrainConfig, data: TokenDataset | Mixture, dataset: str) -> None:
    """Write pretrain.json, or find that the one there is of the same run."""
    fields = config.model_dump(mode="json")
    ours = {"dataset": dataset, "dataset_digest": data.digest, "config": fields}
    if store.create("pretrain.json", json.dumps(ours, indent=1).encode()):
        return
    theirs = json.loads(store.get("pretrain.json"))
    there = PretrainConfig.model_validate(theirs["config"]).model_dump(mode="json")  # with what is new since
    differ = [
        f"{name}: {there[name]!r} there, {value!r} here"
        for name, value in fields.items()
        if name not in FREE and there[name] != value
    ]
    if theirs["dataset_digest"] != data.digest:
        differ.append("the dataset has changed since")
    if differ:
        raise ValueError(f"{config.out} holds another run ({'; '.join(differ)}); choose another `out` or delete it")


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
