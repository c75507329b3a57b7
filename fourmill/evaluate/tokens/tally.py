"""What the tokens of one modality by one producer have come to so far, against labels and against truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fourmill.evaluate.labels import MEASURES, count_reason
from fourmill.evaluate.measure import IncomparableError, Measure
from fourmill.evaluate.results import Place, Worst
from fourmill.evaluate.tokens.codes import code_use
from fourmill.evaluate.tokens.measure import Fidelity
from fourmill.evaluate.tokens.rebuild import BAD_VALUE, Rebuilt
from fourmill.evaluate.tokens.results import TokenScore, TruthScore
from fourmill.evaluate.truth import Truth, TruthSource
from fourmill.modalities import modality
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.manifest.show import described
from fourmill.pipeline.shards import Spec


class Tally:
    """What the tokens of one modality by one producer have come to so far."""

    def __init__(self, manifest: Manifest, key: tuple[str, str], rebuilt: Rebuilt | str, worst: int) -> None:
        self.name, self.producer = key
        self.use = code_use(manifest.statistics(self.name).get(self.producer, {}))
        self.described = described(manifest.producers.get(self.producer, {}))
        self.source = str(modality(self.name).source)
        self.rebuilt = rebuilt if isinstance(rebuilt, Rebuilt) else None
        self.reason = rebuilt if isinstance(rebuilt, str) else ""
        self.fidelity: Fidelity | None = None
        self.truth: AgainstTruth | None = None
        self.compared = self.without_label = self.missing = 0
        self.unusable: Counter[str] = Counter()
        self.malformed: Counter[str] = Counter()
        self.worst = Worst(worst)

    def restored(self, rows: Sequence[np.ndarray]) -> list[Any]:
        """The values of rows of ids; None, and counted, for those that cannot be decoded."""
        assert self.rebuilt is not None
        values: list[Any] = []
        for found in self.rebuilt.restore_each(rows):
            if isinstance(found, Exception):
                count_reason(self.unusable, found)
                values.append(None)
                continue
            value, problems = found
            for problem in problems:
                count_reason(self.malformed, ValueError(problem.rpartition(": ")[2]))  # without the words themselves
            values.append(value)
        return values

    def compare(self, value: Any, label: Any, place: Place, crop: int) -> None:
        """One value against its label."""
        if label is None:
            self.without_label += 1
            return
        assert self.fidelity is not None
        try:
            badness = self.fidelity.add(value, label)
        except BAD_VALUE as error:
            count_reason(self.unusable, error)
            return
        self.compared += 1
        self.worst.add(Place(place.key, place.shard, place.row, crop, badness))

    def score(self) -> TokenScore:
        notes = [f"not decoded: {self.reason}"] if self.reason else list(self.rebuilt.notes if self.rebuilt else ())
        if self.without_label:
            notes.append(f"no label is stored for {self.without_label} values: code use and truth only")
        measured: dict[str, Any] = {}
        if self.fidelity is not None and self.compared:
            notes += self.fidelity.notes()
            measured = {"figures": self.fidelity.figures(), "per_class": self.fidelity.per_class()}
            measured["protocol"] = self.fidelity.protocol
        return TokenScore(
            self.name,
            self.described,
            self.use,
            compared=self.compared,
            without_label=self.without_label,
            missing=self.missing,
            unusable=dict(self.unusable),
            malformed=dict(self.malformed),
            truth=self.truth.score() if self.truth else None,
            notes=tuple(notes),
            worst=self.worst.places,
            **measured,
        )


class AgainstTruth:
    """Decoded values and their labels against the same truth."""

    def __init__(self, source: str, spec: Spec, truth: TruthSource, size: int, notes: Sequence[str]) -> None:
        self.notes = list(notes)
        self.decoded: Measure | None = None
        try:
            self.decoded = MEASURES[source](spec, truth, size)
            self.label = MEASURES[source](spec, truth, size)
        except IncomparableError as error:
            self.notes.append(f"not compared: {error}")
        self.compared = self.labelled = 0
        self.unusable: Counter[str] = Counter()

    @property
    def parts(self) -> frozenset[str]:
        """Which parts of the truth it reads."""
        return self.decoded.parts if self.decoded is not None else frozenset()

    def add(self, value: Any, label: Any, truth: Truth) -> None:
        """One value and its label, where it has one."""
        if self.decoded is None:
            return
        try:
            found = self.decoded.add(value, truth)
            self.compared += found is not None
            if found is not None and label is not None:
                self.labelled += self.label.add(label, truth) is not None
        except BAD_VALUE as error:
            count_reason(self.unusable, error)

    def score(self) -> TruthScore:
        notes = [*self.notes, *(f"{count} unusable: {reason}" for reason, count in self.unusable.items())]
        if self.decoded is None:
            return TruthScore("", 0, {}, notes=tuple(notes))
        decoded = self.decoded.figures() if self.compared else {}
        label = self.label.figures() if self.labelled and self.labelled == self.compared else {}
        return TruthScore(self.decoded.protocol, self.compared, decoded, label, tuple(notes))
