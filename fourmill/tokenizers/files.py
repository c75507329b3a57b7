"""Reading one file of a checkpoint, from its folder or from the hub, without fetching the others."""

from __future__ import annotations

from pathlib import Path

from fourmill.checkpoints import Checkpoint


def read_file(checkpoint: Checkpoint, name: str) -> bytes:
    """The file's bytes; ValueError names checkpoint and file if it is not there."""
    path = Path(checkpoint.location) / name if checkpoint.is_local else _from_hub(checkpoint, name)
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.iterdir()))
        raise ValueError(f"checkpoint {checkpoint.reference!r} has no {name}; it holds: {there}")
    return path.read_bytes()


def _from_hub(checkpoint: Checkpoint, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(checkpoint.location, name, revision=checkpoint.revision))
    except EntryNotFoundError as error:
        raise ValueError(f"checkpoint {checkpoint.reference!r} has no {name}") from error


def has_file(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the checkpoint holds the file."""
    try:
        read_file(checkpoint, name)
    except ValueError:
        return False
    return True
