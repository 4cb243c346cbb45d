"""Devices that later rounds leave out (ours): those whose updates are refused, for which a round does not wait either,
and those that are online but do not answer in a secure sum. Such a sum waits for them until its deadline, and may have
to be repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

LEFT_OUT_AFTER = 3  # rounds in a row with a refused update
LEFT_OUT_ROUNDS = 10
LEFT_OUT_SUMS = 10  # secure sums that leave out a device that did not answer in one


class Refused(NamedTuple):
    """A device of which no update was accepted since one was refused. `times`: rounds with a refused update, one after
    the other. `round`: the latest of them."""

    times: int
    round: int

    @property
    def until(self) -> int:
        """The last round that leaves the device out; 0 if none does."""
        return self.round + LEFT_OUT_ROUNDS if self.times >= LEFT_OUT_AFTER else 0


def refuse(before: Refused | None, round_: int) -> Refused:
    """After an update of round `round_` was refused. Several in one round count once."""
    if before is not None and before.round == round_:
        return before
    return Refused((before.times if before else 0) + 1, round_)


def is_left_out(refused: Refused | None, round_: int) -> bool:
    return refused is not None and refused.round < round_ <= refused.until


def left_out_of_sums(silent: Mapping[str, int], round_: int) -> dict[str, int]:
    """The devices that secure sums which start in round `round_` leave out, each with the last such round. `silent`:
    those that did not answer in a sum."""
    return {name: until for name, until in silent.items() if round_ <= until}
