"""A server without a network, and what its devices send."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.stored_run import StoredRun
from support.coordinators import ABC, CoordinatorRun, make_update
from trainer_server.coordinator.events import ClockTicked, Event, StatusSeen


class OfflineServer(StoredRun):
    """For the devices ABC."""

    def joins(self) -> Iterator[Event]:
        """All devices come online."""
        for name in ABC:
            yield StatusSeen(CoordinatorRun(self.plan).status(name))
        yield ClockTicked()

    def answers(self, nll: float = 1.0) -> Iterator[Event]:
        """All devices answer the present round; between two sessions the next one begins. `nll`: what they report."""
        if self.state.announced is None:
            yield ClockTicked()
            return
        for device in ABC:
            yield make_update(self.plan, self.state.announced, device, nll=nll)
            yield ClockTicked()

    def run(self) -> OfflineServer:
        """The whole run."""
        todo = list(self.joins())
        while self.store.ended is None:
            for event in todo:
                self.feed(event)
            todo = list(self.answers())
        return self
