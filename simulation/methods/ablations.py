"""FedFMSL without one of its parts, and FedIT with one of them (ours). The former are whole runs of the coordinator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_runtime.training.context import Samples, TrainingContext
from edge_runtime.training.stages import StageResult, sample_moments
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.algorithms.discriminant import discriminant_head
from fedfmsl.protocol.messages import Sums
from simulation.fleet import Fleet
from simulation.methods.base import RoundCost
from simulation.methods.fedfmsl import FedFMSL, Stage2
from simulation.methods.fedit import FedIT
from simulation.methods.server import State, sum_over, wire_bytes
from trainer_server.config import Head, Trigger


def without_sal() -> FedFMSL:
    return FedFMSL(Trigger.ALL_AT_ONCE, name="fedfmsl-all-at-once", title="FedFMSL, all blocks at once")


def with_fixed_schedule() -> FedFMSL:
    return FedFMSL(Trigger.FIXED_SCHEDULE, name="fedfmsl-fixed-schedule", title="FedFMSL, fixed schedule")


def with_feature_sums() -> FedFMSL:
    """Devices send class sums of all features before stage 1, and with second moments after it."""
    return FedFMSL(
        head=Head.CLASS_MEANS,
        sums=Sums.FEATURES,
        min_class_count=1,
        name="fedfmsl-feature-sums",
        title="FedFMSL, sums of features",
    )


def without_head_round() -> FedFMSL:
    return FedFMSL(sums=Sums.NONE, name="fedfmsl-no-sums", title="FedFMSL, no sums")


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


class FedITWithHead(FedIT):
    """FedIT. After the last round all devices send the sums that FedFMSL's head is computed from."""

    name = "fedit-head"
    title = "FedIT, head of FedFMSL"
    source = "ours"

    def round(self, fleet: Fleet, state: State, devices: Sequence[str], index: int) -> tuple[State, RoundCost]:
        state, cost = super().round(fleet, state, devices, index)
        if index + 1 < state.settings.rounds:
            return state, cost
        asked = state.settings.all_devices(fleet, index)
        total, sizes = sum_over(fleet, own_moments, [(name, state.shared) for name in asked])
        shared = state.shared.copy()
        head = discriminant_head(total["class_sums"], total["class_counts"], total["second_moments"])
        shared[: head.size] = head
        received = dict.fromkeys(asked, wire_bytes(fleet.bundle, state.shared))
        return replace(state, shared=shared), cost + RoundCost(sizes, received)


def own_moments(context: TrainingContext, theta: Vector) -> dict[str, Vector]:
    return sample_moments(context, theta, context.level_of(theta), Sums.FEATURES)


def _same_gate(_: str, result: StageResult) -> StageResult:
    """The result with no change of the gate adapter, if that is what the stage trains."""
    if result.delta is None or "held_out_mofm" not in result.metrics:
        return result
    return replace(result, delta=np.zeros_like(result.delta))
