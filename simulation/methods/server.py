"""What methods share on the server's side: the start, the weighted mean, the bytes on the wire, and the state.

Every method starts from the same trainables: the bundle's initial LoRA at the settings' level and the head of the
federated class means (FedNCM), as stage 1 of FedFMSL does. All blocks of the level are active from the first round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.training.stages import train_class_sums
from fedfmsl.algorithms.aggregation import Contribution, WeightedMean
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.class_means import class_mean_head
from fedfmsl.algorithms.server_optimizers import FedAvg, Moments
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Globals
from fedfmsl.protocol.tensors import pack
from simulation.fleet import Fleet
from simulation.methods.base import MethodSettings, RoundCost
from simulation.methods.local_training import Choose, everything


@dataclass(frozen=True)
class State:
    """The state of most methods. `shared` (P,): what the server has published last, before the first round the start.
    `personal`: by device, the trainables (P,) that it keeps from round to round."""

    settings: MethodSettings
    shared: Vector
    personal: Mapping[str, Vector] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What a device computes: trainables (P,) and the number of its training samples."""

    theta: Vector
    samples: int


def start_theta(fleet: Fleet, settings: MethodSettings) -> tuple[Vector, RoundCost]:
    """The trainables (P,) that all devices start from, and the cost of sending the class sums."""
    level = settings.level
    sums = fleet.map(train_class_sums, dict.fromkeys(fleet.names, level))
    total = {
        key: _sum([sums[name][key] for name in sorted(sums)]) for key in ("class_sums", "class_counts", "norm_sum")
    }
    head = class_mean_head(total["class_sums"], total["class_counts"], float(total["norm_sum"][0]))
    theta = fleet.bundle.initial()[0][: fleet.bundle.expert.size(level)]
    theta[: head.size] = head
    header = Globals(run="simulation", kind="statistics")
    return theta, RoundCost(bytes_up={name: len(pack(header, tensors)) for name, tensors in sums.items()})


def _sum(arrays: Sequence[Vector]) -> Vector:
    return np.asarray(np.sum(arrays, axis=0, dtype=np.float64), np.float32)


def average(bundle: Bundle, shared: Vector, results: Mapping[str, Trained]) -> Vector:
    """FedAvg (McMahan et al., AISTATS 2017): `shared` (P,) plus the mean update of the devices, weighted by their
    samples. Values that no device changed stay."""
    parts = {name: part for name, part in bundle.expert.parts.items() if part.stop <= shared.size}
    contributions = [Contribution.of(results[name].theta - shared, results[name].samples) for name in sorted(results)]
    combined = WeightedMean().aggregate(contributions, parts)
    return FedAvg().step(shared, combined, Moments.zeros(shared.size))[0]


def wire_bytes(bundle: Bundle, theta: Vector, sent: Choose = everything) -> int:
    """The length of a message with the chosen tensors of `theta` (P,), in fp32."""
    tensors = bundle.expert.split(theta)
    chosen = {slot.name: tensors[slot.name] for slot in bundle.expert.slots if slot.name in tensors and sent(slot)}
    return len(pack(Globals(run="simulation", kind="expert"), chosen))


def exchange(bundle: Bundle, theta: Vector, devices: Sequence[str], sent: Choose = everything) -> RoundCost:
    """The cost of a round in which each device receives and sends the chosen tensors once."""
    each = dict.fromkeys(devices, wire_bytes(bundle, theta, sent))
    return RoundCost(each, each)
