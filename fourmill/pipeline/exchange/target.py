"""The dataset that an import fills: what it holds already must be what the import would put there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fourmill.pipeline.manifest import Manifest, Update, read_manifest, update_manifest
from fourmill.pipeline.shards import Record
from fourmill.pipeline.store import Store


class Target:
    """The dataset to be: what it holds already, and its snapshots."""

    def __init__(self, store: Store, src: str) -> None:
        self.store, self.src = store, src
        try:
            self.before: Manifest | None = read_manifest(store)
        except FileNotFoundError:
            self.before = None

    def check(self, name: str, number: int, fingerprint: str) -> None:
        """ValueError if the dataset holds something else in this place, or is finished and holds nothing there."""
        known = self.before.record(name, number) if self.before else None
        finished = self.before is not None and self.before.corpus
        if known.fingerprint == fingerprint if known else not finished:
            return
        corpus = self.before.corpus if self.before else {}
        held = ", ".join(map(repr, corpus.get("sources", ["an unfinished import"])))
        raise ValueError(
            f"{self.store.uri} already holds the corpus {held}, and {self.src!r} is another: {name} shard {number} "
            "differs; nothing was changed, import into another dataset"
        )

    def publish(
        self,
        records: Sequence[Record],
        producers: Mapping[str, Mapping[str, Any]],
        corpus: Mapping[str, Any] | None = None,
        samples: Sequence[Mapping[str, Any]] | None = None,
    ) -> Manifest:
        """These records as a snapshot; with the last ones, what the corpus is."""

        def change(old: Manifest) -> Update | None:
            if not old.corpus:
                return Update(records, producers, corpus, sample_tables=samples)
            if corpus and old.corpus.get("digest") != corpus["digest"]:
                count = old.corpus.get("samples")
                raise ValueError(f"the dataset holds another corpus, of {count} samples: import into another dataset")
            return None

        return update_manifest(self.store, change)
