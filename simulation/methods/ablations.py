"""FedFMSL without one of its parts (ours). Each is a whole run of the coordinator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edge_runtime.training.context import Samples, TrainingContext
from edge_runtime.training.stages import StageResult
from fedfmsl.algorithms.arrays import Floats
from simulation.methods.fedfmsl import FedFMSL, Stage2
from trainer_server.config import Head, Trigger


def without_sal() -> FedFMSL:
    return FedFMSL(Trigger.ALL_AT_ONCE, name="fedfmsl-all-at-once", title="FedFMSL, all blocks at once")


def with_fixed_schedule() -> FedFMSL:
    return FedFMSL(Trigger.FIXED_SCHEDULE, name="fedfmsl-fixed-schedule", title="FedFMSL, fixed schedule")


def without_class_means() -> FedFMSL:
    return FedFMSL(head=Head.ZEROS, name="fedfmsl-zero-head", title="FedFMSL, head of zeros")


def with_untrained_gate() -> FedFMSL:
    """No device changes the gate adapter, which starts from Bayes' rule."""
    return FedFMSL(tamper=_same_gate, name="fedfmsl-untrained-gate", title="FedFMSL, untrained gate")


def without_gate() -> FedFMSL:
    return HalfWeights(name="fedfmsl-no-gate", title="FedFMSL, weights of ½")


@dataclass(frozen=True)
class HalfWeights(FedFMSL):
    """Predicts with equal weights of both experts. Training is that of FedFMSL."""

    def log_p(self, context: TrainingContext, model: Stage2, samples: Samples) -> dict[str, Floats]:
        models = super().log_p(context, model, samples)
        both = np.logaddexp(models["global"], models["local-expert"]) - np.log(2)
        return {self.name: np.asarray(both, np.float32)}


def _same_gate(_: str, result: StageResult) -> StageResult:
    """The result with no change of the gate adapter, if that is what the stage trains."""
    if result.delta is None or "held_out_mofm" not in result.metrics:
        return result
    return replace(result, delta=np.zeros_like(result.delta))
