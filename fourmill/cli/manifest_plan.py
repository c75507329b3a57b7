"""`fourmill manifest plan`: what a configuration would make or redo in a dataset, and why."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fourmill.cli.manifest import manifest_app
from fourmill.cli.options import AsJson, Dataset, Recheck, console, parse_names

_SPENT = ("seconds", "gpu_seconds")


@manifest_app.command("plan")
def manifest_plan(
    dataset: Dataset,
    config: Annotated[str, typer.Option("--config", "-c", help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides: a.b=value.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only these stages and what they need: labels,tokens")] = None,
    recheck: Recheck = False,
    as_json: AsJson = False,
) -> int:
    """What a configuration would make or redo, and why, in words. Exit code 0 if nothing, 1 if there is work to do.

    fourmill manifest plan s3://bucket/dataset -c configs/demo.yaml labelers.depth.checkpoint=/models/new
    """
    from fourmill.config import load_config
    from fourmill.pipeline.runner import plan_of

    loaded = load_config(config, [f"dataset={dataset}", *(overrides or [])])
    plan = plan_of(loaded, parse_names(stage), recheck)
    if as_json:
        print(json.dumps({"dataset": dataset, "snapshot": plan.wanted.manifest.snapshot, **plan.to_json()}, indent=1))
    else:
        _print(dataset, plan)
    return 1 if plan.num_units or plan.unpublished else 0


def _print(dataset: str, plan: Any) -> None:
    from rich.table import Table

    lacking = {m: sum(map(len, shards)) for m, shards in plan.lacks().items()}
    table = Table("stage", "makes", "shards to do", "done", "samples", "estimate", "why")
    for name, entry in plan.to_json()["stages"].items():
        makes = ", ".join(m if m in entry["stores"] else f"({m})" for m in entry["makes"])
        why = "\n".join(f"{count} x {reason}" for reason, count in entry["reasons"].items())
        counts = [str(entry[n]) for n in ("shards_to_do", "shards_done", "samples_to_do")]
        table.add_row(name, makes, *counts, _estimate(plan, entry, lacking), why)
    out = console()
    out.print(f"{dataset}: snapshot {plan.wanted.manifest.snapshot}")
    out.print(table)
    if plan.unpublished:
        out.print(f"{len(plan.unpublished)} objects of an interrupted run will be published, not made again")
    if not plan.num_units:
        out.print("nothing to do")


def _estimate(plan: Any, entry: dict[str, Any], lacking: dict[str, int]) -> str:
    """Worker hours by what a shard of the lacking modalities took so far; empty where one was never made."""
    wanted = {m: lacking[m] for m in entry["stores"] if lacking.get(m)}
    totals = {m: plan.wanted.manifest.totals(m) for m in wanted}
    if not wanted or not all(t.shards and t.spent.get("seconds") for t in totals.values()):
        return ""
    hours = {what: sum(n * _a_shard(totals[m], what) for m, n in wanted.items()) / 3600 for what in _SPENT}
    text = f"{hours['seconds']:.2g} worker hours"
    return f"{text}, {hours['gpu_seconds']:.2g} GPU hours" if hours["gpu_seconds"] else text


def _a_shard(totals: Any, what: str) -> float:
    return float(totals.spent.get(what, 0) / totals.shards)
