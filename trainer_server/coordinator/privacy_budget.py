"""The privacy budget that a run has used. `status`, the metrics and the console show the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedfmsl.algorithms.accounting import epsilons
from fedfmsl.protocol.messages import NOISED, Round, Stage
from trainer_server.config import RunConfig


@dataclass
class NoisedRounds:
    """Closed rounds with noise: `sent` counts all of them, `released` those whose sum was used."""

    sent: int = 0
    released: int = 0

    @classmethod
    def of(cls, closed: Mapping[tuple[Stage, bool], int]) -> NoisedRounds:
        """Of the numbers of closed rounds by stage and whether they were repeated."""
        rounds = cls()
        for (stage, repeated), count in closed.items():
            rounds.add(stage, repeated, count)
        return rounds

    def add(self, stage: Stage, repeated: bool, count: int = 1) -> None:
        if stage in NOISED:
            self.sent += count
            self.released += 0 if repeated else count


def privacy_budget(
    config: RunConfig, closed: NoisedRounds, announced: Round | None, is_answered: bool
) -> dict[str, float]:
    """ε by observer, of a device that has answered all rounds; none without differential privacy.

    The open round `announced` counts once it `is_answered` by a device.
    """
    if config.privacy is None:
        return {}
    updates = closed.sent + (announced is not None and announced.stage in NOISED and is_answered)
    found = epsilons(config.privacy, closed.released, config.delta, secure=config.secure, updates=updates)
    return {observer.value: value for observer, value in found.items()}
