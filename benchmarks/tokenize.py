"""What the tokenize job costs beside the bare network, and beside ml-4m's own script.

    python benchmarks/tokenize.py                            # the pipeline ÷ a bare encode loop, for each modality
    python benchmarks/tokenize.py --ml4m CHECKOUT [--libraries FOLDER]    # also: ours ÷ save_vq_tokens.py, end to end

The bare loop takes decoded, cropped, prepared values that lie in memory through the network, in batches of 1, 4 or 16,
whichever is fastest. The pipeline is a worker of the tokenize job: it reads the shard, decodes each picture once, cuts
its crops, tokenizes and commits. They take turns in one process of one thread; the least CPU time of the turns counts.

Against ml-4m, both run as the commands a user types, with the same weights on the same picture files through the same
crops (ours are handed to it). ml-4m runs once for each modality, ours takes all in one pass. What one picture more
costs is counted, in CPU seconds of the whole process: a run over four pictures is taken off. `equal` is the share of
RGB tokens that are the same in both. tokenize_ml4m.py says which libraries ml-4m needs.

Expect 0.95 of the bare loop where the network is what takes the time (vit_b), and see docs/LOG.md for ml-4m.
"""

from __future__ import annotations

import sys

# Import from the root: this file would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import functools
import json
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tokenize_data import (
    NETWORKS,
    SIDE,
    SIZE,
    SOURCES,
    Job,
    make_job,
    ml4m_folder,
    save_checkpoint,
    write_pictures,
)
from fourmill.pipeline import images
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.plan import make_plan
from fourmill.pipeline.shards import Shard, commit, read_shard, write_shard
from fourmill.pipeline.store import Store, open_store
from fourmill.pipeline.worker import Worker, WorkerSpec

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 4, 16)  # of the bare loop
FEW = 4  # pictures of the run that is taken off; fewer would not do all that is done once
SUFFIX = "tokens"  # of the folders that ml-4m writes


def cpu_seconds(call: Callable[[], Any]) -> float:
    """User and system time of this process, all its threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(source: str, network: str, pictures: Path, crops: int, repeats: int) -> dict[str, Any]:
    """Crops per CPU second of both, their ratio, and CPU milliseconds a crop of the pipeline's own parts."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = make_job(folder, pictures, [source], [save_checkpoint(folder, source, network)], crops)
        store = open_store(job.config.dataset)
        plan = make_plan(store, read_manifest(store), job.config, ["tokens"])
        (unit,) = plan.units("tokens")
        worker = Worker(WorkerSpec.of(plan, plan.stages[-1], job.config))
        codec = worker.components[0].codec  # type: ignore[attr-defined]
        manifest = read_manifest(store)
        shards = {m: read_shard(store, next(manifest.records(m)).name) for m in manifest.modalities}
        values = list(values_of(source, shards, crops))
        inputs = torch.cat([codec.source.prepare([value]) for value in values])

        def pipeline() -> None:
            (made,) = worker.run(unit).records
            found.append(read_shard(store, made.name))
            _forget(store, made.name)

        def bare(batch: int) -> None:
            with torch.inference_mode():
                for start in range(0, len(inputs), batch):
                    codec.network.tokens(inputs[start : start + batch])

        found: list[Shard] = []
        pipeline()
        calls: list[Callable[[], None]] = [pipeline, *(functools.partial(bare, batch) for batch in BATCHES)]
        turns = [[cpu_seconds(call) for call in calls] for _ in range(repeats)]
        spent = {
            "read": _least(lambda: list(read_values(source, shards, crops)), repeats),
            "values": _least(lambda: list(values_of(source, shards, crops)), repeats),
            "prepare": _least(lambda: [codec.source.prepare([value]) for value in values], repeats),
            "write": _least(lambda: _publish(found[0], store), repeats),
        }
    whole, *loops = (min(turn[i] for turn in turns) for i in range(1 + len(BATCHES)))
    rates = {"bare": len(inputs) / min(loops), "pipeline": len(inputs) / whole, "ratio": min(loops) / whole}
    spent["crop"] = max(0.0, spent.pop("values") - spent["read"])
    milliseconds = {name: 1e3 * seconds / len(inputs) for name, seconds in spent.items()}
    return {**rates, "batch": BATCHES[loops.index(min(loops))], **milliseconds}


def _least(call: Callable[[], Any], repeats: int) -> float:
    return min(cpu_seconds(call) for _ in range(repeats))


def _publish(shard: Shard, store: Store) -> None:
    """Puts the shard's rows together as an object again and commits it."""
    meta = shard.meta
    columns = [shard.values(crop) for crop in range(shard.spec.crops)]
    made = (meta["modality"], meta["shard"], meta["fingerprint"], shard.keys, columns, shard.spec, meta["producer"])
    _forget(store, commit(store, write_shard(*made, shard.quarantine)).name)


def _forget(store: Store, name: str) -> None:
    store.delete(name)
    store.delete(name.replace(".arrow", ".json"))


def read_values(source: str, shards: dict[str, Shard], crops: int) -> Iterator[Any]:
    """What the job reads: each picture decoded once, or the stored label of each crop."""
    shard = shards[source]
    for row in range(len(shard.keys)):
        if source == "rgb":
            yield images.decode(shard.value(row))
        else:
            yield from (shard.value(row, crop) for crop in range(crops))


def values_of(source: str, shards: dict[str, Shard], crops: int) -> Iterator[Any]:
    """The values that are tokenized, crop by crop."""
    if source != "rgb":
        yield from read_values(source, shards, crops)
        return
    for row, image in enumerate(read_values(source, shards, crops)):
        for crop in range(crops):
            recorded = Crop(*map(int, shards["crop_settings"].value(row, crop)))
            yield apply_crop(image, recorded, SIZE).transpose(2, 0, 1)


# Against ml-4m.


def children_seconds(command: list[str]) -> float:
    """CPU seconds of one command, children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@dataclass(frozen=True)
class Setting:
    """One comparison with ml-4m: a network, the modalities, the crops of each picture, how many pictures, and the
    precision of our encoder (theirs is float32)."""

    network: str
    sources: tuple[str, ...]
    crops: int
    count: int
    precision: str = "float32"


SETTINGS = [
    Setting(network, sources, crops, count)
    for network, counts in (("vit_b", (12, 6)), ("tiny", (96, 24)))
    for sources in (("rgb",), ("rgb", "depth", "normal"))
    for crops, count in zip((1, 10), counts, strict=True)
]


def against(setting: Setting, ml4m: list[str], repeats: int) -> dict[str, float]:
    """CPU seconds that one picture more costs ours and ml-4m's, and the share of RGB tokens that are equal."""
    spent: dict[str, dict[int, float]] = {"ours": {}, "ml-4m": {}}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        checkpoints = [save_checkpoint(base / "checkpoints", s, setting.network) for s in setting.sources]
        for count in (FEW, setting.count):
            folder = base / str(count)
            write_pictures(folder, count)
            job = make_job(folder, folder, setting.sources, checkpoints, setting.crops, setting.precision)
            root = ml4m_folder(folder, folder, job)
            turns = [(_ours(job), _theirs(ml4m, root, job, setting)) for _ in range(repeats)]
            spent["ours"][count], spent["ml-4m"][count] = (min(turn[i] for turn in turns) for i in (0, 1))
        equal = equal_tokens(job, root)
    more = {name: (cpu[setting.count] - cpu[FEW]) / (setting.count - FEW) for name, cpu in spent.items()}
    return {**more, "ratio": more["ml-4m"] / more["ours"], "equal": equal}


def _ours(job: Job) -> float:
    store = open_store(job.config.dataset)
    for name in job.names:
        for info in list(store.list(f"{name}/")):
            store.delete(info.name)
    return children_seconds([sys.executable, "jobs/tokenize.py", "--config", str(job.file)])


def _theirs(ml4m: list[str], root: Path, job: Job, setting: Setting) -> float:
    """One run of save_vq_tokens.py for each modality."""
    seconds = 0.0
    for source in job.sources:
        shutil.rmtree(root / "train" / f"{source}_{SUFFIX}", ignore_errors=True)
        options = ["--task", source, "--tokenizer_id", f"{source}-{setting.network}", "--n_crops", str(setting.crops)]
        options += ["--tokenizers_root", str(root.parents[1] / "checkpoints"), "--data_root", str(root)]
        options += ["--device", "cpu", "--num_workers", "0", "--resample_mode", "bicubic", "--folder_suffix", SUFFIX]
        options += ["--batch_size", "16", "--batch_size_dataloader", str(max(1, 16 // setting.crops))]
        seconds += children_seconds([sys.executable, "benchmarks/tokenize_ml4m.py", *ml4m, "--", *options])
    return seconds


def equal_tokens(job: Job, root: Path) -> float:
    """Share of RGB tokens that both gave alike."""
    store = open_store(job.config.dataset)
    shard = read_shard(store, next(read_manifest(store).records("tok_rgb")).name)
    ours = np.stack([shard.tokens(crop) for crop in range(shard.spec.crops)], axis=1)
    theirs = np.stack([np.load(root / f"train/rgb_{SUFFIX}/0/{key}.npy") for key in shard.keys])
    return float((ours == theirs.astype(np.uint16)).mean())


def main() -> None:
    """One line a comparison; those with the bare loop each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=f"{', '.join(SOURCES)}; all by default")
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), help=f"of: {', '.join(NETWORKS)}; all by default"
    )
    parser.add_argument("--count", type=int, default=8, help="pictures, of 512 x 512 pixels")
    parser.add_argument("--crops", type=int, default=4, help="crops of each picture")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each; the best counts")
    parser.add_argument("--ml4m", help="folder of a checkout of apple/ml-4m; without it that part is skipped")
    parser.add_argument("--libraries", help="folder with ml-4m's libraries, if they are not installed")
    parser.add_argument("--precision", default="float32", help="of our encoder against ml-4m: float32, bfloat16")
    parser.add_argument("--only-ml4m", action="store_true", help="leave the bare loop out")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the pictures' folder, in a process that measures
    args = parser.parse_args()
    if args.child:
        found = compare(args.sources[0], args.networks[0], Path(args.child), args.crops, args.repeats)
        print(json.dumps(found))
        return
    if not args.only_ml4m:
        print_bare(args)
    if args.ml4m is None:
        print("against ml-4m: skipped, as --ml4m names no checkout of github.com/apple/ml-4m")
        return
    print_against([args.ml4m, *(["--libraries", args.libraries] if args.libraries else [])], args)


def print_bare(args: argparse.Namespace) -> None:
    """The first table."""
    print(f"crops of {SIZE} px per CPU second, and CPU milliseconds a crop; {args.crops} crops a picture of {SIDE} px")
    columns = ("batch", "pipeline", "ratio", "read", "crop", "prepare", "write")
    print(f"{'network':<9}{'modality':<10}{'bare loop':>10}" + "".join(f"{c:>9}" for c in columns), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        write_pictures(pictures, args.count)
        for network in args.networks:
            for source in args.sources or SOURCES:
                given = ["--networks", network, "--crops", args.crops, "--repeats", args.repeats, "--child", pictures]
                command = [sys.executable, __file__, source, *map(str, given)]
                child = subprocess.run(command, check=False, capture_output=True, text=True)
                if child.returncode:
                    raise SystemExit(f"{network} {source}: {child.stderr[-2000:]}")
                found = json.loads(child.stdout.splitlines()[-1])
                numbers = f"{found['batch']:>9}{found['pipeline']:>9.2f}{found['ratio']:>9.3f}"
                parts = "".join(f"{found[c]:>9.2f}" for c in columns[3:])
                print(f"{network:<9}tok_{source:<6}{found['bare']:>10.2f}{numbers}{parts}", flush=True)


def print_against(ml4m: list[str], args: argparse.Namespace) -> None:
    """The second table."""
    print("\nCPU seconds that one picture more costs, all crops and modalities of it, from files to tokens")
    print(f"{'network':<9}{'modalities':<18}{'crops':>6}{'ml-4m':>10}{'ours':>10}{'ratio':>8}{'equal':>9}", flush=True)
    for setting in (s for s in SETTINGS if s.network in args.networks):
        found = against(replace(setting, precision=args.precision), ml4m, args.repeats)
        names = ",".join(setting.sources)
        seconds = f"{found['ml-4m']:>10.4f}{found['ours']:>10.4f}{found['ratio']:>8.2f}"
        print(f"{setting.network:<9}{names:<18}{setting.crops:>6}{seconds}{found['equal']:>9.5f}", flush=True)


if __name__ == "__main__":
    main()
