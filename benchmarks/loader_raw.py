"""What the loader alone costs: raw batches a second on one core, beside a plain copy of as many bytes; memory a sample.

python benchmarks/loader_raw.py --shards 200            # writes a dataset of 1,000 samples a shard, 2.3 kB each
python benchmarks/loader_raw.py --records 12000         # a manifest without objects: time and memory to open it
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import argparse
import hashlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from fourmill.model.batch import RawBatch
from fourmill.model.data import DataConfig, TokenDataset
from fourmill.model.loader import Loader
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Record, Spec, commit, write_shard
from fourmill.pipeline.store import open_store

GRIDS = {"tok_rgb": 16_384, "tok_depth": 8_192, "tok_normal": 8_192, "tok_semseg": 4_096, "tok_clip": 8_192}
TEXTS = {"tok_caption": (8, 40), "tok_det": (10, 120)}  # tokens, from and to
MORE = ("tok_canny_edge", "tok_dinov2", "tok_imagebind")  # 10 modalities for the memory
ROWS = 1_000
WHO = {"class": "benchmark"}


def specs(names: Any) -> dict[str, Spec]:
    return {
        n: Spec(vocabulary=30_000) if n in TEXTS else Spec(vocabulary=GRIDS.get(n, 8_192), length=196, grid=(14, 14))
        for n in names
    }


def shard(name: str, spec: Spec, number: int, rng: np.random.Generator) -> bytes:
    if name in TEXTS:
        rows = [rng.integers(300, 30_000, rng.integers(*TEXTS[name])).astype(np.uint16) for _ in range(ROWS)]
    else:
        rows = list(rng.integers(0, spec.vocabulary or 1, (ROWS, 196)).astype(np.uint16))
    keys = [f"{number:06d}{row:04d}" for row in range(ROWS)]
    return write_shard(name, number, "0" * 16, keys, [rows], spec, WHO, {})


def write(uri: str, shards: int) -> None:
    store, rng = open_store(uri), np.random.default_rng(0)
    wanted = specs([*GRIDS, *TEXTS])
    records = [commit(store, shard(name, spec, n, rng)) for n in range(shards) for name, spec in wanted.items()]
    update_manifest(store, lambda _: Update(records, {records[0].producer: WHO}))


def records(shards: int) -> Iterator[Record]:
    """Records of shards that are not there."""
    for name, spec in specs([*GRIDS, *TEXTS, *MORE]).items():
        told = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(spec).items() if v is not None}
        for n in range(shards):
            digest = hashlib.sha256(f"{name} {n}".encode()).hexdigest()
            keys = hashlib.sha256(str(n).encode()).hexdigest()
            yield Record(name, n, digest[:16], "0" * 16, ROWS, ROWS, 400_000, digest, keys, told, {"max": 1})


def num_bytes(batch: RawBatch) -> int:
    tensors = (*batch.tokens.values(), *batch.lengths.values(), *batch.present.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def speed(uri: str, samples: int) -> None:
    data = TokenDataset(uri, DataConfig(names=(*GRIDS, *TEXTS), image_size=224))
    source = np.random.default_rng(0).integers(0, 255, 64 << 20, np.uint8)
    target, started = np.empty_like(source), time.process_time()
    for _ in range(10):
        np.copyto(target, source)
    copied = 10 * source.nbytes / (time.process_time() - started)
    print(f"{len(data)} samples; a plain copy moves {copied / 1e9:.1f} GB/s")
    for size in (32, 256):
        loader = Loader(data, size, 0)
        for _ in range(len(data) // size // 4):  # every page has been touched
            next(loader)
        started, steps = time.process_time(), samples // size
        held = sum(num_bytes(next(loader)[0]) for _ in range(steps)) / (steps * size)
        taken = (time.process_time() - started) / (steps * size)
        rate, share = 1 / taken, held / copied / taken
        print(
            f"batch {size:3}: {taken * 1e6:.1f} us a sample of {held:.0f} bytes, {rate:,.0f}/s, {share:.0%} of a copy"
        )


def memory(uri: str, shards: int) -> None:
    update_manifest(open_store(uri), lambda _: Update(list(records(shards)), {"0" * 16: WHO}))
    started = time.process_time()
    data = TokenDataset(uri, DataConfig(names=(*GRIDS, *TEXTS, *MORE), image_size=224, held_out=0.0))
    opened = time.process_time() - started
    loader = Loader(data, 256, 0, crop=0)
    loader._take(loader._orders, loader._places)
    seen: set[int] = set()
    print(f"{len(data)} samples opened in {opened:.1f} s of CPU time; bytes a sample:")
    print(f"  {size_of(data, seen) / len(data):.1f} dataset, {size_of(loader._orders, seen) / len(data):.1f} order")


def size_of(value: Any, seen: set[int]) -> int:
    """Bytes of all arrays that hang on an object."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        return value.nbytes if value.base is None else size_of(value.base, seen)
    if isinstance(value, bytes):
        return len(value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(size_of(v, seen) for v in (*inside, *getattr(value, "__dict__", {}).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=0)
    parser.add_argument("--records", type=int, default=0)
    parser.add_argument("--samples", type=int, default=40_000, help="in each measurement")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if chosen.shards:
            write(f"{folder}/shards", chosen.shards)
            speed(f"{folder}/shards", chosen.samples)
        if chosen.records:
            memory(f"{folder}/records", chosen.records)


if __name__ == "__main__":
    main()
