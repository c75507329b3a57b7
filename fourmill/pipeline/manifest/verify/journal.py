"""What a deep verification has found sound so far, on disk: a killed one goes on where it was.

An SQLite file, so that neither a kill at any moment nor twelve million objects are a problem. It remembers of each
sound object its digest, size and time of change, and of each shard the hashes of its keys. An object that has changed
since, or whose record has, is read again.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from fourmill.pipeline.manifest.verify.problems import Problem
from fourmill.pipeline.shards import Record

_VERSION = 1
_COMMIT_EVERY_S = 2.0
_TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sound (
    name TEXT PRIMARY KEY, digest TEXT, num_bytes INTEGER, modified REAL, warnings TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS keys (shard INTEGER PRIMARY KEY, hashes BLOB);
"""


class Journal:
    """Open for one verification of the dataset `uri`; ValueError if the file is another's."""

    def __init__(self, path: str | Path, uri: str) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path)
            self._db.executescript(_TABLES)
            about = dict(self._db.execute("SELECT name, value FROM about"))
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no journal of a verification: {error}") from error
        if about and (about["dataset"], about["version"]) != (uri, str(_VERSION)):
            was = f"of {about['dataset']}, version {about['version']}"
            raise ValueError(f"{path} is the journal {was}; {uri}, version {_VERSION}, needs another file")
        about_now = {"dataset": uri, "version": str(_VERSION)}
        self._db.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", about_now.items())
        self._db.commit()
        self._committed = time.monotonic()

    def sound(self, records: Sequence[Record]) -> dict[str, tuple[int, float]]:
        """Of those of these objects that were found sound: size and time of change."""
        ask = "SELECT num_bytes, modified FROM sound WHERE name = ? AND digest = ?"
        found = {r.name: self._db.execute(ask, (r.name, r.digest)).fetchone() for r in records}
        return {name: row for name, row in found.items() if row}

    def warnings(self, record: Record) -> list[Problem]:
        """What was odd about a sound object."""
        row = self._db.execute("SELECT warnings FROM sound WHERE name = ?", (record.name,)).fetchone()
        return [Problem(**fields) for fields in json.loads(row[0])] if row else []

    def has_keys(self, shard: int) -> bool:
        return self._db.execute("SELECT 1 FROM keys WHERE shard = ?", (shard,)).fetchone() is not None

    def add(self, record: Record, modified: float, warnings: Sequence[Problem], hashes: bytes | None) -> None:
        """Note a sound object, with its keys' hashes where it stands for its shard."""
        notes = json.dumps([asdict(w) for w in warnings])
        row = (record.name, record.digest, record.num_bytes, modified, notes)
        self._db.execute("INSERT OR REPLACE INTO sound VALUES (?, ?, ?, ?, ?)", row)
        if hashes is not None:
            self._db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?)", (record.shard, hashes))
        if time.monotonic() - self._committed > _COMMIT_EVERY_S:
            self.commit()

    def commit(self) -> None:
        self._db.commit()
        self._committed = time.monotonic()

    def num_keys(self) -> int:
        return int(self._db.execute("SELECT COALESCE(SUM(LENGTH(hashes)), 0) / 8 FROM keys").fetchone()[0])

    def keys(self) -> Iterator[tuple[int, bytes]]:
        """(shard, hashes of its keys), by shard."""
        yield from self._db.execute("SELECT shard, hashes FROM keys ORDER BY shard")

    def close(self) -> None:
        self._db.commit()
        self._db.close()
