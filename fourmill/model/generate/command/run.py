"""`fourmill generate`: from options to files. Everything that can be refused is refused before the network runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import yaml

from fourmill.evaluate.tokens.decode import Folder
from fourmill.model.config import Architecture
from fourmill.model.generate.command.inputs import Sample, read_bytes, read_samples
from fourmill.model.generate.command.outputs import Gallery, Ids, decode_rows
from fourmill.model.generate.generate import generate
from fourmill.model.generate.names import label_name, resolve_name
from fourmill.model.generate.plan import Target, check_plan, plan_of
from fourmill.model.generate.tokenizers import Tokenizers, load_tokenizers
from fourmill.model.network import FourM
from fourmill.model.weights import load_model
from fourmill.pipeline.store import open_store

_SHOWN = 60  # characters of a text on the terminal


@dataclass(frozen=True)
class Options:
    """What the command line says beside inputs and targets; None is the default of the target's kind.

    `chain`: whether what was generated conditions what comes next; by default unless a picture is given, which says
    more than guesses from it do, and a small model has seldom seen that many inputs.
    """

    steps: int | None = None
    order: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance: float | dict[str, float] | None = None
    plan: str | None = None
    chain: bool | None = None
    tokens_only: bool = False
    count: int = 1
    seed: int = 0
    batch: int = 16
    device: str = "auto"


def run_generate(
    checkpoint: str,
    sources: Sequence[str],
    targets: Sequence[str],
    out: str,
    tokenizers: Sequence[str] = (),
    options: Options = Options(),
    say: Callable[[str], None] = print,
) -> int:
    """Generate `targets` from `sources` and write files to `out`, a folder or s3:// URI. ValueError for what cannot be.

    Returns 0.
    """
    device = _device(options.device)
    model = load_model(checkpoint, device)
    found = load_tokenizers(checkpoint, model.architecture, tokenizers, device)
    wanted = _wanted(model.architecture, targets, options)
    samples = read_samples(sources, model.architecture, found, [_name(model.architecture, t) for t in wanted])
    if options.count > 1:
        samples = [replace(s, key=f"{s.key}-{i}") for s in samples for i in range(options.count)]
    if not samples:
        raise ValueError("no inputs: give at least one --from NAME=VALUE, such as --from rgb=photo.jpg")
    plan = _plan(model.architecture, wanted, samples[0], options)
    if not options.tokens_only:
        for target in plan:
            found.get(target.name)
    start = time.perf_counter()
    tokens = _generated(model, samples, plan, options)
    seconds = time.perf_counter() - start
    values = {} if options.tokens_only else {name: decode_rows(found, name, rows) for name, rows in tokens.items()}
    gallery = Gallery(samples, tokens, values)
    _write(gallery, out, found, plan, options, checkpoint, say)
    many = f"{len(samples)} sample{'s' * (len(samples) > 1)}"
    say(f"{many} in {out}; {seconds:.1f} s in the network on {device}, seed {options.seed}")
    return 0


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is available here")
    return name


def _wanted(architecture: Architecture, targets: Sequence[str], options: Options) -> list[Any]:
    """Names, or the entries of the plan's file; names given with --to choose among these, or are added."""
    if options.plan is None:
        if not targets:
            raise ValueError("no targets: give --to with modalities, such as --to depth,caption, or --plan FILE.yaml")
        return list(targets)
    tree = yaml.safe_load(read_bytes(options.plan))
    entries = tree.get("targets") if isinstance(tree, dict) else tree
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{options.plan}: a list of targets is needed, or a mapping with `targets`")
    if not targets:
        return entries
    by_name = {_name(architecture, entry): entry for entry in entries}
    return [by_name.get(_name(architecture, name), name) for name in targets]


def _name(architecture: Architecture, entry: Any) -> str:
    name = entry.get("name") if isinstance(entry, dict) else entry
    if not isinstance(name, str):
        raise ValueError(f"plan: an entry is a name or a mapping with a `name`, not {entry!r}")
    return resolve_name(name, architecture.domains_out, "target")


def _plan(architecture: Architecture, wanted: Sequence[Any], sample: Sample, options: Options) -> list[Target]:
    pictured = any(label_name(name) == "rgb" for name in sample.values)
    changes = {k: getattr(options, k) for k in ("steps", "order", "temperature", "top_k", "top_p", "guidance")}
    if not (not pictured if options.chain is None else options.chain):
        asked = [_name(architecture, entry) for entry in wanted]
        changes["conditions"] = tuple(n for n in sample.values if n in architecture.domains_in and n not in asked)
    plan = plan_of(architecture, wanted, pictured, **changes)
    check_plan(architecture, plan, [name for name in sample.values if name not in [t.name for t in plan]])
    return plan


def _generated(
    model: FourM, samples: Sequence[Sample], plan: Sequence[Target], options: Options
) -> dict[str, list[Ids]]:
    """Tokens by modality and sample. Each sample has its own noise: batches do not matter to it."""
    found: dict[str, list[Ids]] = {target.name: [] for target in plan}
    for start in range(0, len(samples), options.batch):
        batch = samples[start : start + options.batch]
        inputs = {name: _stacked(model, name, [s.values[name] for s in batch]) for name in batch[0].values}
        generator, numbers = torch.Generator().manual_seed(options.seed), range(start, start + len(batch))
        for name, rows in generate(model, inputs, plan, generator, samples=numbers).items():
            text = model.architecture.modalities[name].kind == "sequence"
            found[name] += [row.tolist() if text else row.cpu().numpy() for row in rows]
    return found


def _stacked(model: FourM, name: str, values: Sequence[Any]) -> Any:
    if model.architecture.modalities[name].kind == "sequence":
        return list(values)
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
        raise ValueError(f"{name}: values of different shapes {sorted(shapes)}")
    return np.stack(values)


def _write(
    gallery: Gallery,
    out: str,
    tokenizers: Tokenizers,
    plan: Sequence[Target],
    options: Options,
    checkpoint: str,
    say: Callable[[str], None],
) -> None:
    folder = Folder(open_store(out))
    told: dict[str, Any] = {}
    for number, sample in enumerate(gallery.samples):
        bad = told[sample.key] = {"given": sorted(sample.values), "malformed": gallery.problems(number)}
        for name in gallery.tokens:
            files = gallery.write(folder, name, number)
            say(_line(gallery, name, number, files, len(bad["malformed"].get(name, ()))))
    if gallery.values:
        folder.put("overview.png", gallery.overview())
        say(f"{'overview':14} overview.png")
    tree = {
        "checkpoint": checkpoint,
        "seed": options.seed,
        "plan": [target.model_dump(mode="json") for target in plan],
        "notes": {} if options.tokens_only else {t.name: list(tokenizers.get(t.name).notes) for t in plan},
        "samples": told,
    }
    folder.put("generate.json", (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())


def _line(gallery: Gallery, name: str, number: int, files: Sequence[str], bad: int) -> str:
    """What one value is called, its text if it is one, its files, and how much of it was malformed."""
    value = gallery.values[name][number].value if name in gallery.values else None
    place = f"{gallery.samples[number].key} " if len(gallery.samples) > 1 else ""
    words = f'"{value[:_SHOWN]}"  ' if isinstance(value, str) else ""
    return f"{place}{gallery.stems[name]:14} {words}{' '.join(files)}{f'  ({bad} pieces malformed)' * bool(bad)}"
