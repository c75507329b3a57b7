"""Writes scenes to disk exactly as img2dataset writes a web corpus: tars of jpg, txt and json, a table a shard.

Invariants: the same arguments give the same bytes whatever the number of workers; a tar or table is renamed into place
once complete; an existing corpus is never touched. Readable by `webdataset` and by every img2dataset reader.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourmill.scenes.picture import Scene, render

# img2dataset's key: five digits of shard, then the index within it; so at most 10,000 samples a shard.
_INDEX_DIGITS = 4
_QUALITY = 95


def write_corpus(
    out: str | Path,
    count: int,
    size: int,
    seed: int,
    truth: bool = False,
    shard_size: int = 1000,
    workers: int = 1,
) -> None:
    """Write scenes 0..count-1 of `seed` at `size` pixels into the folder `out`.

    A shard is `00000.tar` (members `000000000.jpg`, `.txt`, `.json`), `00000.parquet` (the same metadata) and
    `00000_stats.json`. With `truth` the tar also holds `.depth.npy` (float32 metres), `.normal.npy` (float16),
    `.semseg.png` and `.instances.png`. Raises FileExistsError where `out` is not an empty folder, ValueError for
    impossible numbers.
    """
    if count < 1 or workers < 1:
        raise ValueError(f"count and workers must be at least 1: count={count}, workers={workers}")
    if not 1 <= shard_size <= 10**_INDEX_DIGITS:
        raise ValueError(f"shard_size={shard_size} is outside 1..{10**_INDEX_DIGITS}, the range of the keys")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder; choose another or empty it first")
    render(seed, 0, size)  # refuses impossible seeds and sizes before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (str(folder), shard, range(start, min(start + shard_size, count)), size, seed, truth)
        for shard, start in enumerate(range(0, count, shard_size))
    ]
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            _write_shard(*job)
        return
    # spawn: forking a process that already runs torch or Ray threads can hang. An executor and not a Pool, which would
    # restart workers for ever where the caller's main module cannot be imported again.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=spawn) as pool:
        for done in [pool.submit(_write_shard, *job) for job in jobs]:
            done.result()


def _write_shard(folder: str, shard: int, indices: range, size: int, seed: int, truth: bool) -> None:
    stem = Path(folder) / f"{shard:05d}"
    rows = []
    partial = f"{stem}.tar.partial"
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for offset, index in enumerate(indices):
            key = f"{shard:05d}{offset:0{_INDEX_DIGITS}d}"
            scene = render(seed, index, size)
            jpeg = _jpeg(scene)
            row = _metadata(scene, key, seed, index, jpeg)
            rows.append(row)
            members = {"jpg": jpeg, "txt": scene.caption.encode(), "json": json.dumps(row, indent=4).encode()}
            if truth:
                members |= _truth_members(scene)
            for extension in sorted(members):
                _add(tar, f"{key}.{extension}", members[extension])
    os.replace(partial, f"{stem}.tar")
    _write_table(rows, f"{stem}.parquet")
    _write_stats(len(rows), f"{stem}_stats.json")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, so bytes do not depend on when and by whom
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _jpeg(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _metadata(scene: Scene, key: str, seed: int, index: int, jpeg: bytes) -> dict[str, Any]:
    size = len(scene.image)
    return {
        "url": f"https://fourmill.invalid/scenes/{seed}/{index}.jpg",  # .invalid: reserved, never resolves
        "caption": scene.caption,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": size,
        "height": size,
        "original_width": size,
        "original_height": size,
        "exif": "{}",
        "sha256": hashlib.sha256(jpeg).hexdigest(),
        "scene": {"seed": seed, "index": index, "size": size},
        "boxes": [
            {"box": [edge / size for edge in thing.box], "class_name": thing.class_name, "score": 1.0}
            for thing in scene.objects
        ],
    }


def _truth_members(scene: Scene) -> dict[str, bytes]:
    return {
        "depth.npy": _npy(scene.depth),
        "normal.npy": _npy(scene.normals.astype(np.float16)),
        "semseg.png": _png(scene.semantic),
        "instances.png": _png(scene.instances),
    }


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _write_table(rows: list[dict[str, Any]], path: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # img2dataset's columns are flat; our nested ones become JSON text.
    flat = [{**row, "scene": json.dumps(row["scene"]), "boxes": json.dumps(row["boxes"])} for row in rows]
    names = list(flat[0])
    types = {name: pa.int64() if name.endswith(("width", "height")) else pa.string() for name in names}
    table = pa.table({name: pa.array([row[name] for row in flat], types[name]) for name in names})
    pq.write_table(table, f"{path}.partial")
    os.replace(f"{path}.partial", path)


def _write_stats(count: int, path: str) -> None:
    """img2dataset's counters; its times are zero here, since a clock would change the bytes."""
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": count},
    }
    Path(f"{path}.partial").write_text(json.dumps(stats, indent=4))
    os.replace(f"{path}.partial", path)
