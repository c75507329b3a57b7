"""Scenes rendered once into memory-mapped arrays, for training that reads each of them many times.

Invariant: a cache is named by what determines it (seed, count, size and the renderer's source), so a changed renderer
never meets an old cache; it is renamed into place once complete.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fourmill.scenes.picture import render

_CHUNK = 250  # scenes per work item: a few seconds
# float16 depth: a step of 2 to 4 mm at 2 to 8 m; int8 normals: steps of 0.5 degrees. Far below what a teacher resolves.
_ARRAYS = {
    "images": np.uint8,
    "depth": np.float16,
    "semantic": np.uint8,
    "instances": np.uint8,
    "normals": np.int8,
}
_VECTORS = ("images", "normals")  # three values a pixel; the others have one


@dataclass(frozen=True)
class SceneCache:
    """The arrays of N scenes of S x S pixels, memory-mapped, and their captions and summaries.

    images (N, S, S, 3) uint8; depth (N, S, S) float16, metres; semantic, instances (N, S, S) uint8, as in `Scene`;
    normals (N, S, S, 3) int8: 127 times the unit vector in the camera frame.
    """

    images: NDArray[np.uint8]
    depth: NDArray[np.float16]
    semantic: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    normals: NDArray[np.int8]
    captions: list[str]
    summaries: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def open_cache(folder: str | Path, seed: int, count: int, size: int, workers: int = 1) -> SceneCache:
    """Open the cache of scenes 0..count-1 of `seed` below `folder`, rendering it first if it is not there."""
    place = Path(folder) / f"seed{seed}-count{count}-size{size}-{_renderer_digest()}"
    if not place.exists():
        partial = place.with_name(place.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _fill(partial, seed, count, size, workers)
        partial.rename(place)
    words = json.loads((place / "words.json").read_text())
    arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return SceneCache(captions=words["captions"], summaries=words["summaries"], **arrays)


def _renderer_digest() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]


def _fill(folder: Path, seed: int, count: int, size: int, workers: int) -> None:
    for name, dtype in _ARRAYS.items():
        shape = (count, size, size, 3) if name in _VECTORS else (count, size, size)
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
    starts = range(0, count, _CHUNK)
    if workers == 1:
        words = [_fill_chunk(str(folder), seed, start, count, size) for start in starts]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            jobs = [pool.submit(_fill_chunk, str(folder), seed, start, count, size) for start in starts]
            words = [job.result() for job in jobs]
    captions, summaries = ([text for chunk in words for text in chunk[kind]] for kind in (0, 1))
    (folder / "words.json").write_text(json.dumps({"captions": captions, "summaries": summaries}))


def _fill_chunk(folder: str, seed: int, start: int, count: int, size: int) -> tuple[list[str], list[str]]:
    arrays = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r+") for name in _ARRAYS}
    captions, summaries = [], []
    for index in range(start, min(start + _CHUNK, count)):
        scene = render(seed, index, size)
        arrays["images"][index] = scene.image
        arrays["depth"][index] = scene.depth
        arrays["semantic"][index] = scene.semantic
        arrays["instances"][index] = scene.instances
        arrays["normals"][index] = np.rint(127 * scene.normals)
        captions.append(scene.caption)
        summaries.append(scene.summary)
    return captions, summaries
