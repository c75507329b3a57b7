"""What every section of the model's configuration is: frozen, and without unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

PIXELS = "rgb"  # in a list of inputs it means raw pixels; RGB as tokens is `tok_rgb`
PAD, UNK, SOS, EOS, FIRST_SENTINEL = 0, 1, 2, 3, 4  # the ids that every text vocabulary of 4M begins with
SEQUENCE_POSITIONS = 512  # rows of a published position table for text, whatever the longest text


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
