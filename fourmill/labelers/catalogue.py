"""The teachers that practitioners use, as one table (catalogue.yaml): what each makes, checkpoint, licences, costs.

The table is advice, not a limit: a labeler takes any checkpoint of its families. A run records the licence that the
card of the checkpoint states which it really used, not the table's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fourmill.checkpoints import is_non_commercial
from fourmill.modalities import unknown


@dataclass(frozen=True)
class Entry:
    """One teacher: `labeler` and `options` configure it.

    `code`, `weights`: licences. `millions`: parameters. `pixels`: side of the network's own input. `gflops`,
    `megabytes`: for one picture, `megabytes` of activations in float32. None: not counted.
    """

    id: str
    labeler: str
    makes: tuple[str, ...]
    checkpoint: str
    code: str
    weights: str
    millions: float | None = None
    pixels: int | None = None
    gflops: float | None = None
    megabytes: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def non_commercial(self) -> bool:
        """Usable by naming it; never a default."""
        return is_non_commercial(self.weights)

    @property
    def configuration(self) -> dict[str, Any]:
        """What to write under `labelers:` for it."""
        checkpoint = {"checkpoint": self.checkpoint} if self.checkpoint else {}
        return {"kind": self.labeler, **checkpoint, **self.options}


def _read() -> tuple[Entry, ...]:
    lines = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return tuple(Entry(**{**line, "makes": tuple(line["makes"])}) for line in lines)


ENTRIES = _read()


def entry(id: str) -> Entry:
    """The table's line `id`. ValueError names the nearest known one."""
    found = next((e for e in ENTRIES if e.id == id), None)
    if found is None:
        raise ValueError(unknown("teacher", id, [e.id for e in ENTRIES]))
    return found


def is_present(checkpoint: str) -> bool:
    """Whether a checkpoint is on this machine: one of the demo's, a local folder, or in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache

    if not checkpoint or checkpoint.startswith("demo:") or Path(checkpoint).exists():
        return True
    name, _, revision = checkpoint.partition("@")
    files = ("config.json", "open_clip_config.json")
    return any(isinstance(try_to_load_from_cache(name, f, revision=revision or None), str) for f in files)


def rows(entries: Iterable[Entry] = ENTRIES) -> list[dict[str, Any]]:
    """The table for machines: one dictionary a teacher."""
    fields = ("id", "labeler", "checkpoint", "code", "weights", "millions", "pixels", "gflops", "megabytes")
    return [
        {name: getattr(e, name) for name in fields}
        | {"makes": list(e.makes), "non_commercial": e.non_commercial, "present": is_present(e.checkpoint)}
        for e in entries
    ]
