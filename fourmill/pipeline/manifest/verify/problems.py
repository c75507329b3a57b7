"""What a verification can find, and its outcome: every kind of problem has a code that stays, for scripts.

A dataset can be wrong a million times over (a bucket that was emptied), so each code's problems are listed up to a
limit and counted beyond it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

CODES: dict[str, str] = {
    # From the manifest alone.
    "missing-table": "a record table, sample table or list of retries that the snapshot names is gone",
    "wrong-table": "a record or sample table's bytes are not those that the snapshot names",
    "bad-table": "a record table holds what it cannot: another modality's rows, out of order, under another name",
    "wrong-counts": "the snapshot's sums are not those of its record table",
    "wrong-fingerprint": "a shard's fingerprint does not follow from its recipe and inputs, and the snapshot says so",
    "unknown-producer": "a record names a producer that the snapshot does not describe",
    "missing-shards": "a modality lacks shards that the pictures have",
    "extra-shards": "a modality has shards that the pictures lack",
    "misaligned-keys": "by its record, a shard's keys differ from those of its other modalities",
    "mixed-generations": "a modality was made by more than one recipe",
    # By asking the store.
    "missing-object": "a shard object is gone",
    "wrong-size": "a shard object has another size than its record says",
    # By reading the objects.
    "unreadable-object": "the store failed to give the object",
    "wrong-digest": "a shard object's bytes are not those of its record",
    "bad-format": "a shard object's bytes are its record's, but no whole shard object",
    "wrong-identity": "a shard object says that it is another modality, shard, fingerprint or producer's",
    "wrong-rows": "a shard object has another number of rows than its record says",
    "wrong-presence": "a shard object has another number of values than its record says",
    "wrong-spec": "a shard object's spec is not its record's",
    "wrong-quarantine": "a shard object's quarantine names keys it lacks, or other counts than its record",
    "swapped-rows": "two rows of a shard object stand in each other's place",
    "misordered-rows": "a shard object holds the right keys in another order",
    "wrong-keys": "a shard object holds keys that the shard's other modalities do not",
    "duplicate-key": "one key stands in two rows, of one shard or of two",
    "wrong-length": "a grid's rows are not as long as its spec says",
    "token-range": "a token is not below the vocabulary",
    "undecodable-value": "a stored value cannot be decoded",
    "not-finite": "a map holds NaN or infinite values",
    "wrong-shape": "a map is not of its shard's shape",
    "bad-value": "a value is not what its modality promises",
    "constant-value": "a map, a feature map or a token grid is one number everywhere",
    "missing-record": "a shard object's JSON record is gone",
    "wrong-record": "a shard object's JSON record is not the manifest's",
    "other-statistics": "a JSON record's statistics are not what this version counts in the object",
}
LISTED = 1000
"""Problems of one code that are listed; more are counted."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with one object: which, where in it, and what. A warning is odd, but may be true."""

    code: str
    name: str
    what: str
    modality: str | None = None
    shard: int | None = None
    row: int | None = None
    key: str | None = None
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


class Findings:
    """Problems as they come in."""

    def __init__(self) -> None:
        self.listed: list[Problem] = []
        self.counts: Counter[str] = Counter()
        self.warned: Counter[str] = Counter()

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            assert problem.code in CODES, problem.code
            counts = self.warned if problem.warning else self.counts
            counts[problem.code] += 1
            if counts[problem.code] <= LISTED:
                self.listed.append(problem)

    def drop(self, code: str, names: set[str]) -> None:
        """Forget what has been found under a better name since."""
        kept = [p for p in self.listed if p.code != code or p.name not in names]
        self.counts[code] -= len(self.listed) - len(kept)
        self.listed = kept


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`.

    `objects`: shard objects that the snapshot names; `checked`: looked at; `read`: read whole, `num_bytes` in all;
    `resumed`: not read, as a journal says that they were sound and they have not changed. `skipped`: objects not
    looked at, by reason. `unchecked`: what was not checked at all, in words. `counts`, `warned`: problems and warnings
    by code, also those beyond the listed.
    """

    snapshot: int
    deep: bool
    objects: int
    checked: int = 0
    read: int = 0
    num_bytes: int = 0
    resumed: int = 0
    tables: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    warned: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"{p.code}: {p}" for p in self.problems] + _beyond(self.problems, self.counts)
        lines += [f"warning: {p.code}: {p}" for p in self.warnings] + _beyond(self.warnings, self.warned)
        return "\n".join([*lines, *self._summary()])

    def _summary(self) -> list[str]:
        errors, odd = sum(self.counts.values()), sum(self.warned.values())
        verdict = "all sound" if self.ok else f"{errors:,} problem{'s'[: errors != 1]}"
        verdict += f", {odd:,} warning{'s'[: odd != 1]}" if odd else ""
        if self.deep:
            did = f"read {self.read:,} of {self.objects:,} objects ({self.num_bytes / 1e6:,.1f} MB)"
            did += f", {self.resumed:,} known to be sound" if self.resumed else ""
        else:
            did = f"asked for existence and size of {self.checked:,} of {self.objects:,} objects"
        lines = [f"snapshot {self.snapshot}: read {self.tables:,} record tables, {did}: {verdict}"]
        lines += [f"  not looked at: {n:,} objects {reason}" for reason, n in self.skipped.items()]
        lines += [
            f"  {n:,} x {code}: {CODES[code]}" for code, n in (Counter(self.counts) + Counter(self.warned)).items()
        ]
        return [*lines, *(f"  not checked: {words}" for words in self.unchecked)]


def _beyond(listed: Iterable[Problem], counts: dict[str, int]) -> list[str]:
    """How many more there are of codes whose list was cut off."""
    here = Counter(p.code for p in listed)
    return [f"{code}: … and {n - here[code]:,} more" for code, n in counts.items() if n > here[code]]
