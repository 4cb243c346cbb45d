"""A server's loop without a network: advance, commit, save a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack
from support.coordinators import ABC, CoordinatorRun, make_update
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import BeginSession, ClockTicked, Event, StatusSeen, Stop, StoreRound, UpdateSeen
from trainer_server.coordinator.state import Plan
from trainer_server.service.lifecycle import make_plan, restore_state
from trainer_server.service.next_session import begin_session
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.run_store import RunStore


class OfflineServer:
    """Continues the run in a store, for the devices ABC."""

    def __init__(self, store: RunStore, plan: Plan) -> None:
        self.store, self.plan = store, plan
        self.state, self.now = restore_state(store, plan)

    def feed(self, event: Event) -> None:
        self.now += 1.0
        state, commands = advance(self.plan, self.state, event, self.now)
        rounds = [command.closed for command in commands if isinstance(command, StoreRound)]
        for begins in commands:
            if isinstance(begins, BeginSession):
                begin_session(self.store, self.plan, state, begins, self.now, rounds)
                self.plan = make_plan(self.store, TaskBundle(self.plan.bundle, self.store.task()))
                self.state, self.now = restore_state(self.store, self.plan)
                return
        if isinstance(event, UpdateSeen) and state is not self.state:
            write_atomically(self.store.blobs.folder / event.sha256, pack(event.update, event.tensors))
        if state is self.state:
            return
        ended = next((c.error or "finished" for c in commands if isinstance(c, Stop)), None)
        self.store.commit([LoggedEvent(self.now, event)], rounds, ended=ended)
        self.state = state
        if isinstance(event, ClockTicked):
            self.store.save_checkpoint(state, self.now)

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
