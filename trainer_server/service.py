"""The shell around the coordinator: MQTT, the clock, and the run's folder (see `trainer_server.store`).

RUN/global_expert/       the global expert as a PEFT adapter, renewed after every round of stage 1
RUN/notes.log            what an operator should read

Every event goes the same way: the coordinator says what follows from it, the store makes that durable, and only then is
it acted on. So an acknowledgement that has left is true for ever, and what a full disk refuses has not happened.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections import Counter
from dataclasses import replace

import paho.mqtt.client as paho

from protocol.errors import MessageError, RunError
from protocol.messages import DeviceStatus, ServerStatus, Stage, Update, encode, parse
from protocol.tensors import blob_bytes, chunks, unpack
from protocol.topics import Topics
from shell.cli import console
from shell.link import Connected, Link, Oversize, Received
from trainer_server.adapter import write_adapter
from trainer_server.coordinator import advance, announcement, next_deadline
from trainer_server.events import (
    Announce,
    ClockTicked,
    Command,
    Event,
    Note,
    PublishGlobals,
    Record,
    Refuse,
    Reply,
    StatusSeen,
    Stop,
    UpdateSeen,
)
from trainer_server.rounds import ClosedRound
from trainer_server.state import Plan, State
from trainer_server.store import Logged, RunStore
from trainer_server.uploads import Upload, Uploads

LOOK_SECONDS = 1.0  # the longest the clock goes unlooked at
BATCH = 64  # messages that share one commit
FINISHED = "finished"


class RunClock:
    """Seconds that the run's server has worked, whatever the machine's clock says; goes on where the last one ended."""

    def __init__(self, start: float) -> None:
        self._offset = start - time.monotonic()

    def now(self) -> float:
        return self._offset + time.monotonic()


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
        self._published: dict[str, int] = {}  # blob → number of its retained chunks
        self._refused: Counter[tuple[str, str]] = Counter()  # not yet in the store
        self._last_refusal: dict[tuple[str, str], str] = {}
        self._noted: set[tuple[str, str]] = set()
        self._disk_error = ""
        self._last: paho.MQTTMessageInfo | None = None

    def run(self) -> None:
        """Until the run has ended. Raises BrokerError, or RunError if the run had to be given up."""
        self._link.connect()
        self._link.subscribe(self._topics.status("+"))
        self._link.subscribe(self._topics.update_chunk("+", "+", "+"))
        try:
            if self._store.ended is not None:  # it may have died before it told anybody
                self._publish_present()
            while self._store.ended is None:
                self._hear()
                self._tick()
        finally:
            self._publish_status(online=False)
            self._link.close(self._last)
        if self._store.ended != FINISHED:
            raise RunError(self._store.ended)

    def _hear(self) -> None:
        """What has come since the last look: advance, commit, act."""
        state, now = self._state, self._clock.now()
        logged: list[Logged] = []
        commands: list[Command] = []
        wait = min(LOOK_SECONDS, next_deadline(self._plan, state) - now)
        try:
            for _ in range(BATCH):
                received = self._link.next_event(wait)
                if received is None:
                    break
                wait = 0.0
                if isinstance(received, Connected):
                    self._publish_present()
                elif isinstance(received, Oversize):
                    self._refuse(self._sender(received.topic), "too large", f"{received.size} bytes")
                elif isinstance(received, Received):
                    state = self._take(received, state, now, logged, commands)
            if logged:
                self._store.commit(logged)
        except (OSError, sqlite3.Error) as error:
            self._disk_refuses(error)  # nothing of it has happened, and the devices will send it again
            return
        self._disk_error = ""
        self._state = state
        for command in commands:
            self._carry_out(command)

    def _take(
        self, received: Received, state: State, now: float, logged: list[Logged], commands: list[Command]
    ) -> State:
        """The state after one message; one that does not fit the contract is refused."""
        sender = self._sender(received.topic)
        try:
            event, upload = self._read(received, state)
        except MessageError as error:
            self._refuse(sender, "unreadable", f"a message on {received.topic[:200]}: {error}")
            return state
        if event is None:
            return state
        after, more = advance(self._plan, state, event, now)
        commands += more
        if upload is not None and after is state:
            self._uploads.drop(upload)
        elif upload is not None:
            self._uploads.keep(upload, self._store.tensors / upload.sha256)
        if after is not state:
            logged.append(Logged(now, replace(event, tensors={}) if isinstance(event, UpdateSeen) else event))
        return after

    def _read(self, received: Received, state: State) -> tuple[Event | None, Upload | None]:
        """What a message means. Raises MessageError if it does not fit the contract. One that nobody asked for means
        nothing: amqtt sends a new client what is retained for any other."""
        device = self._topics.device_of(received.topic)
        if device is None or not received.payload:
            return None, None
        if received.topic == self._topics.status(device):
            status = parse(DeviceStatus, received.payload)
            if status.device != device:
                raise MessageError(f"names device {status.device!r}")
            return StatusSeen(status), None
        named = self._topics.update_of(received.topic)
        if named is None:
            return None, None
        if device not in state.devices:
            raise MessageError(f"device {device!r} has not announced itself")
        upload = self._uploads.add(*named, received.payload)
        if upload is None:
            return None, None
        try:
            update, tensors = unpack(upload.blob, Update)
            if (update.device, update.round) != named:
                raise MessageError(f"the update inside is of {update.device!r}, round {update.round}")
        except MessageError:
            self._uploads.drop(upload)
            raise
        return UpdateSeen(update, tensors, upload.sha256, upload.size), upload

    def _tick(self) -> None:
        """Opens and closes rounds."""
        now = self._clock.now()
        state, commands = advance(self._plan, self._state, ClockTicked(), now)
        if not commands:
            return
        stop = next((command for command in commands if isinstance(command, Stop)), None)
        if stop is not None and state is self._state:  # it has not even begun, and may be tried again
            raise RunError(stop.error)
        ended = (stop.error or FINISHED) if stop else None
        rounds = [command.closed for command in commands if isinstance(command, Record)]
        try:
            self._store.commit([Logged(now, ClockTicked())], rounds, self._take_refusals(), ended)
            self._state = state
            self._store.keep(state, now)
        except (OSError, sqlite3.Error) as error:
            self._disk_refuses(error)
        if self._state is state:
            for command in commands:
                self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, PublishGlobals):
            self._publish_blob(command)
        elif isinstance(command, Announce):
            self._announce(command)
        elif isinstance(command, Reply):
            self._publish(self._topics.ack(command.ack.device), encode(command.ack))
        elif isinstance(command, Refuse):
            self._refuse(command.device, command.kind, command.text)
        elif isinstance(command, Record):
            self._record(command.closed)
        elif isinstance(command, Note):
            self._note(command.text)

    def _publish_present(self) -> None:
        """To a broker that may know nothing of us, or no more."""
        self._publish_status(online=True)
        self._published = {}
        if self._state.announced is not None:
            for command in announcement(self._plan, self._state, self._state.announced):
                self._carry_out(command)

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

    def _announce(self, command: Announce) -> None:
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
        """Counts it; only the first of its kind is noted, so that nobody can fill the log."""
        who = (device if device in self._state.devices else "a stranger", kind)
        self._refused[who] += 1
        self._last_refusal[who] = text
        if who not in self._noted:
            self._noted.add(who)
            self._note(f"refused from {who[0]} ({kind}): {text}")

    def _take_refusals(self) -> dict[tuple[str, str], tuple[int, str]]:
        taken = {who: (count, self._last_refusal[who]) for who, count in self._refused.items()}
        self._refused.clear()
        return taken

    def _disk_refuses(self, error: OSError | sqlite3.Error) -> None:
        if str(error) != self._disk_error:
            self._disk_error = str(error)
            self._note(f"the disk of {self._store.folder} refuses ({error}); free some space, the run waits for it")
        time.sleep(LOOK_SECONDS)  # it is no emptier a moment later

    def _note(self, text: str) -> None:
        console.print(text)
        with contextlib.suppress(OSError), (self._store.folder / "notes.log").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def _publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self._last = self._link.publish(topic, payload, retain)


def _names(devices: tuple[str, ...]) -> str:
    shown = ", ".join(devices[:10])
    return shown if len(devices) <= 10 else f"{shown} and {len(devices) - 10} more"
