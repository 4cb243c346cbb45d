"""FedFMSL Edge's public API: the algorithms over numpy arrays, and bundles.

A name's module is imported at first use, so that commands which need none of them start quickly. Algorithms need numpy
only; bundles, tasks and `Training` also need pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from fedfmsl.algorithms.accounting import Observer, epsilon, epsilons
    from fedfmsl.algorithms.aggregation import (
        Aggregate,
        Contribution,
        CoordinateMedian,
        ScreenedMean,
        TrimmedMean,
        WeightedMean,
    )
    from fedfmsl.algorithms.calibration import calibrate, fit_temperature, unknown_threshold
    from fedfmsl.algorithms.class_means import class_mean_head, direction_head
    from fedfmsl.algorithms.discriminant import discriminant_head, logit_head, second_moments, with_former_rows
    from fedfmsl.algorithms.evaluation import (
        DeviceAccuracy,
        FleetAccuracy,
        device_accuracy,
        novel_samples,
        stream_accuracy,
        stream_order,
        summarize,
    )
    from fedfmsl.algorithms.label_shift import adapted_prior, prior_shift
    from fedfmsl.algorithms.mixture import (
        Biases,
        accuracy,
        class_dropout,
        class_mask,
        class_prior,
        gate_offset,
        gate_statistics,
        label_log_p,
        log_softmax,
        mix,
        nll,
    )
    from fedfmsl.algorithms.privacy import Privacy, privatize, privatize_statistics
    from fedfmsl.algorithms.sal import AllAtOnce, CapabilityQueue, FixedSchedule, Sal, SalState
    from fedfmsl.algorithms.server_optimizers import FedAdam, FedAvg, FedAvgM, Moments
    from fedfmsl.errors import (
        BrokerError,
        BundleError,
        ConfigError,
        FedFMSLError,
        InputError,
        MessageError,
        RunError,
        WeightsError,
    )
    from fedfmsl.protocol.bundle import Bundle
    from fedfmsl.protocol.class_names import UNKNOWN
    from fedfmsl.protocol.messages import Training
    from fedfmsl.protocol.task import Task
    from fedfmsl.protocol.task_bundle import TaskBundle

__all__ = [
    "UNKNOWN",
    "Aggregate",
    "AllAtOnce",
    "Biases",
    "BrokerError",
    "Bundle",
    "BundleError",
    "CapabilityQueue",
    "ConfigError",
    "Contribution",
    "CoordinateMedian",
    "DeviceAccuracy",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedFMSLError",
    "FixedSchedule",
    "FleetAccuracy",
    "InputError",
    "MessageError",
    "Moments",
    "Observer",
    "Privacy",
    "RunError",
    "Sal",
    "SalState",
    "ScreenedMean",
    "Task",
    "TaskBundle",
    "Training",
    "TrimmedMean",
    "WeightedMean",
    "WeightsError",
    "accuracy",
    "adapted_prior",
    "calibrate",
    "class_dropout",
    "class_mask",
    "class_mean_head",
    "class_prior",
    "device_accuracy",
    "direction_head",
    "discriminant_head",
    "epsilon",
    "epsilons",
    "fit_temperature",
    "gate_offset",
    "gate_statistics",
    "label_log_p",
    "log_softmax",
    "logit_head",
    "mix",
    "nll",
    "novel_samples",
    "prior_shift",
    "privatize",
    "privatize_statistics",
    "second_moments",
    "stream_accuracy",
    "stream_order",
    "summarize",
    "unknown_threshold",
    "with_former_rows",
]

_MODULES = {
    "fedfmsl.algorithms.accounting": (
        "Observer",
        "epsilon",
        "epsilons",
    ),
    "fedfmsl.algorithms.aggregation": (
        "Aggregate",
        "Contribution",
        "CoordinateMedian",
        "ScreenedMean",
        "TrimmedMean",
        "WeightedMean",
    ),
    "fedfmsl.algorithms.calibration": (
        "calibrate",
        "fit_temperature",
        "unknown_threshold",
    ),
    "fedfmsl.algorithms.class_means": (
        "class_mean_head",
        "direction_head",
    ),
    "fedfmsl.algorithms.discriminant": (
        "discriminant_head",
        "logit_head",
        "second_moments",
        "with_former_rows",
    ),
    "fedfmsl.algorithms.evaluation": (
        "DeviceAccuracy",
        "FleetAccuracy",
        "device_accuracy",
        "novel_samples",
        "stream_accuracy",
        "stream_order",
        "summarize",
    ),
    "fedfmsl.algorithms.label_shift": (
        "adapted_prior",
        "prior_shift",
    ),
    "fedfmsl.algorithms.mixture": (
        "Biases",
        "accuracy",
        "class_dropout",
        "class_mask",
        "class_prior",
        "gate_offset",
        "gate_statistics",
        "label_log_p",
        "log_softmax",
        "mix",
        "nll",
    ),
    "fedfmsl.algorithms.privacy": (
        "Privacy",
        "privatize",
        "privatize_statistics",
    ),
    "fedfmsl.algorithms.sal": (
        "AllAtOnce",
        "CapabilityQueue",
        "FixedSchedule",
        "Sal",
        "SalState",
    ),
    "fedfmsl.algorithms.server_optimizers": (
        "FedAdam",
        "FedAvg",
        "FedAvgM",
        "Moments",
    ),
    "fedfmsl.errors": (
        "BrokerError",
        "BundleError",
        "ConfigError",
        "FedFMSLError",
        "InputError",
        "MessageError",
        "RunError",
        "WeightsError",
    ),
    "fedfmsl.protocol.bundle": ("Bundle",),
    "fedfmsl.protocol.class_names": ("UNKNOWN",),
    "fedfmsl.protocol.messages": ("Training",),
    "fedfmsl.protocol.task": ("Task",),
    "fedfmsl.protocol.task_bundle": ("TaskBundle",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("fedfmsl-edge")
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
