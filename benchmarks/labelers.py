"""What the pipeline costs beside its teachers: images/s of a worker ÷ images/s of a bare loop over the same network.

    python benchmarks/labelers.py                      # the demo's teachers: milliseconds a picture, so overheads show
    python benchmarks/labelers.py --full depth clip    # published architectures, random weights: teacher-bound

The bare loop is what one would write in a notebook: pictures already decoded in memory, the library's own processor,
network and post-processing, batch by batch. The worker does all that a run does: it reads the shard, decodes JPEGs,
crops, labels, checks, encodes and commits. Both take the same pictures in the same batches, in turns, in processes of
one thread. CPU seconds are compared, since with one worker for each core nothing else is free; the best of the repeats
counts.
Expect 0.95 or more where the teacher is what takes the time.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import argparse
import io
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from fourmill.pipeline.geometry import Crop, apply_crop

Loop = Callable[[torch.Tensor], Any]  # uint8 (B, 3, S, S) -> labels

# Labeler -> its options in the demo.
DEMO: dict[str, dict[str, Any]] = {
    "depth": {"checkpoint": "demo:depth", "output": "metric"},
    "normal": {"checkpoint": "demo:normal"},
    "segmentation": {
        "checkpoint": "demo:panoptic",
        "outputs": ["semseg", "panoptic", "instance"],
        "stuff": ["floor", "wall"],
    },
    "detection": {"checkpoint": "demo:detection"},
    "clip": {"checkpoint": "demo:clip"},
    "sam": {"checkpoint": "demo:sam", "points_per_side": 8, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.6},
    "caption": {"checkpoint": "demo:caption", "max_new_tokens": 40},
}


def hub_loop(folder: str, auto: str, post: Callable[[Any, Any, list[tuple[int, int]]], Any]) -> Loop:
    """A transformers network with its processor."""
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32).eval()

    def loop(pixels: torch.Tensor) -> Any:
        outputs = model(**processor(images=list(pixels), return_tensors="pt"))
        return post(processor, outputs, [tuple(pixels.shape[-2:])] * len(pixels))

    return loop


def _segments(processor: Any, outputs: Any, sizes: list[tuple[int, int]]) -> Any:
    return (
        processor.post_process_semantic_segmentation(outputs, target_sizes=sizes),
        processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes),
        processor.post_process_instance_segmentation(outputs, target_sizes=sizes),
    )


HUB: dict[str, tuple[str, Callable[[Any, Any, list[tuple[int, int]]], Any]]] = {
    "depth": (
        "AutoModelForDepthEstimation",
        lambda processor, out, sizes: processor.post_process_depth_estimation(out, target_sizes=sizes),
    ),
    "normal": (
        "AutoModelForNormalEstimation",
        lambda processor, out, sizes: processor.post_process_normal_estimation(out, target_sizes=sizes),
    ),
    "segmentation": ("AutoModelForUniversalSegmentation", _segments),
    "detection": (
        "AutoModelForObjectDetection",
        lambda processor, out, sizes: processor.post_process_object_detection(out, threshold=0.3, target_sizes=sizes),
    ),
}


def caption_loop(folder: str) -> Loop:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def loop(pixels: torch.Tensor) -> Any:
        inputs = processor(images=list(pixels), return_tensors="pt")
        return processor.batch_decode(model.generate(**inputs, max_new_tokens=40, do_sample=False))

    return loop


def clip_loop(folder: str) -> Loop:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    visual, size = model.visual, model.visual.image_size
    visual.output_tokens = True
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (visual.image_mean, visual.image_std))

    def loop(pixels: torch.Tensor) -> Any:
        images = torch.nn.functional.interpolate(pixels.float(), size, mode="bicubic", antialias=True)
        pooled, tokens = visual((images.clamp(0, 255) / 255 - mean) / std)
        return pooled, tokens @ visual.proj

    return loop


def labeler_loop(name: str, options: dict[str, Any]) -> Loop:
    """The labeler itself on pictures in memory: for SAM, where the library has no batched loop to compare with."""
    from fourmill.labelers import LABELERS
    from fourmill.pipeline.component import Batch

    labeler = LABELERS.build(name, options)
    labeler.load("cpu")
    return lambda pixels: labeler.run(Batch([str(i) for i in range(len(pixels))], pixels.numpy()))


def bare_loop(name: str, options: dict[str, Any]) -> Loop:
    """The loop of a notebook for the checkpoint that the labeler is given."""
    from fourmill.checkpoints import resolve

    folder = resolve(options["checkpoint"]).location
    if name in HUB:
        return hub_loop(folder, *HUB[name])
    special = {"clip": clip_loop, "caption": caption_loop}
    return special[name](folder) if name in special else labeler_loop(name, options)


def make_dataset(folder: Path, count: int) -> str:
    """A dataset of one shard of `count` scenes, 320 x 256 pixels, with its crops recorded."""
    from fourmill.pipeline.ingest import IngestConfig, ingest
    from fourmill.scenes import render

    corpus = folder / "corpus"
    corpus.mkdir()
    for index in range(count):
        image = Image.fromarray(render(11, index, 320).image).crop((0, 32, 320, 288))
        image.save(corpus / f"{index:06d}.jpg", quality=92)
        (corpus / f"{index:06d}.txt").write_text("a scene")
    dataset = str(folder / "dataset")
    ingest(str(corpus), dataset, IngestConfig(shard_size=count))
    return dataset


def decoded(folder: Path, size: int) -> torch.Tensor:
    pictures = []
    for path in sorted((folder / "corpus").glob("*.jpg")):
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        pictures.append(apply_crop(image, Crop(0, 32, 256, 256, 0), size))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def pipeline_run(name: str, options: dict[str, Any], dataset: str, size: int, batch: int) -> Callable[[], None]:
    """One call takes the whole shard through a loaded worker, and forgets what it made."""
    from fourmill.config import Config
    from fourmill.pipeline.manifest import read_manifest
    from fourmill.pipeline.plan import make_plan
    from fourmill.pipeline.runner import run
    from fourmill.pipeline.stages import GEOMETRY
    from fourmill.pipeline.store import open_store
    from fourmill.pipeline.worker import Worker, WorkerSpec

    tree = {
        "dataset": dataset,
        "crops": {"size": size},
        "labelers": {name: {**options, "batch_size": batch}},
        "ray": {"address": "none"},
    }
    config = Config.model_validate(tree)
    run(config, [GEOMETRY])
    store = open_store(dataset)
    plan = make_plan(store, read_manifest(store), config)
    stage = next(s for s in plan.stages if s.name != GEOMETRY)
    worker = Worker(WorkerSpec.of(plan, stage, config))
    (unit,) = plan.units(stage.name)

    def once() -> None:
        for made in worker.run(unit).records:
            store.delete(made.name)
            store.delete(made.name.replace(".arrow", ".json"))

    return once


def cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    with torch.inference_mode():
        call()
    return time.process_time() - start


def compare(name: str, options: dict[str, Any], size: int, count: int, batch: int, repeats: int) -> dict[str, Any]:
    """Images per CPU second of both, and their ratio, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = make_dataset(folder, count)
        pixels = decoded(folder, size)
        loop = bare_loop(name, options)
        whole = pipeline_run(name, options, dataset, size, batch)

        def bare() -> None:
            for start in range(0, count, batch):
                loop(pixels[start : start + batch])

        bare()
        whole()
        pairs = [(cpu_seconds(bare), cpu_seconds(whole)) for _ in range(repeats)]
        decode = min(cpu_seconds(lambda: decoded(folder, size)) for _ in range(repeats))
        encode = encode_seconds(name, options, pixels, repeats)
    best = [min(p[i] for p in pairs) for i in (0, 1)]
    rates = {"bare": count / best[0], "pipeline": count / best[1], "ratio": best[0] / best[1]}
    return {"teacher": name, **rates, "decode_ms": 1e3 * decode / count, "encode_ms": 1e3 * encode}


def encode_seconds(name: str, options: dict[str, Any], pixels: torch.Tensor, repeats: int) -> float:
    """CPU seconds an image to check labels against their convention and to encode them."""
    from fourmill.labelers import LABELERS
    from fourmill.modalities import modality
    from fourmill.pipeline import codecs, conventions
    from fourmill.pipeline.component import Batch

    labeler = LABELERS.build(name, options)
    labeler.load("cpu")
    count = min(len(pixels), 16)
    made = labeler.run(Batch([str(i) for i in range(count)], pixels[:count].numpy()))
    specs = {m: labeler.spec(m) for m in made}

    def encode() -> None:
        for name_, values in made.items():
            for value in values:
                settled = codecs.settle(modality(name_), value)
                conventions.check(modality(name_), specs[name_], settled)
                codecs.encode(modality(name_), settled)

    return min(cpu_seconds(encode) for _ in range(repeats)) / count


def main() -> None:
    """One line a teacher; each in a process of its own, so that none inherits another's memory or threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="*", metavar="TEACHER", help=f"{', '.join(DEMO)}; all by default")
    parser.add_argument("--full", action="store_true", help="published architectures with random weights")
    parser.add_argument("--count", type=int, default=64, help="pictures")
    parser.add_argument("--batch", type=int, default=16, help="batch size of both")
    parser.add_argument("--size", type=int, default=128, help="side of the crops, pixels")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each; the best counts")
    parser.add_argument("--options", help=argparse.SUPPRESS)  # of the one teacher that a child process measures
    args = parser.parse_args()
    if args.options:
        options = json.loads(args.options)
        found = compare(args.teachers[0], options, args.size, args.count, args.batch, args.repeats)
        print(json.dumps(found))
        return
    print("images per CPU second, their ratio, and CPU milliseconds an image to decode and crop, to check and encode")
    print(f"{'teacher':<14}{'bare loop':>12}{'pipeline':>12}{'ratio':>8}{'decode':>10}{'encode':>10}", flush=True)
    for name in args.teachers or list(DEMO):
        with tempfile.TemporaryDirectory() as folder:
            options = full_size(name, Path(folder)) if args.full else DEMO[name]
            given = ["--count", args.count, "--batch", args.batch, "--size", args.size, "--repeats", args.repeats]
            command = [sys.executable, __file__, name, *map(str, given), "--options", json.dumps(options)]
            child = subprocess.run(command, check=False, capture_output=True, text=True)
        if child.returncode:
            raise SystemExit(f"{name}: {child.stderr[-2000:]}")
        found = json.loads(child.stdout.splitlines()[-1])
        rates = f"{found['bare']:>12.2f}{found['pipeline']:>12.2f}{found['ratio']:>8.3f}"
        print(f"{name:<14}{rates}{found['decode_ms']:>10.2f}{found['encode_ms']:>10.2f}", flush=True)


def full_size(name: str, folder: Path) -> dict[str, Any]:
    """Options of the labeler for a published architecture with random weights, saved in `folder`."""
    from benchmarks import teacher_folders

    return teacher_folders.save(name, folder)


if __name__ == "__main__":
    main()
