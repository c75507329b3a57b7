"""WebDataset: one tar a shard, a sample's modalities side by side: `<key>.rgb.jpg`, `<key>.depth.npy`, `<key>.det.json`

A null has no member. Megatron-Energon's layout is the same with the index files that `energon prepare` would make.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import yaml

from fourmill.modalities import modality
from fourmill.pipeline.exchange import members
from fourmill.pipeline.exchange.layout import Content
from fourmill.pipeline.exchange.rows import Run
from fourmill.pipeline.exchange.stems import stem_of
from fourmill.pipeline.exchange.tars import archive
from fourmill.pipeline.manifest import Manifest

Member = tuple[str, bytes]


class WebDataset:
    """`shards/shard-000012.tar`."""

    name: ClassVar[str] = "webdataset"
    keeps_incomplete: ClassVar[bool] = True

    def __init__(self, content: Content) -> None:
        self.content = content

    @classmethod
    def select(cls, manifest: Manifest, wanted: Sequence[str] | None) -> tuple[str, ...]:
        return tuple(wanted if wanted is not None else manifest.modalities)

    def files(self, number: int, run: Run) -> Iterator[tuple[str, bytes, Mapping[str, int]]]:
        data, _ = archive(m for row in range(len(run.keys)) for m in self._members(run, row))
        yield f"shards/shard-{number:06d}.tar", data, {}

    def _members(self, run: Run, row: int) -> list[Member]:
        """A sample's files, sorted by name."""
        stem, found = stem_of(run.keys[row]), []
        for name in self.content.modalities:
            entry = modality(name)
            for crop, column in enumerate(run.parts[name].columns):
                if column[row] is not None:
                    extension, data = members.to_file(entry, column[row])
                    found.append((f"{stem}.{members.suffix(name, crop, extension)}", data))
        return sorted(found)

    def folders(self) -> dict[str, Any]:
        return {name: {"suffix": name} for name in self.content.modalities}

    def extra(self, parts: Sequence[tuple[int, int]]) -> Iterator[Member]:
        yield from ()

    def usage(self, shards: int) -> str:
        return (
            "```python\nimport webdataset\n"
            f'tars = "shards/shard-{{000000..{shards - 1:06d}}}.tar"\n'
            'samples = webdataset.WebDataset(tars, shardshuffle=False).decode("pil")\n'
            "```\n"
        )


class Energon(WebDataset):
    """The same tars with `.nv-meta` and an index of each tar. A sample without any member would not be counted by
    Energon, so incomplete samples are left out."""

    name: ClassVar[str] = "energon"
    keeps_incomplete: ClassVar[bool] = False

    def files(self, number: int, run: Run) -> Iterator[tuple[str, bytes, Mapping[str, int]]]:
        samples = [self._members(run, row) for row in range(len(run.keys))]
        data, offsets = archive(m for sample in samples for m in sample)
        yield f"shards/shard-{number:06d}.tar", data, {}
        # Where each sample begins, and where the last one ends, as Energon's own indexer writes it.
        bounds = [offsets[i] for i in itertools.accumulate(map(len, samples), initial=0)]
        yield f"shards/shard-{number:06d}.tar.idx", struct.pack(f"<{len(bounds)}Q", *bounds), {}

    def extra(self, parts: Sequence[tuple[int, int]]) -> Iterator[Member]:
        counts = {f"shards/shard-{number:06d}.tar": rows for number, rows in parts}
        splits: dict[str, list[str]] = {name: [] for name in ("train", "val", "test")}
        splits[self.content.split] = list(counts)
        dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
        info = {"shard_counts": counts}
        yield ".nv-meta/dataset.yaml", yaml.safe_dump(dataset).encode()
        yield ".nv-meta/split.yaml", yaml.safe_dump({"split_parts": splits, "exclude": []}).encode()
        yield ".nv-meta/.info.yaml", yaml.safe_dump(info).encode()  # Energon up to 6
        yield ".nv-meta/.info.json", json.dumps(info, indent=1).encode()  # from 7 on

    def usage(self, shards: int) -> str:
        return (
            "```python\nfrom megatron.energon import WorkerConfig, get_train_dataset\n"
            'dataset = get_train_dataset(".", worker_config=WorkerConfig.default_worker_config(), batch_size=1,\n'
            "                            shuffle_buffer_size=None, max_samples_per_sequence=None, task_encoder=...)\n"
            "```\nSamples are crude: a task encoder's cooker picks the fields. For access by key, "
            "`energon prepare --tar-index-only .` adds the SQLite index.\n"
        )
