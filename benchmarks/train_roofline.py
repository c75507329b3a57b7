"""What a device can do at the sizes of a training step, and where the step's time goes; for benchmarks/train.py.

The ceiling of each matrix product is measured alone, at its size in the step and in its precision; its backward pass,
two products of the same size, is taken to run at the same rate. The step at the ceiling is what is left if nothing but
products cost time. The parts of a step are its operators' own times in torch's profiler, summed by kind.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fourmill.model.config import Architecture

KINDS = {  # of operators, by what their names contain; the first that fits counts, `elementwise` is the rest
    "optimizer": ("adamw", "foreach", "multi_tensor", "Optimizer"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "norms": ("layer_norm",),
    "attention": ("scaled_dot_product", "attention", "bmm", "softmax", "masked_fill"),
    "matrix products": ("mm", "linear"),
    "embeddings, gathers": ("embedding", "index", "gather", "scatter", "nonzero", "sort", "cumsum"),
    "copies, casts": ("copy", "cat", "clone", "contiguous", "zero_", "fill_", "empty", "zeros"),
}
REST = "elementwise"
STEPS = 3
_TRIES = 3


@dataclass(frozen=True)
class Product:
    """`count` forward products a step of (rows, inner) by (inner, columns), `batch` of them at once."""

    name: str
    count: float
    rows: int
    inner: int
    columns: int
    batch: int = 1

    @property
    def flops(self) -> float:
        """Of one."""
        return 2.0 * self.batch * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Roofline:
    """`ceilings`: GFLOP a second of each product. `seconds`, `flops`: of a step. `parts`: seconds by kind of operator.

    `masking`: seconds to mask one batch, which training does beside the step.
    """

    precision: str
    ceilings: dict[str, float]
    gigabytes_per_s: float
    seconds: float
    seconds_at_ceiling: float
    flops: float
    product_flops: float
    parts: dict[str, float]
    masking: float

    @property
    def achieved(self) -> float:
        """The step's rate over the rate of its products alone."""
        return self.seconds_at_ceiling / self.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def products_of(a: Architecture, size: int, inputs: int = 128, targets: int = 128) -> list[Product]:
    """The forward pass's products: linear layers, attention, logits; targets spread evenly over the modalities."""
    hidden = int(2 * a.mlp_ratio * a.dim / 3) if a.gated_mlp else int(a.mlp_ratio * a.dim)
    gates, d, head = (2 if a.gated_mlp else 1), a.dim, a.dim // a.num_heads
    rows_in, rows_out, e, f = size * inputs, size * targets, a.encoder_depth, a.decoder_depth
    patches = rows_in / len(a.domains_in)
    found = [
        Product("attention in, out", e, rows_in, d, 4 * d),
        Product("attention in, out", f, rows_out, d, 6 * d),
        Product("attention in, out", f, rows_in, d, 2 * d),
        Product("mlp in", gates * e, rows_in, d, hidden),
        Product("mlp in", gates * f, rows_out, d, hidden),
        Product("mlp out", e, rows_in, hidden, d),
        Product("mlp out", f, rows_out, hidden, d),
        Product("context", 1, rows_in, d, d),
        Product("patches", 1, round(patches), 3 * a.patch_size**2, d),
        Product("scores, values", 2 * e, inputs, head, inputs, size * a.num_heads),
        Product("scores, values", 2 * f, targets, head, targets, size * a.num_heads),
        Product("scores, values", 2 * f, targets, head, inputs, size * a.num_heads),
    ]
    rows = round(rows_out / len(a.domains_out))
    return found + [Product("logits", 1, rows, d, a.modalities[name].vocabulary) for name in a.domains_out]


def rate(product: Product, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of one product, the best of a few tries of 0.1 s each."""
    shape = (product.batch,) if product.batch > 1 else ()
    one = torch.randn(*shape, product.rows, product.inner, device=device).to(dtype)
    other = torch.randn(*shape, product.inner, product.columns, device=device).to(dtype)
    return product.flops / _seconds(lambda: one @ other, device)


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying 256 MB."""
    one = torch.zeros(1 << 26, device=device)
    other = torch.empty_like(one)
    return 2 * one.numel() * 4 / _seconds(lambda: other.copy_(one), device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, at best."""
    best = float("inf")
    for _ in range(_TRIES):
        calls, start = 0, _now(device)
        while (spent := _now(device) - start) < 0.1 or not calls:
            for _ in range(20 if device.type == "cuda" else 1):  # on a GPU the launch is not what is measured
                call()
                calls += 1
        best = min(best, spent / calls)
    return best


def _now(device: torch.device) -> float:
    """Seconds; on a CPU those of this process, which a busy machine hardly changes."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_roofline(
    architecture: Architecture,
    size: int,
    flops: float,
    step: Callable[[int], Any],
    mask: Callable[[], None],
    device: torch.device,
    precision: str,
) -> Roofline:
    """`flops`: of a step, by the model's own count."""
    dtype = getattr(torch, precision)
    products = products_of(architecture, size)
    rates = {p: rate(p, device, dtype) for p in dict.fromkeys(products)}
    spent: dict[str, float] = {}
    done: dict[str, float] = {}
    for p in products:
        spent[p.name] = spent.get(p.name, 0.0) + p.count * p.flops / rates[p]
        done[p.name] = done.get(p.name, 0.0) + p.count * p.flops
    step(0)
    seconds = min(_timed(step, number, device) for number in range(STEPS))
    return Roofline(
        precision=precision,
        ceilings={name: done[name] / spent[name] / 1e9 for name in spent},
        gigabytes_per_s=bandwidth(device) / 1e9,
        seconds=seconds,
        seconds_at_ceiling=3 * sum(spent.values()),
        flops=flops,
        product_flops=3 * sum(done.values()),
        parts=parts_of(step, device),
        masking=_seconds(mask, device),
    )


def _timed(step: Callable[[int], Any], number: int, device: torch.device) -> float:
    start = _now(device)
    step(number)
    return _now(device) - start


def parts_of(step: Callable[[int], Any], device: torch.device) -> dict[str, float]:
    """Seconds a step by kind of operator, largest first."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        for number in range(STEPS):
            step(number)
    parts: dict[str, float] = {}
    whole = 0.0  # of the optimizer
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = kind_of(event.key)
        parts[kind] = parts.get(kind, 0.0) + microseconds / STEPS / 1e6
        if event.key.startswith("Optimizer.step") and not on_gpu:
            whole = event.cpu_time_total / STEPS / 1e6
    plain = max(
        whole - parts.get("optimizer", 0.0), 0.0
    )  # an optimizer without kernels of its own: elementwise, by name
    parts["optimizer"] = parts.get("optimizer", 0.0) + plain
    parts[REST] = max(parts.get(REST, 0.0) - plain, 0.0)
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def kind_of(operator: str) -> str:
    """The kind of an operator (on a GPU also of a kernel) by its name."""
    return next((kind for kind, words in KINDS.items() if any(word in operator for word in words)), REST)


def print_roofline(shape: str, found: Roofline) -> None:
    """A few lines."""
    counted = f"{found.flops / 1e9:.0f} GFLOP ({found.product_flops / 1e9:.0f} in the products below)"
    print(f"{shape} {found.precision}: a step has {counted}")
    print("  GFLOP/s measured alone: " + ", ".join(f"{name} {value:.0f}" for name, value in found.ceilings.items()))
    print(f"  memory: {found.gigabytes_per_s:.1f} GB/s; masking a batch: {found.masking * 1e3:.1f} ms")
    print(
        f"  {found.seconds:.3f} s a step, {found.seconds_at_ceiling:.3f} s at the products' ceilings:"
        f" {100 * found.achieved:.0f} %, {found.flops / found.seconds / 1e9:.0f} GFLOP/s"
    )
    print_parts(f"{shape} {found.precision}, ours", found.parts)


def print_parts(title: str, parts: dict[str, float]) -> None:
    """One line a kind of operator."""
    print(f"{title}: seconds a step by operator")
    total = sum(parts.values())
    for name, seconds in parts.items():
        print(f"  {name:<22}{seconds:>9.4f} s {100 * seconds / total:>5.1f} %", flush=True)
