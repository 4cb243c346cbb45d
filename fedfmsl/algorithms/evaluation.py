"""What a device's model is measured on: own, fleet and novel test samples, and streams of both (ours).

- *own*: accuracy on the device's own test samples.
- *fleet*: accuracy on the test samples of all devices.
- *novel*: accuracy on those test samples of the fleet whose class the device does not hold, but another device does.
- *stream* at a share ρ: accuracy on a stream of samples, ρ of them novel and the others own. For a model that does not
  change along the stream it is (1-ρ) · own + ρ · novel.
- *harmonic*: harmonic mean of own and novel. It is high only if both are.
- *worst decile*: mean own accuracy over the worst 10 % of devices.

Accuracies are shares in 0 … 1. An accuracy over no samples is None. n is the number of test samples of all devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedfmsl.algorithms.arrays import Bools, Doubles, Floats, Labels
from fedfmsl.algorithms.checks import check_number
from fedfmsl.algorithms.label_shift import adapt_in_order

SHARES = (0.0, 0.1, 0.5)  # of novel samples in the measured streams
STREAM_SEED = 0  # of the order of samples in a stream
DECILE = 0.1


@dataclass(frozen=True)
class DeviceAccuracy:
    """One model of one device.

    `stream`: accuracy by share of novel samples. A share is missing if the device lacks the samples for it: a device
    that holds every class has no stream beyond share 0.
    """

    own: float | None
    own_count: int
    fleet: float | None
    fleet_count: int
    novel: float | None
    novel_count: int
    stream: Mapping[float, float]


@dataclass(frozen=True)
class FleetAccuracy:
    """One model over all devices.

    `own`, `fleet` and `novel` are means over devices, weighted by the device's samples of that kind; `stream` is
    weighted by own samples, over the devices that have the stream. `harmonic` is of the weighted own and novel.
    """

    own: float | None
    fleet: float | None
    novel: float | None
    stream: Mapping[float, float]
    harmonic: float | None
    worst_decile: float | None


def novel_samples(labels: Labels, held: Bools, held_by_fleet: Bools) -> Bools:
    """Which samples (n,) are novel to a device that holds the classes `held` (C,).

    `held_by_fleet` (C,): the classes that any device holds. A sample of a class that nobody holds is not novel: no
    model can know it.
    """
    return np.asarray((held_by_fleet & ~held)[labels])


def device_accuracy(
    predicted: Labels, labels: Labels, is_own: Bools, is_novel: Bools, shares: Sequence[float] = SHARES
) -> DeviceAccuracy:
    """Accuracies of a model that predicts `predicted` (n,) for the fleet's test samples of classes `labels` (n,).

    `is_own`, `is_novel` (n,): which samples are the device's own, and which are novel to it. The model does not change
    along a stream. For one that does, replace `stream` by values of `stream_accuracy`.

    Raises ValueError if the shapes differ, or a share is not in 0 … 1.
    """
    if not predicted.shape == labels.shape == is_own.shape == is_novel.shape or labels.ndim != 1:
        shapes = predicted.shape, labels.shape, is_own.shape, is_novel.shape
        raise ValueError(f"predicted, labels, is_own and is_novel have shapes {shapes}; all must be (n,)")
    correct = predicted == labels
    own, novel = _mean(correct[is_own]), _mean(correct[is_novel])
    streams = {share: _at_share(own, novel, share) for share in shares}
    return DeviceAccuracy(
        own=own,
        own_count=int(is_own.sum()),
        fleet=_mean(correct),
        fleet_count=len(labels),
        novel=novel,
        novel_count=int(is_novel.sum()),
        stream={share: value for share, value in streams.items() if value is not None},
    )


def stream_order(is_own: Bools, is_novel: Bools, share: float, rng: np.random.Generator) -> Labels:
    """Indices (m,) of a stream of samples in random order, `share` of them novel, for a model that adapts along it.

    No sample occurs twice, and the stream is as long as the samples allow: it has all own or all novel samples. Novel
    samples that are the device's own count as own. The share is exact up to half a sample.

    Raises ValueError if the share is not in 0 … 1.
    """
    check_number("share", share, at_least=0, at_most=1)
    own = rng.permutation(np.flatnonzero(is_own))
    novel = rng.permutation(np.flatnonzero(is_novel & ~is_own))
    length = min(len(own) / (1 - share) if share < 1 else math.inf, len(novel) / share if share > 0 else math.inf)
    chosen = own[: round((1 - share) * length)], novel[: round(share * length)]
    return np.asarray(rng.permutation(np.concatenate(chosen)), np.int64)


def stream_accuracy(correct: Bools, is_own: Bools, share: float) -> float | None:
    """Accuracy along a stream of m samples: `correct` (m,) is in the order of `stream_order`, `is_own` (m,) too.

    It is (1-ρ) times the accuracy on the own samples plus ρ times that on the others, with ρ = `share`: a short stream
    has not exactly that share. None if samples of one kind are required and missing.

    Raises ValueError if the share is not in 0 … 1.
    """
    return _at_share(_mean(correct[is_own]), _mean(correct[~is_own]), share)


def adapting_streams(
    log_p: Floats,
    labels: Labels,
    is_own: Bools,
    is_novel: Bools,
    prior: Floats,
    held: Bools,
    seed: int = STREAM_SEED,
    shares: Sequence[float] = SHARES,
) -> dict[float, float]:
    """By share: accuracy along a seeded stream of a model that adapts its class prior to the samples so far.

    `log_p` (n, C): class log-probabilities of the fleet's test samples under the class prior `prior` (C,) of a device
    that holds the classes `held` (C,). See `fedfmsl.algorithms.label_shift`.
    """
    accuracies = {}
    for share in shares:
        order = stream_order(is_own, is_novel, share, np.random.default_rng(seed))
        correct = adapt_in_order(log_p[order], prior, held).argmax(axis=1) == labels[order]
        accuracy = stream_accuracy(correct, is_own[order], share)
        if accuracy is not None:
            accuracies[share] = accuracy
    return accuracies


def harmonic_mean(own: float | None, novel: float | None) -> float | None:
    """2 · own · novel / (own + novel); 0 if both are 0, None if one is None."""
    if own is None or novel is None:
        return None
    return 2 * own * novel / (own + novel) if own + novel else 0.0


def worst_decile(own: Iterable[float]) -> float | None:
    """Mean of the lowest 10 % of the devices' own accuracies, rounded up to whole devices. None without devices."""
    ranked = sorted(own)
    return _mean(np.array(ranked[: math.ceil(DECILE * len(ranked))]))


def summarize(devices: Sequence[DeviceAccuracy]) -> FleetAccuracy:
    """One model over all devices, which may be empty."""
    own = _weighted((device.own, device.own_count) for device in devices)
    novel = _weighted((device.novel, device.novel_count) for device in devices)
    shares = sorted({share for device in devices for share in device.stream})
    streams = {share: _weighted((each.stream.get(share), each.own_count) for each in devices) for share in shares}
    return FleetAccuracy(
        own=own,
        fleet=_weighted((device.fleet, device.fleet_count) for device in devices),
        novel=novel,
        stream={share: value for share, value in streams.items() if value is not None},
        harmonic=harmonic_mean(own, novel),
        worst_decile=worst_decile(device.own for device in devices if device.own is not None),
    )


def _mean(values: Bools | Doubles) -> float | None:
    return float(values.mean()) if len(values) else None


def _at_share(own: float | None, novel: float | None, share: float) -> float | None:
    """(1-ρ) · own + ρ · novel. None if a value with a positive weight is None."""
    check_number("share", share, at_least=0, at_most=1)
    total = 0.0
    for value, weight in ((own, 1 - share), (novel, share)):
        if weight > 0:
            if value is None:
                return None
            total += weight * value
    return total


def _weighted(parts: Iterable[tuple[float | None, int]]) -> float | None:
    """Mean of the known values, weighted. None if there is none."""
    known = [(value, weight) for value, weight in parts if value is not None and weight]
    if not known:
        return None
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known)
