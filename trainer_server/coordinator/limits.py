"""The settings that may change while a run lasts, and the deadlines of rounds that follow from them (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fedfmsl.algorithms.secure_aggregation import MIN_DEVICES
from fedfmsl.common.hours import Hours
from fedfmsl.common.settings import flag_of
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import Message, Round, Stage
from trainer_server.config import RunConfig, RunRules

MAX_STRETCH = 16  # how many times as long a round lasts at most
UNMERGED = (Stage.BASELINE, Stage.EVALUATE)  # rounds that no later round waits for
UNMERGED_FACTOR = 3.0  # their deadline, relative to the slowest update of earlier rounds with such work
ROUNDING = 1e-9  # tolerance for products like 0.07 · 100, which is above 7 in floating point


class Limits(Message):
    """When rounds open and close. Each field is the setting of this name; `min_updates` has its default's value.

    They are part of the state and change by an event, so that a replay closes every round as the server did.
    """

    round_timeout: float
    min_updates: int
    max_repeats: int | None
    enough: float
    schedule: tuple[Hours, ...] = ()
    every: str | None = None
    min_new: int = 1

    @classmethod
    def of(cls, config: RunConfig) -> Limits:
        return cls(
            round_timeout=config.round_timeout,
            min_updates=least_updates(config),
            max_repeats=config.max_repeats,
            enough=config.enough,
            schedule=config.schedule,
            every=config.every,
            min_new=config.min_new,
        )

    def differences(self, other: Limits) -> Iterator[str]:
        """A text for each field in which `other` differs."""
        for name, value in other:
            if value != getattr(self, name):
                now, before = (_shown(each) for each in (value, getattr(self, name)))
                yield f"{flag_of(name)} is {now} from now on, it was {before}"


def _shown(value: Any) -> Any:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "always"
    return "unlimited" if value is None else value


def devices_in_share(share: float, count: int) -> int:
    """The number of devices that are a share of `count`: rounded up, so at least one of any."""
    return math.ceil(share * count - ROUNDING)


def least_updates(config: RunRules) -> int:
    """`--min-updates`; by default half of the updates that a round waits for. With `--secure` a sum needs three."""
    least = config.min_updates
    if least is None:
        least = max(devices_in_share(config.fraction * config.enough / 2, config.devices), 1)
    return max(least, MIN_DEVICES) if config.secure else least


def check_change(config: RunConfig, changed: Limits) -> None:
    """Raises ConfigError if a run with this configuration cannot have these limits."""
    if changed.min_updates > config.devices:
        raise ConfigError(
            f"--min-updates {changed.min_updates} is more than --devices {config.devices}: no round could close; "
            "lower it"
        )
    if not config.standing and (changed.every is not None or changed.min_new > 1):
        option = f"--min-new {changed.min_new}" if changed.every is None else f"--every {changed.every}"
        raise ConfigError(
            f"{option}: the run does not begin again, because it was started without --schedule and --every; start a "
            "new run with one of them and --from"
        )
    if config.secure and changed.min_updates < MIN_DEVICES:
        raise ConfigError(
            f"--min-updates {changed.min_updates}: with --secure a sum needs at least {MIN_DEVICES} devices"
        )
    least = least_updates(config.model_copy(update={"min_updates": changed.min_updates}))
    if config.privacy is not None and least != config.privacy.shares:
        raise ConfigError(
            f"--min-updates {changed.min_updates}: with --dp-noise it stays {config.privacy.shares}, because every "
            "device adds a share of the noise"
        )


def round_seconds(limits: Limits, announced: Round, stretch: int, slowest: Mapping[Stage, float]) -> float:
    """The seconds from a round's announcement to its deadline.

    `stretch`: how many times as long it lasts, because devices were still at work. `slowest`: by stage, the longest
    time from an announcement to an update, in seconds. The baseline trains like stage 1, `repetitions` times as long.
    An evaluation computes features, as the first round does.
    """
    seconds = limits.round_timeout
    if announced.stage in UNMERGED:
        alike = [slowest.get(Stage.GLOBAL, 0.0)] if announced.stage is Stage.BASELINE else [*slowest.values()]
        seconds = max(seconds, UNMERGED_FACTOR * announced.repetitions * max(alike, default=0.0))
    return stretch * seconds
