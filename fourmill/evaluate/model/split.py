"""Which samples a checkpoint was not trained on. A figure on training data is none, so it is refused.

Training holds samples out by a hash of the key alone (`fourmill.pipeline.splits`), so that whatever is held out by the
same share is new to the model, in its own dataset and in any other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fourmill.evaluate.tokens.rows import keys_of
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.splits import is_held_out
from fourmill.pipeline.store import StoreError, open_store

log = logging.getLogger(__name__)

Split = Literal["held-out", "all"]
_USUAL_SHARE = 0.125  # `PretrainConfig.held_out`; for checkpoints that do not say how they were trained


@dataclass(frozen=True)
class Training:
    """What `pretrain.json` beside a checkpoint says. `known`: there is one."""

    known: bool
    held_out: float = _USUAL_SHARE
    datasets: tuple[str, ...] = ()

    def is_new(self, key: str) -> bool:
        """Whether training held this key out."""
        return is_held_out(key, self.held_out)


def training_of(checkpoint: str) -> Training:
    """How a checkpoint folder (path or s3:// URI) was trained; unknown for hub ids and published weights.

    ValueError for a pretrain.json that cannot be read, since then nothing is known to be held out.
    """
    if not (Path(checkpoint).expanduser().is_dir() or "://" in checkpoint):
        return Training(known=False)
    store = open_store(checkpoint)
    if store.head("pretrain.json") is None:
        return Training(known=False)
    try:
        tree: dict[str, Any] = json.loads(store.get("pretrain.json"))
        config = tree["config"]
        shares = config.get("datasets") or ({"uri": tree["dataset"]},)
        return Training(True, float(config["held_out"]), tuple(str(share["uri"]) for share in shares))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint}/pretrain.json does not say what was held out: {error!r}") from error


def wanted_keys(training: Training, split: Split, checkpoint: str) -> Callable[[str], bool]:
    """Which keys are evaluated. ValueError where training held nothing out."""
    if split == "all":
        return lambda key: True
    if training.known and training.held_out == 0:
        raise ValueError(
            f"{checkpoint} was trained with held_out: 0, on all samples of {', '.join(training.datasets)}: evaluate it "
            "on another dataset with --split all"
        )
    return training.is_new


def refuse_trained(training: Training, keys: Iterable[str]) -> list[str]:
    """ValueError if some of the keys were trained on; else what a reader must know of how far that is certain."""
    if not training.known:
        return [
            "the checkpoint has no pretrain.json: it is not known what it was trained on, so that these figures may be "
            "on training data"
        ]
    suspects = {key for key in keys if not training.is_new(key)}
    if not suspects:
        return []
    unread = []
    for uri in training.datasets:
        try:
            trained = suspects & _keys(uri)
        except (OSError, ValueError, StoreError) as error:
            unread.append(f"{uri} ({error})")
            continue
        if trained:
            raise ValueError(
                f"{len(trained)} of the samples, such as {min(trained)!r}, were trained on (in {uri}): a figure on "
                "training data says nothing; use --split held-out"
            )
    return [f"it cannot be told which samples were trained on: {what}" for what in unread]


def _keys(uri: str) -> set[str]:
    store = open_store(uri)
    manifest = read_manifest(store)
    return {key for number in manifest.shards.tolist() for key in keys_of(store, manifest, number)}
