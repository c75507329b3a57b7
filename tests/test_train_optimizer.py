"""Schedules, groups and the moving average of weights, as literal values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fourmill.model.optimizer import Ema, adamw, learning_rate


def rates(count: int, **options: Any) -> list[float]:
    return [round(learning_rate(step, lr=1.0, **options), 6) for step in range(count)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"warmup": 4, "steps": 12}, [0.25, 0.5, 0.75, 1, 1, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447]),
        ({"warmup": 0, "steps": 4}, [1, 0.853553, 0.5, 0.146447, 0]),
        ({"warmup": 2, "steps": 6, "schedule": "constant"}, [0.5, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 2, "steps": 8, "schedule": "wsd", "decay_steps": 4}, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        ({"warmup": 0, "steps": 10, "schedule": "wsd"}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0]),
        (
            {"warmup": 1, "steps": 8, "schedule": "wsd", "decay_steps": 4, "decay": "1-sqrt"},
            [1, 1, 1, 1, 1, 0.5, 0.292893, 0.133975, 0],
        ),
    ],
)
def test_schedules_step_by_step(options: dict[str, Any], expected: list[float]) -> None:
    assert rates(len(expected), **options) == expected


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.norm = nn.Linear(3, 2), nn.LayerNorm(3)
        self.token = nn.Parameter(torch.zeros(1, 1, 3))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def test_matrices_decay_and_norms_biases_and_single_vectors_do_not() -> None:
    parts = Parts()
    optimizer = adamw(parts, 0.1, 0.05, (0.9, 0.95), torch.device("cpu"))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n: decays.get(id(p)) for n, p in parts.named_parameters()} == {
        "token": 0.0,
        "frozen": None,
        "matrix.weight": 0.05,
        "matrix.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
    }
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["fused"]


def test_average_follows_the_weights_by_its_decay_and_goes_away_after_use() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(8.0)
    ema = Ema(model, 0.5)
    model.weight.data.fill_(0.0)
    ema.update(1)  # the decay begins at 1 / (1 + 9)
    assert ema.means[0].item() == pytest.approx(0.8)
    model.weight.data.fill_(2.0)
    ema.update(1000)  # and is 0.5 by now
    assert ema.means[0].item() == pytest.approx(1.4)
    with ema.applied():
        assert model.weight.item() == pytest.approx(1.4)
    assert model.weight.item() == 2.0
