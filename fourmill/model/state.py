"""The state of a training run, from which a run that was stopped continues as if nothing had happened.

    state/step-00000500/shard-00001-….safetensors    each process's share of parameters, averages and EMA
    state/step-00000500/complete                      JSON, created last: the step, the loader's integers, the curve

Invariant: a state without `complete` is never read, so one that was being written when the process died does not
count. Tensors are written by torch.distributed.checkpoint while training goes on, as safetensors, nothing pickled; any
number of processes reads what any other number has written. Random numbers need no state: masks, crops and order are
functions of seed and step.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from fourmill.model.network import FourM
from fourmill.model.optimizer import Ema
from fourmill.pipeline.store import Store
from fourmill.tokenizers.training.workers import Workers

_COMPLETE = re.compile(r"(state/step-\d{8})/complete")
_AVERAGES = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter, beside the number of its steps


class States:
    """The states of one run. All processes take part in every call but the constructor's checks."""

    def __init__(self, store: Store, workers: Workers, keep: int) -> None:
        self.store, self.workers, self.keep = store, workers, keep
        # Its own group: tensors are written in a thread, beside the collectives of the steps; and nccl has no CPU side.
        self._group = distributed.new_group(backend="gloo") if distributed.is_initialized() else None
        self._saving: Future[Any] | None = None
        if self._group is None:  # said at every save
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

    def save(self, model: FourM, optimizer: torch.optim.Optimizer, ema: Ema, step: int, facts: dict[str, Any]) -> None:
        """Copy everything and return; a thread writes it and then drops old states. One is written at a time."""
        self.wait()
        writer = _Writer(self.store, f"state/step-{step:08d}", json.dumps({"step": step, **facts}).encode(), self._trim)
        tensors = _tensors(model, optimizer, ema)
        self._saving = dcp.async_save(tensors, storage_writer=writer, **self._how())  # type: ignore[assignment]

    def wait(self) -> None:
        """Until the state being written is complete; raises what went wrong."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()  # in each process, once the first one has created `complete`

    def restore(self, model: FourM, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, Any] | None:
        """Put the newest complete state into place; its facts, or None if there is none. Incomplete ones go.

        ValueError for a state of another kind, which is left as it is.
        """
        states = complete_states(self.store)
        newest = self.workers.gather(states[-1] if states else None)[0]  # all go on from the same one
        foreign = [name for name in self.store.names("state/") if name.count("/") == 1]
        if foreign:
            raise ValueError(
                f"{self.store.uri}/{foreign[0]} is a state of an earlier Fourmill, not read by this one: finish the "
                "run with that version, or delete the folder `state`"
            )
        if self.workers.is_first:
            self._drop(keep=states)
        if newest is None:
            return None
        with _local_folder(self.store, newest) as folder:
            dcp.load(_tensors(model, optimizer, ema), storage_reader=HuggingFaceStorageReader(folder), **self._how())
        facts: dict[str, Any] = json.loads(self.store.get(f"{newest}/complete"))
        return facts

    def close(self) -> None:
        """Let a state that is being written become complete, whatever has happened to the run."""
        self.wait()

    def drop(self) -> None:
        """A finished run needs none."""
        if self.workers.is_first:
            self._drop(keep=())

    def _how(self) -> dict[str, Any]:
        return {"process_group": self._group, "no_dist": self._group is None}

    def _trim(self) -> None:
        self._drop(keep=complete_states(self.store)[-self.keep :])

    def _drop(self, keep: Collection[str]) -> None:
        names = [name for name in self.store.names("state/") if name.rpartition("/")[0] not in keep]
        for name in sorted(names, key=lambda name: not name.endswith("/complete")):  # half a state must not count
            self.store.delete(name)


def complete_states(store: Store) -> list[str]:
    """The folders of the states that can be read, oldest first."""
    found = [_COMPLETE.fullmatch(name) for name in store.names("state/")]
    return sorted(match[1] for match in found if match)


class _Writer(HuggingFaceStorageWriter):  # type: ignore[misc]
    """Writes into the store's folder, or through a temporary one to where the store is; `complete` when all have."""

    def __init__(self, store: Store, name: str, facts: bytes, trim: Callable[[], None]) -> None:
        self.store, self.name, self.facts, self.trim = store, name, facts, trim
        self.folder = store.local_path(name)
        self._temporary = None if self.folder else tempfile.TemporaryDirectory(prefix="fourmill-state-")
        super().__init__(str(self.folder or self._temporary.name), save_distributed=True)  # type: ignore[union-attr]

    def write_data(self, plan: Any, planner: Any) -> Any:
        """This process's share."""
        written = super().write_data(plan, planner)
        written.wait()
        if self._temporary:
            for path in sorted(Path(self._temporary.name).glob("*.safetensors")):
                self.store.create(f"{self.name}/{path.name}", path.read_bytes())
            self._temporary.cleanup()
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        """In the first process, once all have written."""
        super().finish(metadata, results)
        self.store.create(f"{self.name}/complete", self.facts)
        self.trim()


@contextmanager
def _local_folder(store: Store, name: str) -> Iterator[str]:
    """Where the state's files can be read; from object storage each process fetches its own copy."""
    local = store.local_path(name)
    if local is not None:
        yield str(local)
        return
    with tempfile.TemporaryDirectory(prefix="fourmill-state-") as folder:
        for found in store.names(f"{name}/"):
            (Path(folder) / found.rpartition("/")[2]).write_bytes(store.get(found))
        yield folder


def _tensors(model: FourM, optimizer: torch.optim.Optimizer, ema: Ema) -> dict[str, torch.Tensor]:
    """Everything by name, as views: loading fills them in place."""
    tensors = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        tensors[f"model.{name}"] = parameter.detach()
        state = _state_of(optimizer, parameter)
        tensors |= {f"{average}.{name}": state[average] for average in _AVERAGES}
        tensors[f"step.{name}"] = state["step"].view(1)  # the reader knows no tensors without dimensions
    if ema.means:
        tensors |= {f"ema.{name}": mean for name, mean in zip(parameters, ema.means, strict=True)}
    return tensors


def _state_of(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """What the optimizer keeps; a parameter that had no gradient yet gets what its first step would begin with."""
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        on = parameter.device if optimizer.param_groups[0]["fused"] else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=on)
        state |= {average: torch.zeros_like(parameter) for average in _AVERAGES}
    return state
