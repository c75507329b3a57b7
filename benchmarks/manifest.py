"""What a manifest costs as it grows: opening, planning, publishing, verifying, comparing, from 10^3 to 10^6 shards.

    python benchmarks/manifest.py --out docs           # about ten minutes, 2 GB of temporary disk
    python benchmarks/manifest.py --shards 1000 10000 --out runs/manifest

The dataset (manifest_data.py) has 12 modalities and 1,000 samples a shard, and is all manifest: its shard objects do
not exist. Where `verify` asks the store for their sizes, a stand-in answers; at 10^3 and 10^4 shards it is also
measured on real, sparse files. Each step runs in a process of its own, on local disk that the system has cached. Its
peak memory is that of the process, Python and torch included: the planner's components import it (0.6 GB).

Bars, on two cores at 10^6 shards x 12 modalities: 2 GB and about a minute for every step; seconds to find that a
finished job has nothing to do.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.manifest_data import CONFIG, FIRST, Answering, Recipes, build, config, make_files, new_records
from fourmill.config import Config
from fourmill.pipeline.manifest import Update, read_manifest, update_manifest
from fourmill.pipeline.manifest.diff import diff
from fourmill.pipeline.manifest.verify import verify
from fourmill.pipeline.plan import make_plan
from fourmill.pipeline.runner import run
from fourmill.pipeline.store import LocalStore

ROOT = Path(__file__).resolve().parents[1]
SIZES = (1_000, 10_000, 100_000, 1_000_000)
FILES_UP_TO = 10_000  # 120,000 files
ADDED = 1_000  # shards that one more snapshot adds
BARS = {"s": 60.0, "GB": 2.0}
Work = Callable[[], str]  # one step; says what it found


def open_it(folder: str, shards: int) -> Work:
    def work() -> str:
        manifest = read_manifest(LocalStore(folder), 2)
        totals = [manifest.totals(name) for name in manifest.modalities]
        assert len(totals) == 12
        assert len(manifest.shards) == shards
        return f"{sum(t.shards for t in totals):,} objects"

    return work


def plan_finished(folder: str, shards: int) -> Work:
    def work() -> str:
        plan = make_plan(LocalStore(folder), read_manifest(LocalStore(folder), 2), config(folder))
        assert plan.num_units == 0
        return "nothing to do"

    return work


def rerun_finished(folder: str, shards: int) -> Work:
    def work() -> str:
        report = run(config(folder))
        assert (report.ok, report.samples, report.manifest.snapshot) == (True, 0, 2)
        return "nothing done, no snapshot"

    return work


def plan_changed(folder: str, shards: int) -> Work:
    labelers = {**CONFIG["labelers"], "color_palette": {"colors": 5}}
    changed = Config(dataset=folder, **{**CONFIG, "labelers": labelers})

    def work() -> str:
        plan = make_plan(LocalStore(folder), read_manifest(LocalStore(folder), 2), changed)
        assert {name: sum(map(len, lacking)) for name, lacking in plan.lacks().items()} == {
            **dict.fromkeys(("canny_edge", "det", "metadata", "tok_alt_text", "tok_det", "tok_metadata"), 0),
            **dict.fromkeys(("color_palette", "tok_color_palette"), shards),
        }
        return f"{plan.num_units:,} units"

    return work


def plan_fresh(folder: str, shards: int) -> Work:
    def work() -> str:
        plan = make_plan(LocalStore(folder), read_manifest(LocalStore(folder), 1), config(folder))
        assert plan.num_units == 3 * shards
        return f"{plan.num_units:,} units"

    return work


def draw_units(folder: str, shards: int) -> Work:
    plan = make_plan(LocalStore(folder), read_manifest(LocalStore(folder), 1), config(folder))
    return lambda: f"{sum(1 for _ in plan.units()):,} units drawn"


def publish(folder: str, shards: int) -> Work:
    recipes = Recipes(folder)
    update = Update(new_records(recipes, FIRST + shards, ADDED), recipes.producers)

    def work() -> str:
        manifest = update_manifest(LocalStore(folder), lambda _: update)
        assert manifest.num_shards("tok_det") == shards + ADDED
        return f"{len(update.records):,} records, snapshot {manifest.snapshot}"

    return work


def verify_quickly(folder: str, shards: int) -> Work:
    return _verifying(Answering(folder), shards)


def verify_files(folder: str, shards: int) -> Work:
    make_files(folder, shards)
    return _verifying(LocalStore(folder), shards)


def _verifying(store: LocalStore, shards: int) -> Work:
    def work() -> str:
        outcome = verify(store, read_manifest(store, 2))
        assert outcome.ok, outcome.problems[:3]
        assert outcome.checked == 12 * shards
        return f"{outcome.tables:,} tables, {outcome.checked:,} sizes"

    return work


def compare(folder: str, shards: int) -> Work:
    def work() -> str:
        store = LocalStore(folder)
        found = diff(read_manifest(store, 2), read_manifest(store, 3))
        assert [m.shards.added for m in found.modalities] == [ADDED] * 12
        return f"{found.tables_read} tables read"

    return work


STEPS: dict[str, tuple[str, Callable[[str, int], Work]]] = {
    "open": ("open, with totals of every modality", open_it),
    "finished": ("plan a finished job", plan_finished),
    "rerun": ("run a finished job again", rerun_finished),
    "changed": ("plan after one labeler changed", plan_changed),
    "fresh": ("plan a fresh job", plan_fresh),
    "units": ("draw a fresh job's units", draw_units),
    "publish": (f"publish {ADDED:,} shards more", publish),
    "verify": ("verify, sizes by a stand-in", verify_quickly),
    "files": ("verify, real files", verify_files),
    "diff": ("diff of two snapshots", compare),
}


# --- measuring -----------------------------------------------------------------------------------------------------


def run_step(name: str, folder: str, shards: int) -> dict[str, Any]:
    """In this process: seconds on the clock and of CPU without imports and preparation, and peak memory with them."""
    work = STEPS[name][1](folder, shards)
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return {"step": name, "shards": shards, "s": seconds, "cpu": cpu_seconds, "GB": _peak_bytes() / 1e9, "found": found}


def _peak_bytes() -> int:
    """Of this process since it began. Not ru_maxrss: that begins with the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark needs Linux")


def measure(shards: int) -> list[dict[str, Any]]:
    results = []
    with tempfile.TemporaryDirectory(prefix="fourmill-manifest-") as folder:
        start = time.perf_counter()
        build(folder, shards)
        used = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        print(f"{shards:,} shards: built in {time.perf_counter() - start:.0f} s, {used / 1e6:,.1f} MB", flush=True)
        for name in STEPS:
            if name != "files" or shards <= FILES_UP_TO:
                command = [sys.executable, __file__, "--step", name, folder, str(shards)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
                result = {**json.loads(done.stdout.splitlines()[-1]), "manifest_MB": used / 1e6}
                results.append(result)
                print(_row(result), flush=True)
    return results


def _row(r: dict[str, Any]) -> str:
    step = STEPS[r["step"]][0]
    return f"  {step:36} {r['s']:8.2f} s {r['cpu']:8.2f} s CPU {r['GB']:6.2f} GB   {r['found']}"


# --- telling -------------------------------------------------------------------------------------------------------

PAGE = """# How the manifest grows

Every step that looks at a whole dataset, on synthetic manifests of 12 modalities and 1,000 samples a shard: the last
column is a billion samples, twelve million objects. Written by

    python benchmarks/manifest.py --out docs

![seconds and peak memory of each step against the number of shards](images/manifest-scale.png)

Seconds on the clock, without imports (about 2), and peak memory of a process of its own, with them (Python and torch,
which the planner's components import: 0.6 GB). {machine}

{table}

The bars are 2 GB and about a minute on two cores at a million shards, and seconds to find that a finished job has
nothing to do. What the steps do, and why they cost what they do:

- **open** reads the root alone: at 10^6 shards 1,212 entries of 0.7 kB.
- **plan a finished job** compares, for each block of 10,000 shards and each modality, the recipe and the digest of
  inputs that the root states with those wanted. No record table is read. **Running it again** is no more than that.
- **plan after one labeler changed** reads the record tables of the stages that have something stale, and tells for each
  shard of the two modalities concerned why it is.
- **plan a fresh job** computes nine fingerprints a shard and asks the store for what an interrupted run may have left:
  one listing for each block and modality. Its units are made while they are drawn; nothing holds them all.
- **publish** rewrites the record tables of the blocks it touches, here the one half-full block of 12 modalities, and
  adds up 4,000 shards' histograms of a 30,000-word vocabulary: the same at any size.
- **verify** (quick) reads every record table, sums it up again, follows every fingerprint, compares keys across
  modalities and asks for the size of every object. Twelve million files were not made: at 10^5 and 10^6 shards only a
  stand-in answers, so that the store's own time is not in these figures. With real files, at 10^3 and 10^4, it is: a
  `stat` each. On S3 it is a LIST of 1,000 names a request.
- **diff** skips blocks whose record tables are the same object: two snapshots that differ by 1,000 shards cost the same
  at any size.
"""


def write_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each step, seconds and peak memory by number of shards."""
    sizes = sorted({r["shards"] for r in results})
    lines = ["| step | " + " | ".join(f"{n:,} shards" for n in sizes) + " |", "|---|" + "---|" * len(sizes)]
    found = {(r["step"], r["shards"]): r for r in results}
    for name, (words, _) in STEPS.items():
        cells = [f"{r['s']:.2f} s, {r['GB']:.2f} GB" if (r := found.get((name, n))) else "–" for n in sizes]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    manifest = {r["shards"]: r["manifest_MB"] for r in results}
    lines.append("| record tables and roots on disk | " + " | ".join(f"{manifest[n]:,.1f} MB" for n in sizes) + " |")
    return "\n".join(lines)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for axis, unit, label in zip(axes, BARS, ("seconds", "GB at the peak, Python and torch included"), strict=True):
        for name, (words, _) in STEPS.items():
            if points := sorted((r["shards"], r[unit]) for r in results if r["step"] == name):
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=words)
        axis.axhline(BARS[unit], color="black", linestyle=":", linewidth=1)
        axis.annotate(f"bar: {BARS[unit]:g} {unit}", (1000, BARS[unit]), (0, 3), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", yscale="log", xlabel="shards of 1,000 samples, 12 modalities", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set(ylim=(0.4, 3), yticks=(0.5, 1, 2), yticklabels=("0.5", "1", "2"))
    axes[1].minorticks_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_page(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """The page and its picture."""
    plot(results, folder / "images" / "manifest-scale.png")
    machine = (
        f"{os.cpu_count()} shared cores, local disk, Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')}."
    )
    page = PAGE.format(machine=machine, table=write_table(results))
    (folder / "manifest-scale.md").write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, help="folder for manifest-scale.md and images/manifest-scale.png")
    parser.add_argument("--step", nargs=3, metavar=("NAME", "FOLDER", "SHARDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(run_step(args.step[0], args.step[1], int(args.step[2]))))
        return
    results = [result for shards in args.shards for result in measure(shards)]
    print(write_table(results))
    if args.out:
        write_page(results, args.out)


if __name__ == "__main__":
    main()
