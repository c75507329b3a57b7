"""Batch sizes: found by measuring, halved when memory runs out, filled up for compiled networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import toys

from fourmill.pipeline.batches import CPU_BATCH, Batches, fastest
from fourmill.pipeline.component import Batch, Failure


def batch(count: int) -> Batch:
    pixels = np.random.default_rng(1).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    return Batch([f"k{i}" for i in range(count)], pixels)


class Recorder(toys.Brightness):
    """Remembers the size of every call; has memory for `limit` samples."""

    limit = 10**6
    fixed = False

    def __init__(self, **options: Any) -> None:
        super().__init__("depth", self.Config(kind="recorder", **options))
        self.calls: list[int] = []

    @property
    def fixed_batches(self) -> bool:  # type: ignore[override]
        return self.fixed

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        self.calls.append(len(batch))
        if len(batch) > self.limit:
            raise MemoryError("full")
        return super().run(batch)


def speed_of(table: dict[int, float]) -> Any:
    """run(size) -> seconds for the given samples per second; MemoryError beyond the table."""

    def run(size: int) -> float:
        if size not in table:
            raise MemoryError("full")
        return size / table[size]

    return run


@pytest.mark.parametrize(
    ("rates", "size"),
    [
        ({8: 100, 16: 190, 32: 300, 64: 310, 128: 900}, 32),  # 64 gains 3 %
        ({8: 100, 16: 200}, 16),  # 32 does not fit
        ({8: 100, 16: 99}, 8),
        ({}, 1),
        ({8 * 2**i: 100.0 * 2**i for i in range(7)}, 512),  # never beyond
    ],
)
def test_fastest_batch_is_doubled_while_it_gains_five_percent_and_fits(rates: dict[int, float], size: int) -> None:
    assert fastest(speed_of(rates)) == size


def test_error_that_is_not_memory_is_not_taken_for_a_limit() -> None:
    def run(size: int) -> float:
        raise ValueError("the network is broken")

    with pytest.raises(ValueError, match="the network is broken"):
        fastest(run)


def test_out_of_memory_halves_the_batch_once_and_for_good() -> None:
    component = Recorder(batch_size=8)
    component.limit = 3
    batches = Batches(component, "cpu", 8)
    whole = batches.run(batch(8))["depth"]
    assert component.calls == [8, 4, 2, 2, 2, 2]
    assert batches.size == 2
    component.limit = 8
    for made, expected in zip(whole, component.run(batch(8))["depth"], strict=True):
        np.testing.assert_array_equal(made, expected)
    assert batches.notes[0] == "depth: batch of 8 split after MemoryError: full"


def test_one_bad_sample_fails_alone() -> None:
    made = Batches(Recorder(fail=("k2",)), "cpu", 8).run(batch(4))["depth"]
    assert [isinstance(m, Failure) for m in made] == [False, False, True, False]
    assert made[2].reason == "RuntimeError: cannot stand k2"


def test_compiled_network_always_gets_full_batches() -> None:
    component = Recorder(batch_size=4)
    component.fixed = True
    batches = Batches(component, "cpu", 8)
    assert len(batches.run(batch(3))["depth"]) == 3
    component.limit = 3
    assert len(batches.run(batch(3))["depth"]) == 3
    assert component.calls == [4, 4, 2, 2]
    assert batches.size == 2


def test_sample_that_alone_is_too_large_is_a_failure_not_a_loop() -> None:
    component = Recorder(batch_size=4)
    component.limit, component.fixed = 0, True
    made = Batches(component, "cpu", 8).run(batch(4))["depth"]
    assert [m.reason for m in made] == ["MemoryError: full"] * 4


def test_default_on_a_cpu_needs_no_measuring() -> None:
    component = Recorder()
    assert Batches(component, "cpu", 8).size == CPU_BATCH
    assert component.calls == []
