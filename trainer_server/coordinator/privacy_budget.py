"""The privacy budget that a run has used, with that of the runs that it goes on from. `status`, the metrics and the
console show the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedfmsl.algorithms.accounting import Observer, gaussian_epsilon, mu_squared_sums
from fedfmsl.protocol.messages import NOISED, Round, Stage
from trainer_server.config import RunConfig


@dataclass
class NoisedRounds:
    """Closed rounds with noise: `sent` counts all of them, `released` those whose sum was used. `before`: the sums of
    μ² of the runs that this one goes on from, by observer."""

    sent: int = 0
    released: int = 0
    before: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, closed: Mapping[tuple[Stage, bool], int], before: Mapping[str, float]) -> NoisedRounds:
        """Of the numbers of closed rounds by stage and whether they were repeated."""
        rounds = cls(before=before)
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
    spent = spent_mu_squared(config, closed, announced, is_answered)
    return {observer: gaussian_epsilon(total, config.delta) for observer, total in spent.items()}


def spent_mu_squared(
    config: RunConfig, closed: NoisedRounds, announced: Round | None, is_answered: bool
) -> dict[str, float]:
    """The sums of μ² by observer, from which ε follows. Without differential privacy only those of earlier runs."""
    spent = {observer.value: closed.before.get(observer.value, 0.0) for observer in Observer}
    if config.privacy is None:
        return spent
    updates = closed.sent + (announced is not None and announced.stage in NOISED and is_answered)
    own = mu_squared_sums(config.privacy, closed.released, secure=config.secure, updates=updates)
    return {observer.value: spent[observer.value] + total for observer, total in own.items()}
