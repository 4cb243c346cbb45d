"""The `Engine` protocol, its training batch, and the memory plan of a level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import NEVER, Floats, Labels, Vector
from fedfmsl.protocol.layout import HEAD, Layout
from fedfmsl.protocol.messages import EngineName, Training


@dataclass(frozen=True)
class Batch:
    """Samples of one optimizer step.

    The loss of sample i is −log(exp(gateᵢ) p(yᵢ) + exp(otherᵢ)), with p the softmax of logits + bias. This is the
    negative log-likelihood of the mixture (stage 2). With gate 0 and other = NEVER it is the cross-entropy.

    `hidden` (B, N, D): hidden states below the level's suffix. `labels` (B,). `gate` (B,): log gate weight of the
    trained expert. `other` (B,): log-likelihood of the label under the other expert, plus its log gate weight.
    `bias` (C,): added to the logits.
    """

    hidden: Floats
    labels: Labels
    gate: Floats
    other: Floats
    bias: Floats

    @classmethod
    def cross_entropy(cls, hidden: Floats, labels: Labels, classes: int) -> Batch:
        """A batch with the cross-entropy loss over all C = `classes` classes."""
        size = len(labels)
        gate, other = np.zeros(size, np.float32), np.full(size, NEVER, np.float32)
        return cls(hidden, labels, gate, other, np.zeros(classes, np.float32))

    def micro_batches(self, size: int) -> Iterator[dict[str, NDArray[Any]]]:
        """Inputs of the step graph for at most `size` samples each. `weights` sum to 1 over the whole batch."""
        count = len(self.labels)
        for start in range(0, count, size):
            part = slice(start, start + size)
            yield {
                "hidden": self.hidden[part],
                "labels": self.labels[part],
                "weights": np.full(len(self.labels[part]), 1 / count, np.float32),
                "gate": self.gate[part],
                "other": self.other[part],
                "bias": self.bias,
            }


@dataclass(frozen=True)
class MemoryPlan:
    """How a level runs within the device's memory.

    `micro_batch`: samples per graph run. `lean`: keep only one session open and do not pack its weights, because packed
    weights are a second copy in memory.
    """

    micro_batch: int
    lean: bool = False


class Engine(Protocol):
    """Trains and evaluates one expert at one level at a time. Inputs are hidden states below the level's suffix."""

    name: EngineName

    def load(self, level: int) -> None:
        """Selects the level of all following calls. Drops parameters and optimizer state."""

    def set(self, theta: Vector, training: Training | None = None) -> None:
        """Sets the trainables (P,). With `training`, also starts a new AdamW optimizer, which `step` needs."""

    def get(self) -> Vector:
        """The current trainables (P,)."""

    def step(self, batch: Batch) -> float:
        """Takes one optimizer step on the mean loss of the batch. Returns that loss.

        Raises RuntimeError without an optimizer.
        """

    def predict(self, hidden: Floats) -> Floats:
        """Class logits (B, C) of hidden states (B, N, D)."""

    def features(self, hidden: Floats) -> Floats:
        """The class token's features (B, F), which the head reads, of hidden states (B, N, D)."""

    def release(self) -> None:
        """Frees memory where possible. Parameters and optimizer state stay."""


def expert_decay(layout: Layout, size: int, weight_decay: float) -> Vector:
    """AdamW's weight decay for each of the first `size` trainables (P,): `weight_decay` for LoRA, 0 for the head."""
    decay = np.full(size, weight_decay, np.float32)
    decay[layout.parts[HEAD]] = 0.0
    return decay
