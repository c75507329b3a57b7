"""The tables of benchmarks/train.py, on the terminal and in docs/training-speed.md.

The page's own words stay as they are: what is measured stands between two marks, and only that is written again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAGE, BEGIN, END = "training-speed.md", "<!-- figures: begin -->", "<!-- figures: end -->"


def print_table(shape: str, found: dict[str, Any]) -> None:
    """One line a contender."""
    print(f"{shape}: {found['batch']} samples a step, {found['gflop_per_sample']:.2f} GFLOP a sample")
    headings = f"{'wall s':>9}{'CPU s':>9}{'samples/s':>11}{'GFLOP/s':>9}"
    print(f"  {'':<26}{headings}   ratio, wall [range]    ratio, CPU [range]")
    for name, row in found["rows"].items():
        times = f"{row['wall_s']:>9.3f}{row['cpu_s']:>9.3f}{row['samples_per_wall_s']:>11.2f}{row['gflops']:>9.0f}"
        ratios = "".join(f"   {ratio(row, clock):<20}" for clock in ("wall", "cpu"))
        print(f"  {name:<26}{times}{ratios}", flush=True)


def ratio(row: dict[str, Any], clock: str) -> str:
    """Median and range over the rounds."""
    if f"{clock}_ratio" not in row:
        return ""
    middle, low, high = row[f"{clock}_ratio"]
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def write_page(out: str, results: dict[str, Any]) -> None:
    """Put the figures into the page; ValueError if it is not there or has lost its marks."""
    page = Path(out) / PAGE
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no lines {BEGIN} and {END} between which the figures go")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{head}{BEGIN}\n\n{figures(results)}\n{END}{tail}", encoding="utf-8")
    Path(out, "training-speed.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def figures(results: dict[str, Any]) -> str:
    """Markdown of everything measured."""
    parts = [f"    {results['command']}", "", f"{results['machine']}.", ""]
    for shape, found in results["shapes"].items():
        parts += [f"**{shape}**: {found['batch']} samples a step, {found['gflop_per_sample']:.1f} GFLOP a sample."]
        if "loss_difference" in found:
            parts[-1] += f" The losses of both agree to {found['loss_difference']:.1g} nats."
        parts += ["", *contender_table(found), ""]
        for precision, roofline in found.get("roofline", {}).items():
            parts += [*ceiling_lines(precision, roofline), ""]
        if "roofline" in found:
            parts += [*part_table(found), ""]
    return "\n".join(parts)


def contender_table(found: dict[str, Any]) -> list[str]:
    """Markdown rows."""
    lines = ["| | wall s a step | CPU s a step | samples/s | ratio, wall | ratio, CPU |", "|---|---|---|---|---|---|"]
    for name, row in found["rows"].items():
        cells = [f"{row['wall_s']:.3f}", f"{row['cpu_s']:.3f}", f"{row['samples_per_wall_s']:.1f}"]
        cells += [ratio(row, clock) for clock in ("wall", "cpu")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def ceiling_lines(precision: str, roofline: dict[str, Any]) -> list[str]:
    """One paragraph: what the device can do, and how near the step comes."""
    rates = ", ".join(f"{name} {value:.0f}" for name, value in roofline["ceilings"].items())
    at, seconds = roofline["seconds_at_ceiling"], roofline["seconds"]
    memory = f"memory {roofline['gigabytes_per_s']:.0f} GB/s"
    return [
        f"{precision}: products measured alone, GFLOP/s: {rates}; {memory}. A step at",
        f"these rates: {at:.3f} s; measured {seconds:.3f} s, **{100 * at / seconds:.0f} %** of the roofline and",
        f"{roofline['flops'] / seconds / 1e9:.0f} GFLOP/s. Masking one batch takes {1e3 * roofline['masking']:.1f} ms.",
    ]


def part_table(found: dict[str, Any]) -> list[str]:
    """Shares of a step by kind of operator, ours and ml-4m's: the profiler's own seconds grow on a busy machine."""
    columns = {f"ours {precision}": r["parts"] for precision, r in found["roofline"].items()}
    columns |= {f"ml-4m {precision}": parts for precision, parts in found.get("ml4m_parts", {}).items()}
    kinds = list(dict.fromkeys(kind for parts in columns.values() for kind in parts))
    lines = [f"| share of a step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for kind in kinds:
        shares = [100 * parts.get(kind, 0.0) / sum(parts.values()) for parts in columns.values()]
        lines.append(f"| {kind} | {' | '.join(f'{share:.1f} %' for share in shares)} |")
    return lines
