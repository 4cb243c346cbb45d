"""The shell around the coordinator: MQTT, the clock, and the run's folder.

RUN/rounds.jsonl         one line per closed round: what every device reported, bytes, seconds
RUN/notes.log            what an operator should read
RUN/global_expert/       the global expert as a PEFT adapter, renewed after every round of stage 1
"""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path

import paho.mqtt.client as paho

from protocol.bundle import Bundle
from protocol.errors import ConfigError, MessageError, RunError
from protocol.messages import DeviceStatus, ServerStatus, Stage, Update, encode, parse
from protocol.tensors import Assembler, chunks, unpack
from protocol.topics import Topics
from shell.cli import console
from shell.link import Link, Received, Will
from trainer_server.adapter import write_adapter
from trainer_server.config import RunConfig
from trainer_server.coordinator import Plan, State, advance, initial_state, next_deadline
from trainer_server.events import (
    Announce,
    ClockTicked,
    Command,
    Event,
    Note,
    PublishGlobals,
    Record,
    Reply,
    StatusSeen,
    Stop,
    UpdateSeen,
)

ROUNDS = "rounds.jsonl"
LOOK_SECONDS = 1.0  # the longest the clock goes unlooked at


class Service:
    def __init__(
        self,
        config: RunConfig,
        bundle: Bundle,
        broker: str,
        folder: Path,
        bundle_url: str,
        identity: Path | None = None,
        insecure: bool = False,
    ) -> None:
        session = secrets.token_hex(8)
        self._plan = Plan(config, bundle, session)
        self._folder = folder
        self._topics = Topics(config.run)
        self._status = ServerStatus(
            online=True,
            run=config.run,
            session=session,
            bundle=bundle.sha256,
            bundle_url=bundle_url,
            model=bundle.manifest.model,
        )
        will = Will(self._topics.server_status, encode(self._status.model_copy(update={"online": False})))
        self._link = Link(broker, f"fedfmsl-server-{config.run}", will, identity=identity, insecure=insecure)
        self._uploads: dict[tuple[str, str], tuple[Assembler, int]] = {}
        self._published: dict[str, int] = {}  # blob → number of its retained chunks
        self._last: paho.MQTTMessageInfo | None = None

    def run(self) -> None:
        """Until the run has ended.

        Raises ConfigError if the folder holds another run, BrokerError, or RunError if the run had to be given up.
        """
        if (self._folder / ROUNDS).exists():
            raise ConfigError(f"{self._folder} already holds a run; choose another --out, or remove it")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._link.connect()
        self._link.subscribe(self._topics.status("+"))
        self._link.subscribe(self._topics.update_chunk("+", "+", "+"))
        self._publish(self._topics.server_status, encode(self._status), retain=True)
        state = initial_state(self._plan, time.time())
        try:
            stopped = False
            while not stopped:
                wait = min(LOOK_SECONDS, next_deadline(self._plan, state) - time.time())
                event = self._event(self._link.next_event(wait))
                state, commands = advance(self._plan, state, event, time.time())
                for command in commands:
                    self._carry_out(command, state)
                    stopped = isinstance(command, Stop)
        finally:
            offline = self._status.model_copy(update={"online": False})
            self._publish(self._topics.server_status, encode(offline), retain=True)
            self._link.close(self._last)

    def _event(self, received: object) -> Event:
        """What a message means to the coordinator; one that means nothing is noted and dropped. One that nobody asked
        for is only dropped: amqtt sends a new client what is retained for any other."""
        device = self._topics.device_of(received.topic) if isinstance(received, Received) else None
        if not isinstance(received, Received) or device is None:
            return ClockTicked()
        try:
            if received.topic == self._topics.status(device):
                status = parse(DeviceStatus, received.payload)
                if status.device != device:
                    raise MessageError(f"names device {status.device!r}")
                return StatusSeen(status)
            return self._chunk(received)
        except MessageError as error:
            self._note(f"dropped a message on {received.topic}: {error}")
            return ClockTicked()

    def _chunk(self, received: Received) -> Event:
        named = self._topics.update_of(received.topic)
        if named is None:
            return ClockTicked()
        device, round_ = named
        assembler, size = self._uploads.pop(named, (Assembler(), 0))
        size += len(received.payload)
        blob = assembler.add(received.payload)
        if blob is None:
            self._uploads[named] = assembler, size
            return ClockTicked()
        update, tensors = unpack(blob, Update)
        if update.device != device or str(update.round) != round_:
            raise MessageError(f"the update inside is of {update.device!r}, round {update.round}")
        return UpdateSeen(update, tensors, size)

    def _carry_out(self, command: Command, state: State) -> None:
        if isinstance(command, PublishGlobals):
            self._publish_blob(command)
        elif isinstance(command, Announce):
            self._announce(command)
        elif isinstance(command, Reply):
            self._publish(self._topics.ack(command.ack.device), encode(command.ack))
        elif isinstance(command, Record):
            self._record(command, state)
        elif isinstance(command, Note):
            self._note(command.text)
        elif isinstance(command, Stop) and command.error:
            raise RunError(command.error)

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
        console.print(f"round {announced.round}: {where}, level {announced.level}")

    def _record(self, record: Record, state: State) -> None:
        line = {
            "round": record.round.model_dump(mode="json"),
            "seconds": record.seconds,
            "updates": {name: update.model_dump(mode="json") for name, update in record.updates.items()},
            "bytes_up": dict(record.bytes_up),
            "missing": list(record.missing),
            "repeated": record.repeated,
        }
        with (self._folder / ROUNDS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if record.missing:
            self._note(f"round {record.round.round} ended at its deadline without {', '.join(record.missing)}")
        if record.round.stage is Stage.GLOBAL:
            level = record.round.level
            expert = state.expert[: self._plan.bundle.expert.size(level)]
            write_adapter(self._plan.bundle, expert, level, self._folder / "global_expert")

    def _note(self, text: str) -> None:
        console.print(text)
        with (self._folder / "notes.log").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def _publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self._last = self._link.publish(topic, payload, retain)
