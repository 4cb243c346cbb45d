"""Local training of one expert on cached hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.data.features import HiddenStates, Report
from edge_runtime.engines.base import Batch, Engine
from fedfmsl.algorithms.arrays import NEVER, Floats, Labels
from fedfmsl.algorithms.mixture import log_softmax
from fedfmsl.protocol.messages import Training


@dataclass(frozen=True)
class Targets:
    """The loss terms of n samples; see `Batch` for the loss.

    `labels` (n,). `gate` (n,): log gate weight of the trained expert. `other` (n,): log-likelihood of the label under
    the other expert, plus its log gate weight.
    """

    labels: Labels
    gate: Floats
    other: Floats

    @classmethod
    def cross_entropy(cls, labels: Labels) -> Targets:
        """The cross-entropy: full weight for the trained expert, none for the other."""
        size = len(labels)
        return cls(labels, np.zeros(size, np.float32), np.full(size, NEVER, np.float32))


def train(
    engine: Engine,
    hidden: HiddenStates,
    targets: Targets,
    bias: Floats,
    training: Training,
    seed: Sequence[int],
    report: Report,
) -> float:
    """Trains for `training.epochs` shuffled epochs. Returns the mean loss of the last epoch.

    `bias` (C,) is added to the logits. `seed` determines the shuffles.
    """
    rng = np.random.default_rng(seed)
    size, done, loss = len(hidden), 0, 0.0
    for _ in range(training.epochs):
        loss = 0.0
        for chosen in np.array_split(rng.permutation(size), -(-size // training.batch_size)):
            batch = Batch(
                hidden.batch(chosen),
                targets.labels[chosen],
                targets.gate[chosen],
                targets.other[chosen],
                bias,
            )
            loss += engine.step(batch) * len(chosen) / size
            done += len(chosen)
            report("training", done, size * training.epochs)
    return loss


def predict_log_p(engine: Engine, hidden: HiddenStates, bias: Floats) -> Floats:
    """Class log-probabilities (n, C) of logits + `bias` (C,)."""
    logits = [engine.predict(batch) for batch in hidden.batches()]
    return log_softmax(np.concatenate(logits) + bias) if logits else np.empty((0, len(bias)), np.float32)
