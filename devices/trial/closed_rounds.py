"""The closed rounds of a running trial, one line each. The console shows everything else."""

from __future__ import annotations

from pathlib import Path

from devices.trial.charts import NAMES
from fedfmsl.common.cli import console
from fedfmsl.errors import RunError
from trainer_server.console.views import step
from trainer_server.coordinator.records import ClosedRound
from trainer_server.storage.run_store import RunStore


class ClosedRounds:
    """`print_new` prints the rounds that have closed since its last call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = 0  # the newest round that is printed

    def print_new(self) -> None:
        try:
            store = RunStore(self._folder)
        except RunError:  # the server has not created the run yet
            return
        try:
            for closed in store.rounds.all(after=self._last):
                self._last = closed.round.round
                console.print(summary(closed), markup=False, highlight=False, soft_wrap=True)
        finally:
            store.close()


def summary(closed: ClosedRound) -> str:
    """A closed round as one line."""
    round_, held = closed.round, closed.held_out
    parts = [f"round {round_.round}: {step(round_)}", f"level {round_.level}"]
    parts += [f"{len(closed.updates)} updates in {closed.seconds:.1f} s"]
    parts += [f"held-out {NAMES[model]} {held[model]:.3f}" for model in NAMES if model in held]
    parts += [f"without {', '.join(closed.missing)}"] if closed.missing else []
    return ", ".join([*parts, "repeated"] if closed.repeated else parts)
