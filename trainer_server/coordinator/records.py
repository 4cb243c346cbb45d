"""Records of closed rounds. Tables, figures and reports are made from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fedfmsl.algorithms.bounds import capped_weights
from fedfmsl.protocol.messages import Message, Round, Stage, Update

NAMES = 10  # of devices in a line of text


class ClosedRound(Message):
    """The record of one closed round.

    `seconds`: how long the round was open. `updates` and `bytes_up` (bytes on the wire) are by device. `missing`: the
    stragglers. `repeated`: the reason, if the round failed and was repeated. `rejected`: why the global expert that the
    devices measured in this round was rejected.
    """

    round: Round
    seconds: float
    updates: dict[str, Update]
    bytes_up: dict[str, int]
    missing: tuple[str, ...]
    repeated: str = ""
    rejected: str = ""

    @property
    def held_out(self) -> dict[str, float]:
        """Mean held-out accuracy of the devices by model, weighted by samples."""
        metrics = sorted({name for update in self.updates.values() for name in update.metrics})
        means = {_model(name): self.mean(name) for name in metrics if name.startswith("held_out_")}
        return {name: value for name, value in means.items() if value is not None}

    def mean(self, metric: str) -> float | None:
        """Mean over the devices that report the metric, weighted by samples. A weight is capped relative to the median
        one, so that a device that claims many samples does not decide the mean."""
        reporting = [update for update in self.updates.values() if metric in update.metrics]
        weights = capped_weights([update.samples for update in reporting])
        values = [update.metrics[metric] * weight for update, weight in zip(reporting, weights, strict=True)]
        return sum(values) / sum(weights) if any(weights) else None


class RoundSummary(Message):
    """A closed round without the values of single devices.

    `means`: by metric, the mean over the devices, of metrics that at least half of the updates have. `bytes_up` and
    `bytes_down`: on the wire, of all devices. `answered` and `missing`: numbers of devices.
    """

    round: int
    stage: Stage
    ordinal: tuple[int, int]
    level: int
    seconds: float
    answered: int
    missing: int
    bytes_up: int
    bytes_down: int
    means: dict[str, float]
    repeated: str = ""
    rejected: str = ""

    @classmethod
    def of_record(cls, closed: ClosedRound) -> RoundSummary:
        announced, updates = closed.round, closed.updates.values()
        reporting = Counter(name for update in updates for name in update.metrics)
        names = sorted(name for name, count in reporting.items() if 2 * count >= len(closed.updates))
        means = {name: closed.mean(name) for name in names}
        return cls(
            round=announced.round,
            stage=announced.stage,
            ordinal=announced.ordinal,
            level=announced.level,
            seconds=closed.seconds,
            answered=len(closed.updates),
            missing=len(closed.missing),
            bytes_up=sum(closed.bytes_up.values()),
            bytes_down=sum(update.bytes_down for update in updates),
            means={name: mean for name, mean in means.items() if mean is not None},
            repeated=closed.repeated,
            rejected=closed.rejected,
        )


def held_out_accuracies(update: Update) -> dict[str, float]:
    """One device's held-out accuracies by model."""
    return {_model(name): value for name, value in update.metrics.items() if name.startswith("held_out_")}


def successful_rounds(rounds: Sequence[ClosedRound], stage: Stage) -> list[ClosedRound]:
    """The stage's rounds in order, without those that were repeated."""
    by_index = {r.round.index: r for r in rounds if r.round.stage is stage and not r.repeated}
    return [by_index[index] for index in sorted(by_index)]


def listed(names: Sequence[str]) -> str:
    """Names for a line of text; of many only some."""
    more = len(names) - NAMES
    return ", ".join(names[:NAMES]) + (f" and {more} more" if more > 0 else "")


def number_of(count: int, noun: str) -> str:
    """Like 1 device, 2 devices."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def rare_devices(counts: Mapping[str, int], rounds: int, known: Iterable[str], fraction: float) -> dict[str, int]:
    """The number of training rounds that a device took part in, for each one that did so in less than half of those
    that it should be in: a `fraction` of the `rounds`. `counts`: by device. `known`: devices that have announced
    themselves."""
    names = sorted({*known, *counts})
    return {name: counts.get(name, 0) for name in names if 2 * counts.get(name, 0) < fraction * rounds}


def _model(metric: str) -> str:
    """The model of a held-out metric. The metric of the local expert is held_out_local."""
    name = metric.removeprefix("held_out_")
    return "local_expert" if name == "local" else name
