"""What a verification said, for the report: from the output of `fourmill manifest verify --json`, or from the journal
that `verify --deep --resume` keeps."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.report.health import BAD, GOOD, LOOK, Check

_TITLE = "Objects verified"
_SQLITE = b"SQLite format 3\0"


def verified(path: str | Path, manifest: Manifest) -> Check:
    """The answer to 'have the objects been verified?'. ValueError if the file is neither."""
    with open(path, "rb") as file:
        is_journal = file.read(len(_SQLITE)) == _SQLITE
    return _journal(path, manifest) if is_journal else _outcome(path, manifest)


def _outcome(path: str | Path, manifest: Manifest) -> Check:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        ok, snapshot, deep = bool(found["ok"]), int(found["snapshot"]), bool(found["deep"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is neither the output of `manifest verify --json` nor its journal: {error!r}"
        ) from error
    counts, odd = _counted(found.get("counts")), _counted(found.get("warned"), "warning: ")
    did = (
        f"read {found.get('read', 0):,}" if deep else f"asked for the existence and size of {found.get('checked', 0):,}"
    )
    words = f"Snapshot {snapshot}: {did} of {found.get('objects', 0):,} objects."
    if not ok:
        return Check(_TITLE, BAD, f"{words} Not all are sound.", (*counts, *odd))
    if snapshot != manifest.snapshot:
        return Check(_TITLE, LOOK, f"{words} All sound, but the report is of snapshot {manifest.snapshot}.", odd)
    if odd or not deep or found.get("skipped"):
        return Check(_TITLE, LOOK, f"{words} {'All sound.' if deep else 'All there; none was read.'}", odd)
    return Check(_TITLE, GOOD, f"{words} All sound.")


def _counted(counts: Any, before: str = "") -> tuple[str, ...]:
    return tuple(f"{before}{code}: {n:,}" for code, n in counts.items()) if isinstance(counts, dict) else ()


def _journal(path: str | Path, manifest: Manifest) -> Check:
    """A journal names what was found sound, not what was not."""
    connection = sqlite3.connect(f"file:{Path(path).absolute()}?mode=ro", uri=True)
    try:
        (sound,) = connection.execute("SELECT COUNT(*) FROM sound").fetchone()
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is no journal of a verification: {error}") from error
    finally:
        connection.close()
    objects = sum(manifest.num_shards(m) for m in manifest.modalities)
    words = f"The journal of a deep verification names {sound:,} sound objects, of any snapshot; there are {objects:,}."
    return Check(_TITLE, LOOK, words)
