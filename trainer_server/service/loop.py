"""The shell around the coordinator: MQTT, the clock, and the run's folder (see `trainer_server.storage.run_store`).

RUN/global_expert/       the global expert as a PEFT adapter, renewed after every round of stage 1
RUN/notes.log            what an operator should read

Every event goes the same way: the coordinator says what follows from it, the store makes that durable, and only then is
it acted on. So an acknowledgement that has left is true for ever, and what a full disk refuses has not happened.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import paho.mqtt.client as paho

from fedfmsl.common.cli import console
from fedfmsl.errors import MessageError, RunError
from fedfmsl.protocol.chunks import chunks
from fedfmsl.protocol.duplicate_name import DuplicateNameGuard
from fedfmsl.protocol.messages import DeviceStatus, ServerStatus, Stage, encode, parse
from fedfmsl.protocol.tensors import blob_bytes
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Connected, Disconnected, Link, Oversize, Received
from trainer_server.coordinator.advance import advance, announcement, next_deadline
from trainer_server.coordinator.events import (
    AnnounceRound,
    ClockTicked,
    Command,
    CountRefusal,
    Log,
    PublishGlobals,
    SendAck,
    StatusSeen,
    Stop,
    StoreRound,
)
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.state import Plan, State
from trainer_server.service.decode import Decoder
from trainer_server.service.refusals import Refusals
from trainer_server.storage.peft_adapter import write_adapter
from trainer_server.storage.run_store import LoggedEvent, RunStore
from trainer_server.storage.uploads import Uploads

ECHO_SECONDS = 10.0  # in which the broker sends us our own status
LOOK_SECONDS = 1.0  # the longest the clock goes unlooked at
BATCH = 64  # messages that share one commit
NOTES_BYTES = 8 * 1024 * 1024  # of notes.log; what is older lies in notes.log.1, what is still older is gone
FINISHED = "finished"


class RunClock:
    """Seconds that the run's server has worked, whatever the machine's clock says; goes on where the last one ended."""

    def __init__(self, start: float) -> None:
        self._offset = start - time.monotonic()

    def now(self) -> float:
        return self._offset + time.monotonic()


# By device the last status that changed the state, and before one of being offline the last of being online, without
# which nobody could tell whether it was an earlier life's.
Statuses = dict[str, list[LoggedEvent]]


@dataclass
class _Batch:
    """What a look at the link has come to; none of it has happened before it is on the disk. `files`: where the updates
    lie that count from then on, and where they are to be kept."""

    state: State
    now: float
    statuses: Statuses
    logged: list[LoggedEvent] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    files: dict[Path, Path] = field(default_factory=dict)


class Service:
    def __init__(self, plan: Plan, state: State, at: float, store: RunStore, link: Link, status: ServerStatus) -> None:
        """Goes on from `state`, which was the state at the second `at` of the run's clock."""
        self._plan = plan
        self._state = state
        self._store = store
        self._link = link
        self._status = status
        self._topics = Topics(plan.config.run)
        self._clock = RunClock(at)
        largest = max(plan.bundle.expert.total, plan.bundle.gate.total, plan.statistics.total)
        self._uploads = Uploads(store.folder / "uploads", blob_bytes(largest))
        self._decoder = Decoder(self._topics, self._uploads)
        self._published: dict[str, int] = {}  # blob → number of its retained chunks
        self._statuses: Statuses = {}  # not yet in the store
        self._refusals = Refusals()
        self._name_guard = DuplicateNameGuard(plan.session)
        self._connections = 0
        self._connected_at = math.inf  # until it has been looked at whether the broker lets us speak
        self._superseded = False
        self._disk_error = ""
        self._last: paho.MQTTMessageInfo | None = None

    def run(self) -> None:
        """Until the run has ended. Raises BrokerError, or RunError if the run had to be given up."""
        self._link.connect()
        self._link.subscribe(self._topics.status("+"))
        self._link.subscribe(self._topics.update_chunk("+", "+", "+"))
        self._link.subscribe(self._topics.server_status)
        if self._state.announced is None:
            config = self._plan.config
            console.print(f"waiting for {config.devices} devices, for at most {config.join_timeout:.0f} s")
        try:
            if self._store.ended is not None:  # it may have died before it told anybody
                self._publish_present()
            while self._store.ended is None:
                self._process_events()
                self._tick()
        finally:
            if not self._superseded:  # what stands there now is another's
                self._publish_status(online=False)
            self._link.close(self._last)
        if self._store.ended != FINISHED:
            raise RunError(self._store.ended)

    def _process_events(self) -> None:
        """What has come since the last look: advance, commit, act."""
        batch = _Batch(self._state, self._clock.now(), self._statuses.copy())
        wait = min(LOOK_SECONDS, next_deadline(self._plan, batch.state) - batch.now)
        try:
            for _ in range(BATCH):
                received = self._link.next_event(wait)
                if received is None:
                    break
                wait = 0.0
                if isinstance(received, Connected):
                    self._connected_at = self._clock.now()
                    self._connections += 1
                    self._publish_present()
                elif isinstance(received, Disconnected):
                    console.print(f"no connection to the broker ({received.reason}); trying again and again")
                elif isinstance(received, Oversize):
                    self._refuse(self._sender(received.topic), "too large", f"{received.size} bytes")
                elif isinstance(received, Received):
                    self._receive(received, batch)
            self._make_durable(batch)
        except (OSError, sqlite3.Error) as error:
            # nothing of it has happened: devices send their updates again, and the broker what it has retained
            self._disk_refuses(error)
            for path in batch.files:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            self._link.subscribe(self._topics.status("+"))
            return
        self._state = batch.state
        for command in batch.commands:
            self._execute(command)

    def _receive(self, received: Received, batch: _Batch) -> None:
        """Goes on with the batch; a message that does not fit the contract is refused."""
        if received.topic == self._topics.server_status:
            self._check_duplicate(received.payload)
            return
        try:
            event, upload = self._decoder.read(received, batch.state.devices)
        except MessageError as error:
            about = f"a message on {received.topic[:200]}: {error}"
            self._refuse(self._sender(received.topic), "unreadable", about)
            return
        if event is None:
            return
        after, commands = advance(self._plan, batch.state, event, batch.now)
        batch.commands += commands
        if after is batch.state:
            if upload is not None:
                self._uploads.discard(upload)
            return
        batch.state = after
        if isinstance(event, StatusSeen):
            _keep_last(batch.statuses, event.status, LoggedEvent(batch.now, event))
        else:
            batch.logged.append(LoggedEvent(batch.now, replace(event, tensors={})))
            if upload is not None:
                batch.files[upload.path] = self._store.tensors / upload.sha256

    def _make_durable(self, batch: _Batch) -> None:
        """Updates at once. Who is there need not be: the broker has it retained, and a device that comes and goes all
        the time would fill the log. The last that is known of each goes in with the next thing that must."""
        if batch.logged:
            self._uploads.store(batch.files)
            self._store.commit([*_flat(batch.statuses), *batch.logged])
            self._statuses, self._disk_error = {}, ""
        else:
            self._statuses = batch.statuses

    def _check_duplicate(self, payload: bytes) -> None:
        """Raises RunError if another server has shown itself under this run's name after this one has."""
        try:
            status = parse(ServerStatus, payload)
        except MessageError:
            return
        self._name_guard = self._name_guard.observe(status.session)
        # An offline newer server counts after a reconnection: this server's return has pushed it off the broker.
        if self._name_guard.is_newer(status.session) and (status.online or self._connections > 1):
            self._superseded = True
            raise RunError(
                f"another server has come for run {self._plan.config.run!r}; end one of them, or give it another --run"
            )

    def _tick(self) -> None:
        """Opens and closes rounds."""
        now = self._clock.now()
        if now > self._connected_at + ECHO_SECONDS:
            self._connected_at = math.inf
            if not self._name_guard.confirmed:
                self._note("the broker does not pass on what this server says; is --identity the server's own?")
        state, commands = advance(self._plan, self._state, ClockTicked(), now)
        if not commands:
            return
        stop = next((command for command in commands if isinstance(command, Stop)), None)
        if stop is not None and state is self._state:  # it has not even begun, and may be tried again
            raise RunError(stop.error)
        ended = (stop.error or FINISHED) if stop else None
        rounds = [command.closed for command in commands if isinstance(command, StoreRound)]
        try:
            events = [*_flat(self._statuses), LoggedEvent(now, ClockTicked())]
            self._store.commit(events, rounds, self._refusals.pending(), ended)
            self._refusals.stored()
            self._state, self._statuses, self._disk_error = state, {}, ""
            self._store.save_checkpoint(state, now)
        except (OSError, sqlite3.Error) as error:
            self._disk_refuses(error)
        if self._state is state:
            for command in commands:
                self._execute(command)

    def _execute(self, command: Command) -> None:
        if isinstance(command, PublishGlobals):
            self._publish_blob(command)
        elif isinstance(command, AnnounceRound):
            self._announce(command)
        elif isinstance(command, SendAck):
            self._publish(self._topics.ack(command.ack.device), encode(command.ack))
        elif isinstance(command, CountRefusal):
            self._refuse(command.device, command.kind, command.text)
        elif isinstance(command, StoreRound):
            self._record(command.closed)
        elif isinstance(command, Log):
            self._note(command.text)

    def _publish_present(self) -> None:
        """To a broker that may know nothing of us, or no more."""
        self._publish_status(online=True)
        self._published = {}
        if self._state.announced is not None:
            for command in announcement(self._plan, self._state, self._state.announced):
                self._execute(command)

    def _publish_status(self, online: bool) -> None:
        status = self._status.model_copy(update={"online": online})
        self._publish(self._topics.server_status, encode(status), retain=True)

    def _publish_blob(self, command: PublishGlobals) -> None:
        if command.sha256 in self._published:
            return
        count = 0
        for count, chunk in enumerate(chunks(command.blob), start=1):
            self._publish(self._topics.globals_chunk(command.sha256, count - 1), chunk, retain=True)
        self._published[command.sha256] = count

    def _announce(self, command: AnnounceRound) -> None:
        announced = command.round
        self._publish(self._topics.round, encode(announced), retain=True)
        for sha256 in set(self._published) - {announced.expert, announced.start, announced.gate}:
            for index in range(self._published.pop(sha256)):  # an empty retained message deletes the old one
                self._publish(self._topics.globals_chunk(sha256, index), b"", retain=True)
        where = f"{announced.stage.value} {announced.index + 1}/{announced.of}"
        asked = f", {len(announced.chosen)} devices asked" if announced.chosen else ""
        console.print(f"round {announced.round}: {where}, level {announced.level}{asked}")

    def _record(self, closed: ClosedRound) -> None:
        if closed.missing:
            self._note(f"round {closed.round.round} ended without {_names(closed.missing)}")
        if closed.round.stage is Stage.GLOBAL:
            level = closed.round.level
            expert = self._state.expert[: self._plan.bundle.expert.size(level)]
            try:
                write_adapter(self._plan.bundle, expert, level, self._store.folder / "global_expert")
            except OSError as error:
                self._note(f"the adapter of round {closed.round.round} could not be written ({error.strerror})")

    def _sender(self, topic: str) -> str:
        """Who may write to a topic, if it is one of the devices we know: strangers are counted as one."""
        device = self._topics.device_of(topic) or ""
        return device if device in self._state.devices else "a stranger"

    def _refuse(self, device: str, kind: str, text: str) -> None:
        who = device if device in self._state.devices else "a stranger"
        if self._refusals.add(who, kind, text):
            self._note(f"refused from {who} ({kind}): {text}")

    def _disk_refuses(self, error: OSError | sqlite3.Error) -> None:
        if str(error) != self._disk_error:
            self._disk_error = str(error)
            self._note(f"the disk of {self._store.folder} refuses ({error}); free some space, the run waits for it")
        time.sleep(LOOK_SECONDS)  # it is no emptier a moment later

    def _note(self, text: str) -> None:
        console.print(text)
        path = self._store.folder / "notes.log"
        with contextlib.suppress(OSError), path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
            if file.tell() > NOTES_BYTES:
                path.replace(path.with_suffix(".log.1"))

    def _publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self._last = self._link.publish(topic, payload, retain)


def _keep_last(statuses: Statuses, status: DeviceStatus, logged: LoggedEvent) -> None:
    earlier = statuses.get(status.device, [])[:1]
    shown = [one for one in earlier if isinstance(one.event, StatusSeen) and one.event.status.online]
    statuses[status.device] = [logged] if status.online else [*shown, logged]


def _flat(statuses: Statuses) -> list[LoggedEvent]:
    return [logged for of_device in statuses.values() for logged in of_device]


def _names(devices: tuple[str, ...]) -> str:
    shown = ", ".join(devices[:10])
    return shown if len(devices) <= 10 else f"{shown} and {len(devices) - 10} more"
