"""Naming weights: `demo:depth` (ships with Fourmill), a local folder or file, `s3://…`, or a hub id (`id@revision`).

A checkpoint's digest is part of the fingerprint of everything made with it, so changed weights mean new work.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fourmill.pipeline.shards import digest
from fourmill.pipeline.store import open_store

DEMO_FOLDER = Path(__file__).parent / "demo" / "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """`location`: a local folder, or a hub id for the owning library to load at `revision`. `digest` identifies the
    weights wherever they lie; `licence` is that of the weights, as stated beside them, or 'unknown'."""

    reference: str
    location: str
    revision: str | None
    digest: str
    licence: str

    @property
    def is_local(self) -> bool:
        return Path(self.location).exists()

    def lineage(self) -> dict[str, str]:
        return {"reference": self.reference, "digest": self.digest, "licence": self.licence}


def is_non_commercial(licence: str) -> bool:
    """Whether a licence forbids commercial use, as far as its name tells: CC-BY-NC, 'research', 'non-commercial'."""
    words = re.split(r"[^a-z]+", licence.lower())
    return bool({"nc", "noncommercial", "research"} & set(words)) or "non-commercial" in licence.lower()


def resolve(reference: str) -> Checkpoint:
    """Find a checkpoint and its digest without loading it. ValueError says what was looked for and where."""
    if reference.startswith("demo:"):
        return _local(reference, DEMO_FOLDER / reference.removeprefix("demo:"))
    if reference.startswith("s3://"):
        return _local(reference, _download(reference))
    path = Path(reference).expanduser()
    if path.is_dir():
        return _local(reference, path.absolute())
    if path.is_file():
        return Checkpoint(reference, str(path.absolute()), None, _file_digest(path), _licence(path.parent))
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise ValueError(f"no checkpoint at {reference!r}: not a folder, and a hub id would be 'owner/name'")
    return _hub(reference)


def _local(reference: str, folder: Path) -> Checkpoint:
    if not folder.is_dir():
        beside = sorted(p.name for p in folder.parent.glob("*") if p.is_dir()) if folder.parent.is_dir() else []
        raise ValueError(f"no checkpoint {reference!r}: {folder} is not a folder; beside it: {', '.join(beside)}")
    return Checkpoint(reference, str(folder), None, _folder_digest(folder), _licence(folder))


def _folder_digest(folder: Path) -> str:
    """Digest of all files but the prose: names and contents."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".md", ".txt"))
    if not files:
        raise ValueError(f"the checkpoint folder {folder} is empty")
    return digest(*(part for p in files for part in (p.relative_to(folder).as_posix(), _file_digest(p))))


def _file_digest(path: Path) -> str:
    stat = path.stat()
    return _cached_digest(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _cached_digest(path: str, num_bytes: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(path)


def _slow(path: str) -> str:
    """Python 3.10 has no hashlib.file_digest."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _licence(folder: Path) -> str:
    """The `license:` line of the card's front matter, the hub's convention."""
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines()[:40] if card.is_file() else []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("license:")]
    return found[0] if found else "unknown"


def _download(uri: str) -> Path:
    """Copy a checkpoint from object storage into the cache, once per content listing."""
    store = open_store(uri)
    listing = list(store.list())
    if not listing:
        raise ValueError(f"no checkpoint at {uri!r}: nothing is stored there")
    tag = digest(uri, json.dumps([(i.name, i.num_bytes) for i in listing]))[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fourmill" / "checkpoints" / tag
    for info in listing:
        target = cache / info.name
        if not (target.is_file() and target.stat().st_size == info.num_bytes):
            target.parent.mkdir(parents=True, exist_ok=True)
            waiting = target.with_name(f".{target.name}.{os.getpid()}")
            waiting.write_bytes(store.get(info.name))
            waiting.replace(target)
    return cache


def _hub(reference: str) -> Checkpoint:
    """Pin a hub id to the commit it names now; offline, to the commit in the local cache."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, _, revision = reference.partition("@")
    try:
        if constants.HF_HUB_OFFLINE:
            cached = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
            return Checkpoint(reference, str(cached), cached.name, f"hub:{cached.name}", _licence(cached))
        info = HfApi().model_info(name, revision=revision or None)
    except RepositoryNotFoundError as error:
        raise ValueError(f"no checkpoint {reference!r}: neither a local folder nor a public hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"cannot look up checkpoint {reference!r} on the hub: {error}") from error
    licence = str(info.card_data.get("license", "unknown")) if info.card_data else "unknown"
    return Checkpoint(reference, name, info.sha, f"hub:{info.sha}", licence)
