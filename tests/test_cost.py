"""Counting what a call costs: exact for known shapes."""

from __future__ import annotations

import torch

from fourmill.labelers.cost import measure


def test_flops_are_two_for_each_multiply_add() -> None:
    image, kernel = torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3)
    cost = measure(lambda: torch.nn.functional.conv2d(image, kernel, padding=1))
    assert cost.flops == 2 * 4 * 8 * 8 * 3 * 3 * 3
    assert cost.peak_bytes == 4 * 8 * 8 * 4  # the output, in float32


def test_peak_counts_what_is_alive_at_once_not_what_was_ever_made() -> None:
    start = torch.ones(1000)

    def chain() -> torch.Tensor:
        value = start
        for _ in range(10):
            value = value + 1
        return value

    assert measure(chain).peak_bytes == 2 * 4000  # one result while the next is made


def test_views_and_in_place_changes_need_no_memory() -> None:
    start = torch.ones(1000)
    assert measure(lambda: start.view(10, 100).transpose(0, 1).add_(1)).peak_bytes == 0


def test_attention_of_a_transformer_layer_is_counted_whole() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    tokens = torch.ones(1, 10, 16)
    projections, products, mlp = 4 * 10 * 16 * 16, 2 * 10 * 10 * 16, 2 * 10 * 16 * 32
    assert measure(lambda: layer(tokens)).flops == 2 * (projections + products + mlp)
