"""Training throughput: ours ÷ ml-4m's, at equal configuration on one device, in one run.

    python benchmarks/train.py --ml4m CHECKOUT                       # a small shape and 4M-tiny in float32, CPU
    python benchmarks/train.py --ml4m CHECKOUT --shapes tiny --threads 2 --rounds 7 --roofline --out docs
    python benchmarks/train.py --ml4m CHECKOUT --device cuda         # 4M-B and 4M-L in bfloat16, with MFU
    python benchmarks/train.py --roofline                            # ours alone, against what the device can do

A step is forward, backward and AdamW, without clipping; one batch of 32 samples (more on a GPU), 128 visible and 128
predicted tokens of the seven 4M modalities, RGB as pixels. Both train the same network from the same weights on the
same masked batches: one masked batch is handed to ml-4m in its own layout. Before anything is timed their losses, at
the start and after two steps, must agree by modality. Neither side's logging is in the step (ml-4m's loop also reads
each loss and the gradient's norm), nor its loader.

Each contender has a process of its own, so that neither profits from the other's memory or settings. They take turns,
round by round; a ratio is taken within a round. The table shows medians, and the ratio's range over the rounds. CPU
seconds are those of the contender's process, system time included; a busy machine changes them less than wall-clock.
The bar is 1.5 times ml-4m's samples a second.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import argparse
import copy
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks import train_ml4m
from benchmarks.train_page import print_table, write_page
from benchmarks.train_roofline import Roofline, measure_roofline, parts_of, print_parts, print_roofline
from fourmill.model.batch import Inputs, RawBatch, Targets
from fourmill.model.blocks import compile_blocks
from fourmill.model.config import Architecture, MaskingConfig, Mixture, ModalityInfo
from fourmill.model.flops import flops_per_sample
from fourmill.model.masking import Masker
from fourmill.model.memory import keep_memory
from fourmill.model.network import FourM
from fourmill.model.optimizer import adamw

TEXTS = ("caption", "det")
GRIDS = {"tok_rgb": 16_384, "tok_depth": 8_192, "tok_normal": 8_192, "tok_semseg": 4_096, "tok_clip": 8_192}
SHAPES = {  # width, blocks on each side, heads; `small` is that of configs/demo.yaml, the others are published
    "small": (192, 4, 3),
    "tiny": (384, 6, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
BATCHES = {"cpu": {}, "cuda": {"base": 256, "large": 128}}  # samples a step, if not 32
LR, DECAY, BETAS = 1e-4, 0.05, (0.9, 0.95)
AGREE = 1e-3  # nats; float32 sums in another order
WARM_UP = 2  # steps of each contender before the first round

Masked = tuple[RawBatch, Inputs, Targets]
Step = Callable[[int], torch.Tensor]  # trains on one batch, gives the loss


@dataclass(frozen=True)
class Contender:
    """Who trains, in which precision, and whether blocks are compiled."""

    who: str
    precision: str
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.who} {self.precision}{' compiled' if self.compiled else ''}"

    @property
    def against(self) -> str:
        """Whose throughput its own is divided by."""
        return f"ml-4m {self.precision}"


def architecture_of(shape: str) -> Architecture:
    """4M-7 with pixels, by ml-4m's names."""
    dim, depth, heads = SHAPES[shape]
    modalities = {"rgb@224": ModalityInfo(kind="pixels", tokens=196, grid=(14, 14))}
    modalities |= {n: ModalityInfo(kind="sequence", vocabulary=30_000, tokens=256) for n in TEXTS}
    for name, vocabulary in GRIDS.items():
        modalities[f"{name}@224"] = ModalityInfo(kind="grid", vocabulary=vocabulary, tokens=196, grid=(14, 14))
    return Architecture(
        dim=dim,
        encoder_depth=depth,
        decoder_depth=depth,
        num_heads=heads,
        domains_in=tuple(modalities),
        domains_out=tuple(modalities)[1:],
        modalities=modalities,
    )


def make_batches(architecture: Architecture, count: int, size: int, seed: int = 0) -> list[Masked]:
    """Random samples, masked by 4M's mixtures (all to all and RGB to all) with its budgets of 128 and 128."""
    rgb = Mixture(input_alphas={"rgb@224": 1000}, input_default=0)
    masker = Masker(architecture, MaskingConfig(mixtures=(Mixture(), rgb)))
    generator = torch.Generator().manual_seed(seed)
    raw = [random_samples(architecture, size, generator) for _ in range(count)]
    return [(samples, *masker(samples, generator)) for samples in raw]


def random_samples(architecture: Architecture, size: int, generator: torch.Generator) -> RawBatch:
    """Every modality present; texts of 8 to 60 tokens."""

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    tokens, lengths = {}, {}
    for name, info in architecture.modalities.items():
        if info.kind == "sequence":
            lengths[name] = integers(8, 61, size)
            ids = integers(204, info.vocabulary, size, 60)  # behind the sentinels
            tokens[name] = ids * (torch.arange(60) < lengths[name][:, None])
        elif info.kind == "grid":
            tokens[name] = integers(0, info.vocabulary, size, info.tokens)
    pixels = integers(0, 256, size, 3, architecture.image_size, architecture.image_size).to(torch.uint8)
    present = {name: torch.ones(size, dtype=torch.bool) for name in architecture.modalities}
    return RawBatch([str(i) for i in range(size)], tokens, lengths, present, pixels, {})


def our_step(model: FourM, batches: Sequence[Masked], device: torch.device, autocast: bool) -> Step:
    """Forward, backward and update of our network."""
    moved = [(inputs.to(device), targets.to(device)) for _, inputs, targets in batches]
    optimizer = adamw(model, LR, DECAY, BETAS, device)

    def step(number: int) -> torch.Tensor:
        inputs, targets = moved[number % len(moved)]
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(inputs, targets)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.total.detach()

    return step


def their_step(
    model: torch.nn.Module, batches: Sequence[Masked], architecture: Architecture, device: torch.device, autocast: bool
) -> Step:
    """The same as ml-4m's training script does it."""
    made = [train_ml4m.batch(architecture, *masked) for masked in batches]
    moved = [{n: {k: t.to(device) for k, t in d.items()} for n, d in one.items()} for one in made]
    optimizer = train_ml4m.optimizer(model, LR, DECAY, BETAS)

    def step(number: int) -> torch.Tensor:
        tensors = {name: dict(d) for name, d in moved[number % len(moved)].items()}  # it writes into them
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss, _ = model(tensors, num_encoder_tokens=128, num_decoder_tokens=128)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def check_equal(fm: Any, model: FourM, batches: Sequence[Masked]) -> float:
    """The largest difference of the two losses, in nats: by modality at the start, in total after each of two steps."""
    architecture, ours = model.architecture, copy.deepcopy(model)
    theirs = train_ml4m.network(fm, architecture, model.state_dict())
    loss = ours(*batches[0][1:])
    _, by_modality = theirs(train_ml4m.batch(architecture, *batches[0]), 128, 128)
    means = {name: float(loss.sums[name]) / loss.counts[name] for name in loss.sums}
    found = [abs(mean - by_modality[name].item()) for name, mean in means.items()]
    cpu = torch.device("cpu")
    steps = our_step(ours, batches, cpu, False), their_step(theirs, batches, architecture, cpu, False)
    found += [abs(float(steps[0](i)) - float(steps[1](i))) for i in range(3)]
    if not max(found) <= AGREE:
        raise SystemExit(f"the losses differ by up to {max(found):.2g} nats: not the same network, nothing is timed")
    return max(found)


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Everyone who takes turns; ml-4m, if there, first in each precision."""
    found = []
    for precision in precisions_of(args):
        found += [Contender("ml-4m", precision)] if args.ml4m else []
        found += [Contender("ours", precision)]
        found += [Contender("ours", precision, compiled=True)] if args.compile else []
    return found


def precisions_of(args: argparse.Namespace) -> Sequence[str]:
    """On a GPU nobody trains in float32."""
    return args.precisions or (("bfloat16",) if torch.device(args.device).type == "cuda" else ("float32", "bfloat16"))


def step_of(contender: Contender, shape: str, args: argparse.Namespace) -> Step:
    """Training from the same initial weights and batches for everyone."""
    device, architecture, half = torch.device(args.device), architecture_of(shape), contender.precision == "bfloat16"
    batches = make_batches(architecture, 2, batch_size(shape, args))
    torch.manual_seed(0)
    model = FourM(architecture)
    if contender.who == "ml-4m":
        theirs = train_ml4m.network(train_ml4m.load(args.ml4m), architecture, model.state_dict())
        return their_step(theirs.to(device), batches, architecture, device, half)
    if device.type == "cpu":
        keep_memory()  # as training does there
    if contender.compiled:
        compile_blocks(model)
    return our_step(model.to(device).train(), batches, device, half)


def serve(contender: Contender, shape: str, args: argparse.Namespace) -> None:
    """In a process of its own: for each number of steps on stdin, seconds of a step and the last loss on stdout."""
    step, device = step_of(contender, shape, args), torch.device(args.device)
    for number in range(WARM_UP):
        loss = step(number)
    _wait(device)
    print("ready", flush=True)
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        for number in range(int(line)):
            loss = step(number)
        _wait(device)
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        spent = {clock: seconds / int(line) for clock, seconds in spent.items()}
        print(json.dumps({**spent, "loss": float(loss)}), flush=True)


def batch_size(shape: str, args: argparse.Namespace) -> int:
    return args.batch or BATCHES[torch.device(args.device).type].get(shape, 32)


class Child:
    """A contender's process, warmed up."""

    def __init__(self, contender: Contender, shape: str) -> None:
        self.contender = contender
        given = ["--child", json.dumps([contender.who, contender.precision, contender.compiled, shape])]
        command = [sys.executable, __file__, *sys.argv[1:], *given]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()

    def run(self, steps: int) -> dict[str, float]:
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        found: dict[str, float] = json.loads(self._line())
        return found

    def _line(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.contender.name}: its process ended with {self.process.wait()}")
        return line

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_turns(found: Sequence[Contender], shape: str, rounds: int, steps: int) -> dict[str, Any]:
    """By contender, CPU and wall-clock seconds of a step in each round, and the last loss."""
    children = [Child(contender, shape) for contender in found]
    times: dict[str, Any] = {c.name: {"cpu": [], "wall": [], "against": c.against} for c in found}
    for turn in range(rounds):
        for child in children if turn % 2 == 0 else reversed(children):  # A B, then B A: a machine's drift cancels
            spent, own = child.run(steps), times[child.contender.name]
            own["cpu"].append(spent["cpu"])
            own["wall"].append(spent["wall"])
            own["loss"] = spent["loss"]
    for child in children:
        child.close()
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(times: dict[str, Any], size: int, flops: float) -> dict[str, Any]:
    """By contender: medians, GFLOP a second, and the ratio to the one it is held against with its range."""
    rows = {}
    for name, t in times.items():
        row = {f"{clock}_s": statistics.median(t[clock]) for clock in ("cpu", "wall")}
        row |= {f"samples_per_{clock}_s": size / row[f"{clock}_s"] for clock in ("cpu", "wall")}
        row["gflops"] = size * flops / row["wall_s"] / 1e9
        if t["against"] != name and t["against"] in times:
            for clock in ("cpu", "wall"):
                ratios = [b / a for a, b in zip(t[clock], times[t["against"]][clock], strict=True)]
                row[f"{clock}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
        rows[name] = row
    return rows


def run_shape(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one shape."""
    architecture, size = architecture_of(shape), batch_size(shape, args)
    flops = flops_per_sample(architecture, 128, 128)
    found: dict[str, Any] = {"batch": size, "gflop_per_sample": flops / 1e9}
    if args.ml4m and not args.unchecked:
        torch.manual_seed(0)
        small = make_batches(architecture, 2, 4, seed=1)
        found["loss_difference"] = check_equal(train_ml4m.load(args.ml4m), FourM(architecture), small)
        print(f"{shape}: losses agree to {found['loss_difference']:.1g} nats", flush=True)
    times = take_turns(contenders(args), shape, args.rounds, args.steps)
    found["rows"] = summary(times, size, flops)
    return found


def parts_of_ml4m(shape: str, args: argparse.Namespace, precision: str) -> dict[str, float]:
    """Where its time goes."""
    return parts_of(step_of(Contender("ml-4m", precision), shape, args), torch.device(args.device))


def roofline_of(shape: str, args: argparse.Namespace, precision: str) -> Roofline:
    """Where the time of our step goes, beside what the device can do."""
    device, architecture, size = torch.device(args.device), architecture_of(shape), batch_size(shape, args)
    raw = make_batches(architecture, 1, size)[0][0]
    masker, step = Masker(architecture, MaskingConfig()), step_of(Contender("ours", precision), shape, args)
    moved = raw.to(device)

    def mask() -> None:
        masker(moved, torch.Generator(device).manual_seed(0))

    flops = size * flops_per_sample(architecture, 128, 128)
    return measure_roofline(architecture, size, flops, step, mask, device, precision)


def main() -> None:
    """Print a table for each shape; with --out also write docs/training-speed.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ml4m", help="folder of a checkout of apple/ml-4m; without it only ours is timed")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: small tiny; on a GPU base large")
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), help="default: both; GPU: bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--batch", type=int, help="samples a step; default 32, on a GPU 256 (base) and 128 (large)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps a round; default 1, on a GPU 20")
    parser.add_argument("--compile", action="store_true", help="also ours with compiled blocks")
    parser.add_argument("--roofline", action="store_true", help="also the device's ceilings and where the time goes")
    parser.add_argument("--unchecked", action="store_true", help="time without comparing losses first")
    parser.add_argument("--out", help="folder for training-speed.md and training-speed.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a contender's process
    args = parser.parse_args()
    on_gpu = torch.device(args.device).type == "cuda"
    args.steps = args.steps or (20 if on_gpu else 1)
    torch.set_num_threads(args.threads)
    if args.child:
        who, precision, compiled, shape = json.loads(args.child)
        serve(Contender(who, precision, compiled), shape, args)
        return
    command = " ".join(["python benchmarks/train.py", *sys.argv[1:]])
    if args.ml4m:
        command = command.replace(args.ml4m, "CHECKOUT")
    results: dict[str, Any] = {"command": command, "machine": machine(args), "shapes": {}}
    for shape in args.shapes or (["base", "large"] if on_gpu else ["small", "tiny"]):
        results["shapes"][shape] = found = run_shape(shape, args)
        print_table(shape, found)
        for precision in precisions_of(args) if args.roofline else ():
            roofline = roofline_of(shape, args, precision)
            print_roofline(shape, roofline)
            found.setdefault("roofline", {})[precision] = roofline.to_json()
            if args.ml4m:
                parts = found.setdefault("ml4m_parts", {})[precision] = parts_of_ml4m(shape, args, precision)
                print_parts(f"{shape} {precision}, ml-4m", parts)
    if args.out:
        write_page(args.out, results)


def machine(args: argparse.Namespace) -> str:
    """What it was measured on."""
    threads = f"{args.threads} thread{'s' if args.threads > 1 else ''}"
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} of {os.cpu_count()} cores"
    return f"{name}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


if __name__ == "__main__":
    main()
