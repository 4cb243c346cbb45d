"""MoFM on a device: outputs of both experts for samples, and their mixture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import Samples, TrainingContext
from edge_runtime.training.stages import Globals
from fedfmsl.algorithms.arrays import Floats, Labels, Vector
from fedfmsl.algorithms.calibration import fit_temperature
from fedfmsl.algorithms.mixture import Biases, class_dropout, gate_offset, log_softmax, mix


@dataclass(frozen=True)
class Mixture:
    """Outputs of a MoFM for n samples: log gate weights (n, 2) and both experts' class log-probabilities (n, C)."""

    log_gate: Floats
    global_log_p: Floats
    local_log_p: Floats

    @property
    def log_p(self) -> Floats:
        """Class log-probabilities of the mixture (n, C)."""
        return mix(self.log_gate, self.global_log_p, self.local_log_p)


@dataclass(frozen=True)
class ExpertOutputs:
    """For n samples: pooled features (n, F) and both experts' logits (n, C). They do not depend on the held classes."""

    features: Floats
    global_logits: Floats
    local_logits: Floats

    def __getitem__(self, rows: NDArray[np.int64]) -> ExpertOutputs:
        return ExpertOutputs(self.features[rows], self.global_logits[rows], self.local_logits[rows])

    def mixture(self, context: TrainingContext, gate: Vector, biases: Biases) -> Mixture:
        """The mixture with the gate adapter (G,) for a device with these biases."""
        return Mixture(
            log_gate=context.gate.log_weights(gate, self.features, gate_offset(self.global_logits, biases)),
            global_log_p=log_softmax(self.global_logits + biases.kept),
            local_log_p=log_softmax(self.local_logits + biases.held),
        )


def global_temperature(context: TrainingContext, published: Globals) -> float:
    """The temperature of the global expert on the held-out split (ours).

    A head in closed form is overconfident, and the gate relies on the global expert's probabilities.
    """
    held_out = context.splits.held_out
    log_p = context.log_p(held_out, published.expert, np.zeros(context.classes, np.float32))
    return fit_temperature(log_p, labels_of(held_out))


def tempered(context: TrainingContext, expert: Vector, temperature: float) -> Vector:
    """The expert (P,) with its logits divided by the temperature."""
    theta = expert.copy()
    theta[: context.bundle.expert.size(0)] /= np.float32(temperature)
    return theta


def expert_outputs(
    context: TrainingContext, samples: Samples, published: Globals, temperature: float, theta: Vector, level: int
) -> ExpertOutputs:
    """Of the global expert at its temperature, and of the local expert `theta` at `level`."""
    no_bias = np.zeros(context.classes, np.float32)
    global_logits = context.log_p(samples, published.expert, no_bias) / np.float32(temperature)
    return ExpertOutputs(
        features=context.cache.pooled(samples, context.level_of(published.expert)),
        global_logits=global_logits,
        local_logits=log_softmax(context.logits(samples, published.expert, theta, level)),
    )


def compute_mixture(
    context: TrainingContext, samples: Samples, published: Globals, temperature: float, theta: Vector, level: int
) -> Mixture:
    """The mixture of the global expert at its temperature and the local expert `theta` at `level`."""
    outputs = expert_outputs(context, samples, published, temperature, theta, level)
    return outputs.mixture(context, published.gate, context.biases)


def dropped_class_log_p(context: TrainingContext, gate: Vector, outputs: ExpertOutputs, labels: Labels) -> Floats:
    """Class log-probabilities (n, C) of the mixture as if the device did not hold each sample's class (ours).

    So a device estimates its accuracy on novel classes from its own samples. Empty if it holds one class only.
    """
    log_p = np.empty_like(outputs.global_logits)
    done = 0
    for counts, rows in class_dropout(context.class_counts, labels):
        log_p[rows] = outputs[rows].mixture(context, gate, Biases.of_counts(counts)).log_p
        done += len(rows)
    return log_p[:done]
