"""The server's I/O loop around the coordinator: MQTT, clock and disk.

Every event takes three steps. The coordinator computes the next state and its commands. The store writes the event
durably. Then the commands are executed. So an acknowledgement remains valid after a crash, and an event that cannot be
stored has no effect.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Iterator

from fedfmsl.errors import BrokerError, RunError
from fedfmsl.protocol.chunks import CHUNK_BYTES, CHUNK_SIZES, HEADER_BYTES
from fedfmsl.protocol.messages import DeviceStatus, ServerStatus
from fedfmsl.protocol.tensors import blob_bytes
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Connected, Link
from fedfmsl.transport.message_size import largest_message
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import (
    AnnounceRound,
    BeginSession,
    ClockTicked,
    Log,
    OperatorActed,
    RestChanged,
    StatusSeen,
    Stop,
    StoreRound,
)
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.records import number_of
from trainer_server.coordinator.round_end import next_deadline
from trainer_server.coordinator.state import Plan, State
from trainer_server.service.batch import Batch, Statuses, flatten
from trainer_server.service.clock import RunClock
from trainer_server.service.disk_errors import reason_and_remedy
from trainer_server.service.executor import Executor
from trainer_server.service.expert_folder import ExpertFolder
from trainer_server.service.figures import Figures, Snapshot
from trainer_server.service.next_session import begin_session
from trainer_server.service.observer import Observer
from trainer_server.service.publisher import Publisher
from trainer_server.service.receiver import Receiver
from trainer_server.service.refusals import Refusals
from trainer_server.service.rest import Rest
from trainer_server.service.retained import remove_unneeded_globals
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.expert_folder import last_result
from trainer_server.storage.kept_experts import KeptExperts
from trainer_server.storage.observations import Acted, Observations, read_observations
from trainer_server.storage.operations import Operations
from trainer_server.storage.run_store import RunStore

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # longest wait for a message
JOINED_SECONDS = 1.0  # between two lists of the devices that have joined
BATCH = 64  # messages in one commit
FINISHED = "finished"


class Service:
    def __init__(
        self,
        plan: Plan,
        state: State,
        at: float,
        store: RunStore,
        link: Link,
        status: ServerStatus,
        topics: Topics,
        figures: Figures,
        flooding: set[str],
        allowed: frozenset[str] | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`state` was the state at second `at` of the run's clock. `figures` and `flooding`, the devices that are
        ignored: of all sessions since the server's start; the service adds to them. `allowed`: the devices that may
        take part. `wall`: the wall clock, in unix seconds."""
        self._plan = plan
        self._state = state
        self._store = store
        self._link = link
        self._topics = topics
        self._clock = RunClock(at, wall)
        self._rest = Rest(wall)
        self._figures = figures
        self._refusals = Refusals(figures.refused)
        self._observations = Observations(store.folder)
        self._operations = Operations(store.folder)
        self._kept = KeptExperts(store.folder)
        self._expert_folder = ExpertFolder(plan, store.folder / "global_expert")
        self._publisher = Publisher(link, topics, status)
        self._receiver = Receiver(
            plan,
            store,
            link,
            topics,
            self._publisher,
            self._observations,
            self._refusals,
            status.instance,
            flooding,
            allowed,
        )
        self._executor = Executor(
            plan, store, self._publisher, self._refusals, self._receiver.floods, self._expert_folder
        )
        self._observer = Observer(plan, store, link, self._observations, self._rest)
        self._statuses: Statuses = {}  # not in the store yet
        self._unapplied: list[StatusSeen] = []  # of a batch that could not be stored
        self._disk_error = ("", "")
        self._next_joined = 0.0
        self._joined: frozenset[str] | None = None  # the devices in the store's list before the first round
        before, _ = read_observations(store.folder, since=math.inf)
        self._acted = before.acted if before else None  # the operator's last action
        self._must_connect = False  # before this session ends
        self._next_begins = False  # this session has ended, and the next one is in the store

    def snapshot(self) -> Snapshot:
        """What metrics show now. For any thread."""
        link, uploads = self._link, self._receiver.uploads.incomplete
        return Snapshot(
            self._plan,
            self._state,
            self._figures,
            folder=self._store.folder,
            connected=not link.outage.since,
            queued=link.events.qsize(),
            uploads=uploads,
            certificate_until=link.own_until,
            broker_certificate_until=link.broker_until,
        )

    def run(self) -> bool:
        """Returns whether the next session of the run begins; if not, the run is finished. Raises BrokerError, and
        RunError if the run failed or a newer server took over."""
        self._link.connect()
        try:
            self._begin()
            self._keep_expert()
            self._obey()  # a finished run goes on if it is rolled back
            if self._store.checkpoint_number():
                self._expert_folder.resumed(self._state, last_result(self._store))
            while self._store.ended is None and not self._next_begins:
                self._process_messages()
                self._obey()
                self._follow_clock()
                self._tick()
                deadline = next_deadline(self._plan, self._state) - self._clock.now()
                self._observer.observe(self._state, deadline, self._acted)
        finally:
            self._observations.close()
            if self._next_begins:  # its server is online at once
                self._publisher.delete_globals()
            elif not self._receiver.guard.superseded:  # else the retained status is the newer server's
                begun = self._state.announced is not None or self._state.round > 0
                self._publisher.publish_status(online=False, ended=self._store.ended is not None or not begun)
            self._link.close(self._publisher.last)
        if not self._next_begins and self._store.ended != FINISHED:
            raise RunError(self._store.ended)
        return self._next_begins

    def _begin(self) -> None:
        """What a server does once, after it has connected."""
        self._measure_chunks()
        announced = self._state.announced
        needed = (announced.blobs if announced else frozenset()) | {self._plan.bundle.task.sha256}
        remove_unneeded_globals(self._link, self._topics, needed, blob_bytes(self._plan.largest_update))
        self._link.subscribe(self._topics.status("+"))
        self._link.subscribe(self._topics.health("+"))
        self._link.subscribe(self._topics.update_chunk("+", "+", "+"))
        self._link.subscribe(self._topics.server_status)
        self._connect(self._state)
        if announced is None and self._state.round == 0:
            config = self._plan.config
            logger.info("waiting up to %.0f s for %s", config.join_timeout, number_of(config.devices, "device"))

    def _measure_chunks(self) -> None:
        """Chooses the largest chunks that the broker takes. A broker that returns nothing is logged."""
        lengths = [size + HEADER_BYTES for size in CHUNK_SIZES]
        try:
            size = largest_message(self._link, self._topics.server_check, lengths) - HEADER_BYTES
        except BrokerError as error:
            logger.warning("%s", error)
        else:
            if size != CHUNK_BYTES:
                logger.warning("the broker takes no messages of %d bytes; using chunks of %d bytes", lengths[0], size)
            self._publisher.use_chunks_of(size)
            self._receiver.floods.use_chunks_of(size)

    def _connect(self, state: State) -> None:
        """The start of a connection. It announces the round again, and the end of a run, which the previous server may
        not have done. The subscriptions come first: a retained answer to this server's status would be no sign of life,
        and the guard counts only statuses before this server's own as earlier ones."""
        self._observer.save_certificates()
        self._receiver.guard.connected(self._clock.now())
        self._receiver.liveness.connected((status.device for status in _online(state)), self._clock.now())
        self._executor.publish_state(self._state)

    def _process_messages(self) -> None:
        """Waits for messages, stores what they change, and executes the commands that follow."""
        batch = Batch(self._state, self._clock.now(), self._statuses.copy())
        for status in self._unapplied:
            self._receiver.apply(status, batch)
        wait = min(POLL_SECONDS, next_deadline(self._plan, batch.state) - batch.now)
        try:
            for _ in range(BATCH):
                event = self._link.next_event(wait)
                if event is None:
                    break
                wait = 0.0
                if isinstance(event, Connected):
                    self._connect(batch.state)
                else:
                    self._receiver.receive(event, batch)
            for lost in self._receiver.liveness.lost(_online(batch.state), batch.now):
                self._receiver.apply(lost, batch)
            self._store_batch(batch)
        except (OSError, sqlite3.Error) as error:
            # The batch has no effect: devices retransmit their updates, and the next batch repeats their statuses.
            self._wait_for_disk(error)
            self._unapplied = [one.event for one in flatten(batch.statuses) if isinstance(one.event, StatusSeen)]
            return
        self._state, self._unapplied = batch.state, []
        for command in batch.commands:
            self._executor.execute(command, self._state)

    def _store_batch(self, batch: Batch) -> None:
        if batch.updates:
            self._store.commit(batch.events, blobs=batch.blobs)
            self._statuses, self._disk_error = {}, ("", "")
        else:
            self._statuses = batch.statuses
        if batch.state.announced is None and batch.now >= self._next_joined and batch.state.online != self._joined:
            self._store.files.save_joined(batch.state.online)
            self._joined, self._next_joined = batch.state.online, batch.now + JOINED_SECONDS

    def _obey(self) -> None:
        """Carries out what the operator asks, as events of the log."""
        for path, operation in self._operations.waiting():
            ended = self._store.ended
            if operation is None:
                logger.warning("%s holds no action of an operator; it is removed", path)
            elif ended is not None and (operation.action is not Action.ROLLBACK or ended != FINISHED):
                logger.warning("operator: the run has ended (%s), so %s changes nothing", ended, operation.action.value)
            else:
                now = self._clock.now()
                try:
                    event = OperatorActed(self._with_expert(operation))
                    state, commands = advance(self._plan, self._state, event, now)
                    if state is not self._state:
                        events = [*flatten(self._statuses), LoggedEvent(now, event)]
                        self._store.commit(events, reopens=ended is not None)
                        self._state, self._statuses = state, {}
                except (OSError, sqlite3.Error) as error:
                    self._wait_for_disk(error)
                    return
                text = next(command.text for command in commands if isinstance(command, Log))
                self._acted = Acted(text=text, at=time.time())
                for command in commands:
                    self._executor.execute(command, self._state)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _follow_clock(self) -> None:
        """Begins or ends a rest, as an event of the log. Before the first round nothing is stored: a server that is
        started again asks the clock again."""
        rests = self._rest.look(self._state)
        if rests == (self._state.rests_at is not None):
            return
        now, event = self._clock.now(), RestChanged(rests)
        state, _ = advance(self._plan, self._state, event, now)
        try:
            if state.announced is not None:
                self._store.commit([*flatten(self._statuses), LoggedEvent(now, event)])
                self._statuses = {}
        except (OSError, sqlite3.Error) as error:
            self._wait_for_disk(error)
            return
        self._state = state

    def _with_expert(self, operation: Operation) -> Operation:
        """A rollback with the global expert that it needs, so that a replay finds it. Raises OSError."""
        if operation.action is not Action.ROLLBACK:
            return operation
        return operation.model_copy(update={"sha256": self._kept.copy(operation.round, self._store.blobs.folder)})

    def _keep_expert(self) -> None:
        """Keeps the present global expert for a rollback, if it is a new one. A failure is logged."""
        made = self._state.made
        try:
            if made and made not in self._kept.rounds():
                self._kept.write(made, self._state.expert)
        except OSError as error:
            logger.warning("the global expert of round %d is not kept for a rollback (%s)", made, error.strerror)

    def _tick(self) -> None:
        """Opens and closes rounds."""
        now = self._clock.now()
        self._receiver.sweeper.sweep(now)
        self._observer.save_outage()
        for gap in self._receiver.uploads.gaps():
            self._publisher.ask_for_chunks(gap)
        if self._receiver.guard.echo_is_missing(now):
            logger.warning("the broker does not return this server's own status; check that --identity is the server's")
        if self._must_connect and self._link.outage.since:
            return
        started = time.monotonic()
        overdue = now >= next_deadline(self._plan, self._state)
        ticked = ClockTicked(self._receiver.liveness.working(now) if overdue else frozenset(), self._clock.wall())
        try:
            state, commands = advance(self._plan, self._state, ticked, now)
        except (OSError, sqlite3.Error) as error:  # no disk space for the aggregation, or an update cannot be read now
            self._wait_for_disk(error)
            return
        if not commands:
            return
        stop = next((command for command in commands if isinstance(command, Stop)), None)
        if stop is not None and state is self._state:  # the run has not started, so the same command can start it again
            raise RunError(stop.error)
        ended = (stop.error or FINISHED) if stop else None
        rounds = [command.closed for command in commands if isinstance(command, StoreRound)]
        begins = next((command for command in commands if isinstance(command, BeginSession)), None)
        self._must_connect = begins is not None and self._link.outage.since > 0  # the next one connects anew
        if self._must_connect:
            logger.info("the next session begins when the broker is back")
            return
        try:
            if begins is not None:
                begin_session(self._store, self._plan, state, begins, now, rounds, self._refusals.pending())
                self._next_begins = True
            else:
                events = [*flatten(self._statuses), LoggedEvent(now, ticked)]
                self._store.commit(events, rounds, self._refusals.pending(), ended)
            self._refusals.clear()
            self._state, self._statuses, self._disk_error = state, {}, ("", "")
            if any(isinstance(command, AnnounceRound) for command in commands):  # it holds no updates
                self._store.save_checkpoint(state, now)
        except (OSError, sqlite3.Error) as error:
            self._wait_for_disk(error)
        if self._state is state:
            self._keep_expert()
            for record in rounds:
                self._figures.closed(record, time.monotonic() - started)
            for command in commands:
                self._executor.execute(command, self._state)

    def _wait_for_disk(self, error: OSError | sqlite3.Error) -> None:
        found = reason_and_remedy(error)
        if found != self._disk_error:
            self._disk_error = found
            logger.error("cannot use %s (%s); %s, the run waits for it", self._store.folder, *found)
        time.sleep(POLL_SECONDS)


def _online(state: State) -> Iterator[DeviceStatus]:
    return (status for status in state.devices.values() if status.online)
