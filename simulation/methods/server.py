"""What methods share on the server's side: the start, the weighted mean, the bytes on the wire, and the state.

Every method starts from the same trainables: the bundle's initial LoRA at the settings' level and the head of the
federated class means (FedNCM), as stage 1 of FedFMSL does. All blocks of the level are active from the first round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TypeVar

import numpy as np

from edge_runtime.training.context import TrainingContext
from edge_runtime.training.stages import train_class_sums
from fedfmsl.algorithms.aggregation import Contribution, WeightedMean
from fedfmsl.algorithms.arrays import Doubles, Vector
from fedfmsl.algorithms.class_means import class_mean_head
from fedfmsl.algorithms.server_optimizers import FedAvg, Moments
from fedfmsl.protocol.messages import Globals
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack
from simulation.fleet import Fleet
from simulation.methods.base import MethodSettings, RoundCost
from simulation.methods.local_training import Choose, everything
from simulation.spill import StoredArrays

T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """The state of most methods. `shared` (P,): what the server has published last, before the first round the start.
    `personal`: by device, the trainables (P,) that it keeps from round to round."""

    settings: MethodSettings
    shared: Vector
    personal: StoredArrays = field(default_factory=StoredArrays)


@dataclass(frozen=True)
class Trained:
    """What a device computes: trainables (P,) and the number of its training samples."""

    theta: Vector
    samples: int


def start_theta(fleet: Fleet, settings: MethodSettings) -> tuple[Vector, RoundCost]:
    """The trainables (P,) that all devices start from, and the cost of sending the class sums."""
    level = settings.level
    asked = [(name, level) for name in settings.all_devices(fleet, 0)]
    total, sizes = sum_over(fleet, train_class_sums, asked)
    head = class_mean_head(total["class_sums"], total["class_counts"], float(total["norm_sum"][0]))
    theta = fleet.bundle.initial()[0][: fleet.bundle.expert.size(level)]
    theta[: head.size] = head
    return theta, RoundCost(bytes_up=sizes)


def sum_over(
    fleet: Fleet, function: Callable[[TrainingContext, T], Mapping[str, Vector]], tasks: Iterable[tuple[str, T]]
) -> tuple[dict[str, Vector], dict[str, int]]:
    """The sums over devices of the tensors that each computes, and the bytes that each sends."""
    total: dict[str, Doubles] = {}
    sizes: dict[str, int] = {}
    for name, tensors in fleet.each(function, sorted(tasks, key=itemgetter(0))):
        for key, values in tensors.items():
            total[key] = total.get(key, 0.0) + values.astype(np.float64)
        sizes[name] = len(pack(Globals(run="simulation", kind="statistics"), tensors))
    return {key: values.astype(np.float32) for key, values in total.items()}, sizes


def average(bundle: TaskBundle, shared: Vector, results: Mapping[str, Trained]) -> Vector:
    """FedAvg (McMahan et al., AISTATS 2017): `shared` (P,) plus the mean update of the devices, weighted by their
    samples. Values that no device changed stay."""
    parts = {name: part for name, part in bundle.expert.parts.items() if part.stop <= shared.size}
    contributions = [Contribution.of(results[name].theta - shared, results[name].samples) for name in sorted(results)]
    combined = WeightedMean().aggregate(contributions, parts)
    return FedAvg().step(shared, combined, Moments.zeros(shared.size))[0]


def wire_bytes(bundle: TaskBundle, theta: Vector, sent: Choose = everything) -> int:
    """The length of a message with the chosen tensors of `theta` (P,), in fp32."""
    tensors = bundle.expert.split(theta)
    chosen = {slot.name: tensors[slot.name] for slot in bundle.expert.slots if slot.name in tensors and sent(slot)}
    return len(pack(Globals(run="simulation", kind="expert"), chosen))


def exchange(bundle: TaskBundle, theta: Vector, devices: Sequence[str], sent: Choose = everything) -> RoundCost:
    """The cost of a round in which each device receives and sends the chosen tensors once."""
    each = dict.fromkeys(devices, wire_bytes(bundle, theta, sent))
    return RoundCost(each, each)
