"""The shell around the daemon: MQTT, disk, and the computation itself, which runs between two looks at the queue."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import paho.mqtt.client as paho

from edge_runtime.daemon import (
    AckSeen,
    Command,
    Event,
    Fetch,
    GlobalArrived,
    Idle,
    Leave,
    Overdue,
    Reconnected,
    RoundSeen,
    Say,
    SelfSeen,
    Send,
    ServerSeen,
    Settle,
    ShowSelf,
    State,
    Work,
    WorkDone,
    WorkFailed,
    advance,
    wanted,
)
from edge_runtime.device import Device
from edge_runtime.evaluation import evaluate, train_alone
from edge_runtime.memory import peak_rss_mb
from edge_runtime.model import keep_personal_model
from edge_runtime.personal import train_personal
from edge_runtime.presence import INSTANCE, status_of
from edge_runtime.stages import Globals, statistics, train_global
from edge_runtime.stages import Work as StageWork
from edge_runtime.unanswered import Unanswered
from edge_runtime.updates import header_of, prepare
from protocol.errors import FedFMSLError, MessageError, RunError
from protocol.layout import Vector
from protocol.messages import (
    Ack,
    DeviceStatus,
    Round,
    ServerStatus,
    Stage,
    Verdict,
    encode,
    parse,
)
from protocol.messages import Globals as GlobalsHeader
from protocol.tensors import Assembler, Tensors, blob_bytes, blob_hash, chunks, pack, unpack
from protocol.topics import Topics
from shell.cli import console
from shell.link import Connected, Disconnected, Link, Received

STAGES: dict[Stage, StageWork] = {
    Stage.STATISTICS: statistics,
    Stage.GLOBAL: train_global,
    Stage.PERSONAL: train_personal,
    Stage.BASELINE: train_alone,
    Stage.EVALUATE: evaluate,
}
LOOK_SECONDS = 1.0
ASK_SECONDS = 30.0  # without a server
DISK_SECONDS = (1.0, 60.0)  # from one attempt to write to the next: at first, and at most


def write_personalized(device: Device) -> None:
    """In a process of its own: it needs the onnx package, which the daemon has no memory to spare for.

    Raises RunError if that process fails, OSError if there was no room for what it wrote.
    """
    command = [sys.executable, "-m", "edge_runtime", "personalize"]
    command += ["--bundle", str(device.bundle.root), "--state", str(device.store.root)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == os.EX_IOERR:
        raise OSError(errno.ENOSPC, "no room for the personalized model")
    if result.returncode:
        raise RunError(f"the personalized model could not be written: {result.stderr.strip()}")


class Service:
    def __init__(self, device: Device, run: str, link: Link) -> None:
        self._device = device
        self._run = run
        self._topics = Topics(run)
        self._link = link
        self._connected = True
        self._bytes_down = 0
        self._fetching: dict[str, Assembler] = {}
        self._unanswered = Unanswered(device.name)
        self._disk_seconds = 0.0  # to wait before what could not be written is tried once more; 0: all could
        self._last: paho.MQTTMessageInfo | None = None
        store = device.store
        store.drop_scraps()
        unsettled = store.unsettled(store.session)
        self._state = State(
            device=device.name,
            instance=INSTANCE,
            bundle=device.bundle.sha256,
            session=store.session,
            done=max({store.settled, *unsettled}),
            unsettled=unsettled,
        )

    def serve(self) -> None:
        """Until the run has finished. Raises FedFMSLError if this device cannot take part."""
        topics, name = self._topics, self._device.name
        self._link.subscribe(topics.ack(name))
        self._link.subscribe(topics.status(name))
        self._subscribe()
        self._announce()
        console.print(f"waiting for the server of run {self._run!r}")
        leave = Leave()
        try:
            leave = self._follow()
        except FedFMSLError as error:
            leave = Leave(str(error))
            raise
        finally:
            if not leave.quietly:
                self._announce(online=False, error=leave.error)
            self._link.close(self._last)
        if leave.error:
            raise RunError(leave.error)
        console.print(f"run {self._run!r} has finished; this device's model is {self._device.store.personalized}")

    def _subscribe(self) -> None:
        """To what the run's server says to everybody."""
        self._link.subscribe(self._topics.server_status)
        self._link.subscribe(self._topics.round)

    def _follow(self) -> Leave:
        """Events in, commands out, until one of them is to leave."""
        wait, asked = 0.0, time.monotonic()
        while True:
            if not self._state.present and time.monotonic() > asked + ASK_SECONDS:
                asked = time.monotonic()
                self._subscribe()  # anew: amqtt can lose what comes while one subscribes
            event = self._event(wait)
            wait = 0.0 if event else LOOK_SECONDS
            if event is None and self._connected and self._unanswered.overdue():
                event = Overdue()
            todo = deque(self._advance(event or Idle()))
            while todo:
                command = todo.popleft()
                if isinstance(command, Leave):
                    return command
                result = self._carry_out(command)
                if result is not None:
                    todo.extend(self._advance(result))

    def _advance(self, event: Event) -> list[Command]:
        self._state, commands = advance(self._state, event)
        return commands

    def _event(self, timeout: float) -> Event | None:
        received = self._link.next_event(timeout)
        if isinstance(received, Disconnected):
            if self._connected:
                console.print(f"no connection to the broker ({received.reason}); trying again and again")
            self._connected = False
        if isinstance(received, Connected):
            if not self._connected:
                console.print("connected to the broker again")
            self._connected = True
            self._unanswered.start_over()
            self._announce()
            return Reconnected()
        if not isinstance(received, Received) or not received.payload:
            return None
        try:
            if received.topic == self._topics.server_status:
                self._unanswered.start_over()
                return ServerSeen(parse(ServerStatus, received.payload))
            if received.topic == self._topics.round:
                return RoundSeen(parse(Round, received.payload))
            if received.topic == self._topics.ack(self._device.name):
                return AckSeen(parse(Ack, received.payload))
            if received.topic == self._topics.status(self._device.name):
                return SelfSeen(parse(DeviceStatus, received.payload))
            return self._global_chunk(received)
        except MessageError as error:
            console.print(f"dropped a message on {received.topic}: {error}")
            return None

    def _global_chunk(self, received: Received) -> Event | None:
        sha256 = self._topics.globals_of(received.topic)
        if sha256 not in self._fetching:  # amqtt sends a new client what is retained for any other
            return None
        self._bytes_down += len(received.payload)
        blob = self._fetching[sha256].add(received.payload)
        if blob is None:
            return None
        if blob_hash(blob) != sha256:
            raise MessageError(f"the blob under {sha256[:12]}… has another SHA-256")
        self._forget(sha256)
        while True:
            try:
                self._device.store.keep_global(blob)
            except OSError as error:
                self._wait_for_disk(error)
            else:
                self._disk_seconds = 0.0
                return GlobalArrived(sha256)

    def _forget(self, sha256: str) -> None:
        self._link.unsubscribe(self._topics.globals_chunk(sha256, "+"))
        del self._fetching[sha256]

    def _wait_for_disk(self, error: OSError) -> None:
        """What could not be written is tried anew after this; nothing of it has been sent. Says so when it begins, and
        frees what can be made or fetched again."""
        first, longest = DISK_SECONDS
        if not self._disk_seconds:
            where = f"--state {self._device.store.root}"
            console.print(f"{where} does not take what has to be kept ({error}); it is tried again until there is room")
        with contextlib.suppress(OSError):  # a disk that has become read-only, which somebody may mend
            self._device.cache.give_way()
            self._device.store.drop_globals(keep=wanted(self._state.announced))
        time.sleep(self._disk_seconds)
        self._disk_seconds = min(max(2 * self._disk_seconds, first), longest)

    def _carry_out(self, command: Command) -> Event | None:
        if isinstance(command, Fetch):
            if self._device.store.global_blob(command.sha256) is not None:
                return GlobalArrived(command.sha256)
            for sha256 in self._fetching.keys() - wanted(self._state.announced):
                self._forget(sha256)
            bundle = self._device.bundle
            cap_bytes = blob_bytes(max(bundle.expert.total, bundle.gate.total))
            self._fetching.setdefault(command.sha256, Assembler(cap_bytes))
            self._link.subscribe(self._topics.globals_chunk(command.sha256, "+"))
        elif isinstance(command, Work):
            return self._work(command.round)
        elif isinstance(command, Send):
            self._send(command.round)
        elif isinstance(command, Settle):
            self._settle(command.ack)
        elif isinstance(command, ShowSelf):
            self._announce()
        elif isinstance(command, Say):
            console.print(command.text)
        return None

    def _work(self, task: Round) -> WorkDone | WorkFailed:
        started = time.perf_counter()
        try:
            if self._device.store.enter(task.session):
                self._unanswered = Unanswered(self._device.name)
            self._device.store.drop_globals(keep=wanted(task))
            given = self._globals(task)
            outcome = STAGES[task.stage](self._device, task, given)
            keep_personal_model(self._device, task, given)
            # noise from the operating system's entropy: a server that knew the seed could subtract it
            rng = np.random.default_rng()
            outcome = prepare(self._device.bundle, self._device.store.residual, task, outcome, rng)
            self._device.cache.drop_unused()
            if task.stage is Stage.EVALUATE:
                write_personalized(self._device)
            seconds = time.perf_counter() - started
            bytes_down, self._bytes_down = self._bytes_down, 0
            update = header_of(
                self._device, task, outcome, seconds=seconds, peak_rss_mb=peak_rss_mb(), bytes_down=bytes_down
            )
            self._device.store.put_outbox(task.round, pack(update, outcome.tensors))
        except OSError as error:
            self._wait_for_disk(error)
            return WorkFailed(task.round)
        self._disk_seconds = 0.0
        console.print(f"round {task.round}: {task.stage.value} done in {seconds:.1f} s")
        return WorkDone(task.round)

    def _globals(self, task: Round) -> Globals:
        layout = self._device.bundle.expert
        expert, start = (self._vector(sha256, layout.join) for sha256 in (task.expert, task.start))
        return Globals(expert, start, self._vector(task.gate, self._device.bundle.gate.join))

    def _vector(self, sha256: str, join: Callable[[Tensors], Vector]) -> Vector:
        if not sha256:
            return np.empty(0, np.float32)
        blob = self._device.store.global_blob(sha256)
        if blob is None:
            raise RunError(
                f"the global blob {sha256[:12]}… has gone or changed on the disk; start again to fetch it anew"
            )
        _, tensors = unpack(blob, GlobalsHeader)
        return join(tensors)

    def _send(self, round_: int) -> None:
        """Unless it is being sent anyway: what paho has not delivered yet survives a reconnection in its queue."""
        if not self._connected or self._unanswered.on_its_way(round_):
            return
        blob = self._device.store.update(round_)
        if blob is not None:
            topics, name = self._topics, self._device.name
            sent = [self._publish(topics.update_chunk(name, round_, i), chunk) for i, chunk in enumerate(chunks(blob))]
            self._unanswered.sent(round_, sent[-1])

    def _settle(self, ack: Ack) -> None:
        self._unanswered.settled(ack.round)
        try:
            self._device.store.settle(ack.round)
        except OSError as error:  # no harm: after a restart it is sent once more, and answered once more
            console.print(f"the update of round {ack.round} is kept, though acknowledged ({error})")
        if ack.verdict is not Verdict.ACCEPTED:
            console.print(f"update of round {ack.round}: {ack.verdict.value} {ack.reason}")

    def _announce(self, online: bool = True, error: str = "") -> None:
        status = status_of(self._device, online, error)
        self._publish(self._topics.status(status.device), encode(status), retain=True)

    def _publish(self, topic: str, payload: bytes, retain: bool = False) -> paho.MQTTMessageInfo:
        self._last = self._link.publish(topic, payload, retain)
        return self._last
