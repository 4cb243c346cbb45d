"""What an operator decides about a run."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict, Field

from protocol.messages import Sal, Training


class Head(str, Enum):
    """What stage 1 starts from: the class means of the devices' features, the directions that a text tower gives the
    class names, or nothing."""

    CLASS_MEANS = "class-means"
    ZERO_SHOT = "zero-shot"
    ZEROS = "zeros"


class RunConfig(BaseModel):
    """Times in seconds. `devices` are waited for before the run starts, `join_timeout` at the longest; a round closes
    when all its devices have answered or after `round_timeout`, and is repeated with fewer than `min_updates`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    devices: int = Field(ge=1)
    min_updates: int = Field(default=1, ge=1)
    join_timeout: float = Field(default=600.0, gt=0)
    round_timeout: float = Field(default=600.0, gt=0)
    max_repeats: int = Field(default=5, ge=0)
    stage1_rounds: int = Field(default=12, ge=1)
    stage2_rounds: int = Field(default=4, ge=1)
    baseline: bool = False
    head: Head = Head.CLASS_MEANS
    stage1: Training = Training(epochs=2, learning_rate=2e-3)
    stage2: Training = Training(epochs=1, learning_rate=5e-4)
    stage1_sal: Sal
    stage2_sal: Sal
