"""A server without a network: the coordinator and the run's files, which are written in the order of the server's
loop."""

from __future__ import annotations

from collections.abc import Sequence

from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import (
    AnnounceRound,
    BeginSession,
    Command,
    Event,
    Stop,
    StoreRound,
    UpdateSeen,
)
from trainer_server.coordinator.state import Plan, State
from trainer_server.service.lifecycle import make_plan, restore_state
from trainer_server.service.next_session import begin_session
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.run_store import RunStore


class StoredRun:
    """Continues the run of a store. Each event takes a second of the run's clock, `now`."""

    def __init__(self, store: RunStore, plan: Plan) -> None:
        self.store, self.plan = store, plan
        self.state, self.now = restore_state(store, plan)

    def feed(self, event: Event, blob: bytes = b"") -> None:
        """`blob`: an update as the device has sent it. Default: made of its tensors."""
        self.now += 1.0
        state, commands = advance(self.plan, self.state, event, self.now)
        rounds = [each.closed for each in commands if isinstance(each, StoreRound)]
        begins = next((each for each in commands if isinstance(each, BeginSession)), None)
        if begins is not None:
            begin_session(self.store, self.plan, state, begins, self.now, rounds)
            self.executed(state, commands)
            self.plan = make_plan(self.store, TaskBundle(self.plan.bundle, self.store.task()))
            self.state, self.now = restore_state(self.store, self.plan)
            return
        if state is not self.state:
            if isinstance(event, UpdateSeen):
                write_atomically(self.store.blobs.folder / event.sha256, blob or pack(event.update, event.tensors))
            ended = next((each.error or "finished" for each in commands if isinstance(each, Stop)), None)
            self.store.commit([LoggedEvent(self.now, event)], rounds, ended=ended)
            self.state = state
            if any(isinstance(each, AnnounceRound) for each in commands):
                self.store.save_checkpoint(state, self.now)
        self.executed(state, commands)

    def executed(self, state: State, commands: Sequence[Command]) -> None:
        """Called after each event, with the state of its session and its commands."""
