"""The card of a demo teacher: README.md for people, training.json for the run that goes on from it.

Invariant: every figure in a card was measured by the run that wrote it, or stands in the training.json it went on from.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from fourmill.demo.teacher_figures import Figures

TRAIN_SEED, VALIDATION_SEED, EVALUATION_SEED, DEMO_SEED = 1, 8, 9, 7


@dataclass(frozen=True)
class Outcome:
    """What one run did. `curve` holds (step, the figure named `watched`), `validation` the kept weights' figures."""

    task: str
    watched: str
    steps: int
    images: int
    cpu_seconds: float
    parameters: int
    seed: int
    curve: list[tuple[int, float]]
    validation: Figures


_CLASSES = {
    "depth": "`transformers.DPTForDepthEstimation`: z-depth in metres",
    "normal": "`transformers.Tipsv2DptForNormalEstimation`: unit vectors to the camera (x right, y down, z forward)",
    "semseg": "`transformers.SegformerForSemanticSegmentation`: floor, wall, sphere, box, cylinder, cone",
    "panoptic": "`transformers.Mask2FormerForUniversalSegmentation`: floor and wall (stuff, 0 and 1), sphere, box, "
    "cylinder and cone (things); serves semantic, instance and panoptic post-processing",
    "detection": "`transformers.RTDetrV2ForObjectDetection`: boxes of spheres, boxes, cylinders and cones",
    "sam": "`transformers.SamModel`: three masks and their expected IoU for a point",
    "clip": "`open_clip` (`local-dir:`): ViT of 8 x 8 patches, 128 channels, a tokenizer of its own",
    "caption": "`transformers.BlipForConditionalGeneration`: plain captions of what stands in the room",
}
_CARD = """---
license: apache-2.0
---

# Demo teacher: {name}

{what}

**It understands only the procedural rooms of `fourmill.scenes`**, and nothing else: it exists so that every path of
Fourmill runs for real, offline and on a CPU, with exact truth to compare with. Do not label photographs with it.

{runs}

{longer}

Figures on {count:,} scenes of seed {evaluation}, never trained or chosen on, loaded from this folder:

| figure | value |
|---|---|
{rows}

    python -m fourmill.demo.teachers {name} {again}      # train again
    python -m fourmill.demo.teachers {name} --measure --count {count}      # these figures
"""


def history(folder: str | Path) -> list[Outcome]:
    """The runs that made the weights in `folder`, oldest first."""
    runs = json.loads((Path(folder) / "training.json").read_text())
    return [Outcome(**run | {"curve": [(step, value) for step, value in run["curve"]]}) for run in runs]


def record(name: str, folder: Path, runs: list[Outcome], figures: Figures, count: int, size: int = 128) -> None:
    """Write README.md and training.json of a checkpoint folder."""
    (folder / "training.json").write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    seconds = sum(run.cpu_seconds for run in runs)
    card = _CARD.format(
        name=name,
        what=textwrap.fill(
            f"{_CLASSES[name]}. {runs[-1].parameters:,} parameters, {size} px, float16 on disk. "
            "Code and weights: Apache-2.0.",
            120,
        ),
        evaluation=EVALUATION_SEED,
        runs=textwrap.fill(
            f"Trained from scratch on scenes of seed {TRAIN_SEED}, weights chosen on scenes of seed {VALIDATION_SEED}. "
            + _told(runs, seconds),
            120,
        ),
        longer=textwrap.fill(_longer(runs[-1]), 120),
        count=count,
        rows="\n".join(f"| {key} | {value:.3f} |" for key, value in figures.items()),
        again=_again(runs, seconds),
    )
    (folder / "README.md").write_text(card)


def _told(runs: list[Outcome], seconds: float) -> str:
    parts = [
        f"{run.cpu_seconds:.0f} CPU seconds as {run.task} ({run.steps:,} steps, {run.images:,} images, seed {run.seed})"
        for run in runs
    ]
    if len(runs) == 1:
        return f"One run: {parts[0]}."
    return f"{len(runs)} runs, {seconds:.0f} CPU seconds, each from the weights before it: {'; '.join(parts)}."


def _again(runs: list[Outcome], seconds: float) -> str:
    minutes = f"--minutes {max(runs[-1].cpu_seconds / 60, 1):.0f}"
    if runs[-1].task == runs[0].task:
        return f"--minutes {max(seconds / 60, 1):.0f}"
    return f"{minutes} --from fourmill/demo/checkpoints/{runs[-2].task}"


def _longer(run: Outcome) -> str:
    """What the end of the validation curve says about training on."""
    if len(run.curve) < 4:
        return "The last run's validations are too few to say what a longer one would gain."
    (middle, before), (last, after) = run.curve[len(run.curve) * 2 // 3 - 1], run.curve[-1]
    return (
        f"What a longer run may still gain: over the last third of the last run (steps {middle:,} to {last:,}, with a "
        f"falling learning rate) the validation figure `{run.watched}` went from {before:.4f} to {after:.4f}."
    )
