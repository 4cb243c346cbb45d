"""FedFMSL without one of its parts (ours).

Each is a whole run of the coordinator. Without gate, no device changes the gate adapter, so that the gate keeps the
weights of Bayes' rule, in training too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_runtime.training.stages import StageResult
from simulation.methods.fedfmsl import FedFMSL
from trainer_server.config import Head, Trigger


def without_sal() -> FedFMSL:
    return FedFMSL(Trigger.ALL_AT_ONCE, name="fedfmsl-all-at-once", title="FedFMSL, all blocks at once")


def with_fixed_schedule() -> FedFMSL:
    return FedFMSL(Trigger.FIXED_SCHEDULE, name="fedfmsl-fixed-schedule", title="FedFMSL, fixed schedule")


def without_class_means() -> FedFMSL:
    return FedFMSL(head=Head.ZEROS, name="fedfmsl-zero-head", title="FedFMSL, head of zeros")


def without_gate() -> FedFMSL:
    return FedFMSL(tamper=_same_gate, name="fedfmsl-no-gate", title="FedFMSL, Bayes' rule without gate adapter")


def _same_gate(_: str, result: StageResult) -> StageResult:
    """The result with no change of the gate adapter, if that is what the stage trains."""
    if result.delta is None or "held_out_mofm" not in result.metrics:
        return result
    return replace(result, delta=np.zeros_like(result.delta))
