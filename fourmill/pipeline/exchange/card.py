"""The README beside an export: what it is, how to load it, what made it, and what the licences of that allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fourmill.checkpoints import is_non_commercial
from fourmill.pipeline.exchange.layout import CARD

__all__ = ["CARD", "render"]


def render(summary: Mapping[str, Any], usage: str) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    bound = non_commercial(summary["producers"])
    lines = [
        "---",
        yaml.safe_dump(_front(summary, bool(bound)), sort_keys=True).strip(),
        "---",
        "",
        f"# {summary['samples']} samples in {summary['shards']} shards ({summary['layout']})",
        "",
        f"Exported by Fourmill from snapshot {summary['snapshot']} of a dataset of "
        f"{summary['corpus'].get('samples', '?')} samples. `fourmill.json` has the whole lineage.",
        "",
    ]
    if bound:
        lines += [
            "**NON-COMMERCIAL: not for commercial use, by the licence of the weights of " + "; ".join(bound) + ".**"
        ]
        lines += [""]
    lines += ["## Loading", "", usage, "## Modalities", "", *_modalities(summary), ""]
    lines += ["## Weights", "", "All that were used, also on the way.", "", *_weights(summary["producers"]), ""]
    for title, counts in (("Left out", summary["dropped"]), ("Changed", summary["notes"])):
        lines += [f"## {title}", "", *([f"- {n} x {_plain(why)}" for why, n in counts.items()] or ["Nothing."]), ""]
    return "\n".join(lines)


def _front(summary: Mapping[str, Any], bound: bool) -> dict[str, Any]:
    front: dict[str, Any] = {
        "license": "other",
        "license_name": "non-commercial" if bound else "see-below",
        "tags": ["fourmill", "4m", "pseudo-labels"],
    }
    if summary["layout"] == "parquet":
        files = [{"split": summary["split"], "path": f"data/{summary['split']}-*.parquet"}]
        front["configs"] = [{"config_name": "default", "data_files": files}]
    return front


def _modalities(summary: Mapping[str, Any]) -> list[str]:
    rows = ["| modality | stands in | made by | weights | licence of code | licence of weights |", "|" + "---|" * 6]
    for name, entry in sorted(summary["modalities"].items()):
        place = next(f"{k} `{v}`" for k, v in entry.items() if k in ("folder", "column", "suffix"))
        for recipe in entry["recipes"]:
            made = summary["producers"].get(recipe, {})
            weights = made.get("checkpoint")
            weights = weights if isinstance(weights, Mapping) else {}
            cells = (
                f"`{name}`",
                place,
                f"{made.get('class', '?')} v{made.get('version', '?')}",
                weights.get("reference", ""),
                made.get("licence", ""),
                weights.get("licence", ""),
            )
            rows.append("| " + " | ".join(_plain(str(c)) for c in cells) + " |")
    return rows


def _weights(producers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every checkpoint in the lineage: tokens of a depth map are bound by the licence of the depth network too."""
    found = {
        (str(w.get("reference", "?")), str(w.get("licence", "unknown")), str(w.get("digest", ""))[:16])
        for p in producers.values()
        if isinstance(w := p.get("checkpoint"), Mapping)
    }
    rows = ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in sorted(found)]
    return ["| weights | licence | digest |", "|---|---|---|", *rows] if rows else ["None."]


def _plain(text: str) -> str:
    """Reasons and names come from strangers: no row, no link and no tag of theirs ends up in the card."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("\n", " ")


def non_commercial(producers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """References and licences of weights that forbid commercial use."""
    found = set()
    for producer in producers.values():
        weights = producer.get("checkpoint")
        if isinstance(weights, Mapping) and is_non_commercial(str(weights.get("licence", ""))):
            found.add(f"{weights.get('reference', '?')} ({weights['licence']})")
    return sorted(found)
