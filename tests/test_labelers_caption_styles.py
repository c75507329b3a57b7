"""Styles of captions in a configuration, and draws from given numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fourmill.labelers import LABELERS
from fourmill.labelers.caption_sampling import SeededSampler, draw, uniforms


def test_draw_inverts_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.3, 0.5, 0.2])).expand(7, 3)
    numbers = torch.tensor([0.0, 0.29, 0.31, 0.79, 0.81, 0.99, 1 - 2**-24])
    assert draw(logits, numbers).tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_draw_keeps_the_fewest_likeliest_tokens_that_reach_top_p() -> None:
    logits = torch.log(torch.tensor([0.3, 0.5, 0.2])).expand(4, 3)
    numbers = torch.tensor([0.0, 0.6, 0.65, 0.999])  # 0.5 and 0.3 are left: the first has 0.625 of what is left
    assert draw(logits, numbers, top_p=0.7).tolist() == [1, 1, 0, 0]
    assert draw(logits, numbers, top_p=0.5).tolist() == [1, 1, 1, 1]
    assert draw(logits, numbers, top_p=0.01).tolist() == [1, 1, 1, 1]
    assert draw(torch.zeros(4, 2), numbers, top_p=0.5).tolist() == [0, 0, 0, 0]  # the first reaches it, exactly


def test_draw_never_chooses_an_impossible_token() -> None:
    logits = torch.full((2, 50_000), -torch.inf)
    logits[:, 7] = logits[:, 11] = 0.0
    numbers = torch.tensor([0.0, 1 - 2**-24])
    assert draw(logits, numbers).tolist() == [7, 11]
    assert draw(logits, numbers, top_p=0.9999).tolist() == [7, 11]


def test_frequencies_of_draws_are_the_probabilities() -> None:
    numbers = uniforms([str(i) for i in range(4000)], seed=0, style="short", index=0, count=2)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    drawn = draw(torch.log(torch.tensor([0.1, 0.6, 0.3])).expand(4000, 3), numbers[:, 1])
    assert torch.bincount(drawn).div(4000).numpy() == pytest.approx([0.1, 0.6, 0.3], abs=0.03)


def test_sampler_leaves_one_token_and_uses_one_number_a_step() -> None:
    sampler = SeededSampler(torch.tensor([[0.0, 0.9]]), temperature=1.0, top_p=1.0)
    scores = torch.log(torch.tensor([[0.5, 0.5]]))
    assert sampler(torch.zeros(1, 1), scores).tolist() == [[0.0, -float("inf")]]
    assert sampler(torch.zeros(1, 2), scores).tolist() == [[-float("inf"), 0.0]]


def test_low_temperature_takes_the_best_token() -> None:
    sampler = SeededSampler(torch.tensor([[0.999]]), temperature=0.01, top_p=1.0)
    assert sampler(torch.zeros(1, 1), torch.tensor([[1.0, 2.0, 0.0]])).argmax().item() == 1


def test_fields_at_the_top_are_every_styles_unless_it_says_otherwise() -> None:
    config: Any = LABELERS.build(
        "caption",
        {"checkpoint": "demo:caption", "max_new_tokens": 9, "styles": {"short": {}, "dense": {"max_new_tokens": 90}}},
    ).config
    assert {name: style.max_new_tokens for name, style in config.styles.items()} == {"short": 9, "dense": 90}


def test_configuration_reads_the_same_after_it_was_written_out() -> None:
    """Workers build their components from the dumped configuration."""
    options = {"num_beams": 4, "prompt": "a", "styles": {"short": {}, "many": {"count": 3}, "one": {"num_beams": 1}}}
    one: Any = LABELERS.build("caption", {"checkpoint": "demo:caption", **options})
    dumped = {key: value for key, value in one.config.model_dump().items() if key != "kind"}
    other: Any = LABELERS.build("caption", dumped)
    assert other.config == one.config
    assert other.lineage() == one.lineage()
    assert [(s.num_beams, s.count, s.prompt) for s in other.config.styles.values()] == [
        (4, 1, "a"),
        (4, 3, "a"),
        (1, 1, "a"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "num_beams": 2}, "choose one"),
        ({"temperature": 0.5}, "no effect without do_sample"),
        ({"top_p": 0.5}, "no effect without do_sample"),
        ({"count": 2}, "needs do_sample: true, or num_beams of at least 2"),
        ({"styles": {"dense": {"count": 3, "num_beams": 2}}}, "num_beams of at least 3"),
        ({"styles": {"dense": {"max_tokens": 3}}}, "max_tokens"),
        ({"styles": {}}, "at least 1"),
        ({"styles": ["short"]}, "dict"),
        ({"outputs": []}, "at least 1"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_configuration_that_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LABELERS.build("caption", {"checkpoint": "demo:caption", **options})
