"""Spikes, losses that are no numbers, and dead modalities, found in constructed figures and in a real run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_pretrain as tiny
import torch

from fourmill.model import train
from fourmill.model.config import Mixture
from fourmill.model.progress import StepFigures, duration, shortened
from fourmill.model.step import Training
from fourmill.model.watch import Watch


def figures(loss: float, norm: float = 1.0, **counts: int) -> StepFigures:
    targets = counts or {"tok_depth": 5}
    return StepFigures(loss, norm, {name: loss * n for name, n in targets.items()}, targets, {})


def watch(**changes: Any) -> Watch:
    return Watch(tiny.tiny_config("unused", **changes))


def usual(watch: Watch, steps: int) -> None:
    """Losses that waver around 3 by 0.1; median 3, median deviation 0.1."""
    for step in range(1, steps + 1):
        assert watch.accepts(step, figures(3 + 0.1 * (-1) ** step))


def test_spike_is_reported_with_its_step_and_the_step_is_taken() -> None:
    w = watch()
    usual(w, 40)
    assert w.accepts(41, figures(3 + 0.1 * 1.4826 * 9.1))
    (event,) = w.drain()
    assert event.startswith("step 41: the loss is 4.349, 9 deviations above the median of the 40 steps before")
    assert event.endswith("its samples: fourmill trace --run unused --step 40")
    assert w.skipped == 0
    below = watch()
    usual(below, 40)
    assert below.accepts(41, figures(3 + 0.1 * 1.4826 * 7.9))
    assert below.drain() == ()


def test_spike_is_left_out_where_asked_and_does_not_become_usual() -> None:
    w = watch(on_spike="skip")
    usual(w, 40)
    assert [w.accepts(step, figures(30.0)) for step in range(41, 101)] == [False] * 60
    assert w.skipped == 60
    assert w.accepts(101, figures(3.0))


@pytest.mark.parametrize("steps", [1, 19])
def test_nothing_is_a_spike_before_it_is_known_what_is_usual(steps: int) -> None:
    w = watch(on_spike="skip")
    usual(w, steps)
    assert w.accepts(steps + 1, figures(1000.0))


def test_fall_of_the_loss_is_no_spike() -> None:
    w = watch(on_spike="skip")
    usual(w, 40)
    assert w.accepts(41, figures(0.1))


def test_steps_without_finite_figures_are_left_out_up_to_a_limit_that_names_the_modality() -> None:
    w = watch(max_skipped=2)
    bad = StepFigures(math.nan, 1.0, {"tok_depth": 4.0, "tok_caption": math.nan}, {"tok_depth": 1}, {})
    assert not w.accepts(1, bad)
    assert not w.accepts(2, figures(3.0, norm=math.inf))
    assert w.accepts(3, figures(3.0))
    assert "of no single modality, but the gradient's norm" in w.drain()[1]
    with pytest.raises(
        FloatingPointError, match=r"step 4: loss nan, .* of tok_caption; that is step 3 of .* Lower lr \(0\.004\)"
    ):
        w.accepts(4, bad)
    assert w.skipped == 3


def test_modality_without_targets_is_dead_after_so_many_steps_and_is_named_once() -> None:
    w = watch(dead_after=3)
    for step in range(1, 6):
        w.accepts(step, figures(3.0, tok_depth=5, tok_caption=int(step == 1)))
    (event,) = w.drain()
    assert event.startswith("step 4: tok_caption is dead: no target token of it in the last 3 steps")


def test_modality_that_is_no_better_than_frequencies_is_named_until_it_is() -> None:
    w, frequencies = watch(dead_after=100), {"tok_depth": 2.0, "tok_caption": 3.0}
    w.evaluated(50, {"tok_depth": 2.5, "tok_caption": 1.0}, frequencies)
    assert w.drain() == ()
    w.evaluated(100, {"tok_depth": 2.5, "tok_caption": 1.0}, frequencies)
    w.evaluated(150, {"tok_depth": 2.4, "tok_caption": 1.0}, frequencies)
    (event,) = w.drain()
    assert event.startswith("step 100: tok_depth has not been learned: 2.500 nats a held-out token, and its token freq")
    w.evaluated(200, {"tok_depth": 1.9, "tok_caption": 1.0}, frequencies)
    w.evaluated(250, {"tok_depth": 2.1, "tok_caption": 1.0}, frequencies)
    assert len(w.drain()) == 1


def test_watch_that_was_saved_judges_as_one_that_was_not() -> None:
    first, second = watch(on_spike="skip"), watch(on_spike="skip")
    usual(first, 40)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert not second.accepts(41, figures(30.0))
    assert second.state_dict() != first.state_dict()
    assert not first.accepts(41, figures(30.0))
    assert second.state_dict() == first.state_dict()


def test_step_without_a_finite_gradient_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tiny.make_tokens(tmp_path / "dataset")
    after: list[list[torch.Tensor]] = []
    taken = Training.advance

    def advance(run: Any, slices: Any, interruption: Any) -> Any:
        # A weight of the fourth step's batch is spoilt for the forward pass alone.
        sound = run.model.mask_token.data.clone()

        def restore(*_: Any) -> None:
            run.model.mask_token.data.copy_(sound)

        if run.step == 3:
            run.model.mask_token.data.fill_(math.nan)
            run.model.register_forward_hook(restore)
        found = taken(run, slices, interruption)
        after.append([p.detach().clone() for p in run.model.parameters()])
        return found

    monkeypatch.setattr(Training, "advance", advance)
    result = train.pretrain(
        dataset, tiny.tiny_config(tmp_path / "out", steps=6, warmup=0, lr=1e-3, schedule="constant")
    )
    changed = [any(not torch.equal(a, b) for a, b in zip(after[i], after[i - 1], strict=True)) for i in range(1, 6)]
    assert changed == [True, True, False, True, True]
    assert result.skipped == 1
    assert "step 4: no update (loss nan" in result.events[0]
    assert "tok_depth, tok_caption" in result.events[0]


def test_run_reports_a_modality_that_its_mixture_leaves_out(tmp_path: Path) -> None:
    masking = tiny.tiny_config("unused").masking.model_copy(
        update={"mixtures": (Mixture(target_alphas={"tok_caption": 0}),)}
    )
    config = tiny.tiny_config(tmp_path / "out", masking=masking, dead_after=5, steps=6)
    result = train.pretrain(tiny.make_tokens(tmp_path / "dataset"), config)
    assert result.events[0].startswith("step 5: tok_caption is dead")
    assert result.target_tokens["tok_caption"] == 0
    assert result.target_tokens["tok_depth"] > 0


def test_progress_line_reads_as_documented() -> None:
    report = train.Progress(
        step=1200,
        steps=5000,
        loss=3.2138,
        losses={"tok_depth": 3.2},
        lr=8.1e-4,
        grad_norm=0.4199,
        samples_per_s=100.0,
        tokens_per_s=12_345.0,
        mfu=0.412,
        data_share=0.0031,
        eta_s=725.0,
        events=("step 1190: ouch",),
    )
    line = "step 1,200/5,000  loss 3.214  lr 8.1e-04  |g| 0.42  12.3k tok/s  MFU 41 %  data 0.3 %  ETA 12 min"
    assert str(report) == f"{line}\n  ! step 1190: ouch"


def test_numbers_are_written_for_people() -> None:
    assert [shortened(n) for n in (7, 999, 1_000, 45_678, 1.23e6, 2.5e9)] == [
        "7",
        "999",
        "1k",
        "45.7k",
        "1.23M",
        "2.5G",
    ]
    assert [duration(s) for s in (45, 119, 725, 7_300, 200_000)] == ["45 s", "119 s", "12 min", "2.0 h", "2.3 d"]
