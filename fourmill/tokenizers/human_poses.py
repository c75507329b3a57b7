"""People's bodies as text tokens, as 4M-21 has them (see `people`): a network codes the 207 numbers of a pose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fourmill.pipeline.component import ComponentConfig
from fourmill.tokenizers.coded import CodedTokenizer
from fourmill.tokenizers.sequences import people
from fourmill.tokenizers.text import SequenceTokenizerConfig


class HumanPosesTokenizerConfig(SequenceTokenizerConfig):
    """Configuration of the tokenizer of `human_poses`."""

    max_tokens: int = Field(default=274, ge=1)
    """Longest row stored, in ids: seven people of 39 (4M: 275 with the end marker); more are left out."""
    poses: str
    """Checkpoint of the network that codes a pose, as `checkpoint` names the vocabulary's."""


class HumanPosesTokenizer(CodedTokenizer):
    """Rows of people; values are lists of {box, orientation, pose, camera, shape}."""

    Config: ClassVar[type[ComponentConfig]] = HumanPosesTokenizerConfig
    version = 1
    setting, part, code_length = "poses", "human_pose", people.CODE
    config: HumanPosesTokenizerConfig  # type: ignore[assignment]

    def encode(self, values: Any) -> list[np.ndarray]:
        """B lists of people -> B arrays (n,), n <= max_tokens; `none` where there are none."""
        poses = [people.numbers_of(p, "pose", people.POSE).astype(np.float32) for value in values for p in value]
        codes = iter(self.code(poses))
        return self.rows([people.serialise(value, [next(codes) for _ in value], self.bins) for value in values])

    def decode(self, tokens: Sequence[np.ndarray]) -> list[Any]:
        """B arrays of ids -> B lists of people."""
        return [found for found, _ in self._read(tokens)]

    def parse(self, tokens: np.ndarray) -> tuple[list[dict[str, Any]], list[str]]:
        """The people of a row of ids, and what of it was none; never fails for ids of the vocabulary."""
        return self._read([tokens])[0]

    def _read(self, tokens: Sequence[np.ndarray]) -> list[tuple[list[dict[str, Any]], list[str]]]:
        parsed = [people.parse(self.text(row), self.bins, self.settings.network.vocabulary) for row in tokens]
        poses = iter(self.decoded([person["code"] for found, _ in parsed for person in found]))
        return [([_with_pose(person, next(poses)) for person in found], problems) for found, problems in parsed]


def _with_pose(person: dict[str, Any], pose: np.ndarray) -> dict[str, Any]:
    return {**{k: v for k, v in person.items() if k != "code"}, "pose": [float(v) for v in np.ravel(pose)]}
