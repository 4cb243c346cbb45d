"""The shell around the daemon: MQTT, disk, and the computation itself, which runs between two looks at the queue."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

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
    Reconnected,
    RoundSeen,
    Send,
    ServerSeen,
    Settle,
    State,
    Work,
    WorkDone,
    advance,
    wanted,
)
from edge_runtime.device import Device
from edge_runtime.evaluation import evaluate, train_alone
from edge_runtime.features import Report
from edge_runtime.memory import peak_rss_mb
from edge_runtime.personal import train_personal
from edge_runtime.stages import Globals, Outcome, statistics, train_global
from edge_runtime.stages import Work as StageWork
from edge_runtime.updates import prepare
from protocol.errors import FedFMSLError, MessageError, RunError
from protocol.layout import Vector
from protocol.messages import (
    Ack,
    DeviceStatus,
    Progress,
    Round,
    ServerStatus,
    Stage,
    Update,
    Verdict,
    encode,
    parse,
)
from protocol.messages import Globals as GlobalsHeader
from protocol.tensors import Assembler, Tensors, blob_bytes, blob_hash, chunks, pack, unpack
from protocol.topics import Topics
from shell.cli import console
from shell.link import Connected, Link, Received, Will

STAGES: dict[Stage, StageWork] = {
    Stage.STATISTICS: statistics,
    Stage.GLOBAL: train_global,
    Stage.PERSONAL: train_personal,
    Stage.BASELINE: train_alone,
    Stage.EVALUATE: evaluate,
}
PROGRESS_SECONDS = 0.5
LOOK_SECONDS = 1.0


def device_link(broker: str, topics: Topics, name: str, identity: Path | None = None, insecure: bool = False) -> Link:
    """A device's persistent link, with the last will that says it is gone."""
    will = Will(topics.status(name), encode(DeviceStatus(device=name, online=False)))
    return Link(broker, f"fedfmsl-{topics.run}-{name}", will, True, identity, insecure)


def progress_to(link: Link, topics: Topics, name: str) -> Report:
    """Tells whoever watches how far a computation is, now and then."""
    last = 0.0

    def report(activity: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last > PROGRESS_SECONDS:
            last = now
            progress = Progress(device=name, activity=activity, done=done, total=total)
            link.publish(topics.progress(name), encode(progress), qos=0)

    return report


def write_personalized(device: Device) -> None:
    """In a process of its own: it needs the onnx package, which the daemon has no memory to spare for.

    Raises RunError if that process fails.
    """
    command = [sys.executable, "-m", "edge_runtime", "personalize"]
    command += ["--bundle", str(device.bundle.root), "--state", str(device.store.root)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RunError(f"the personalized model could not be written: {result.stderr.strip()}")


class Service:
    def __init__(self, device: Device, run: str, link: Link) -> None:
        self._device = device
        self._run = run
        self._topics = Topics(run)
        self._link = link
        self._bytes_down = 0
        self._assemblers: dict[str, Assembler] = {}  # of the globals that were asked for
        self._last: paho.MQTTMessageInfo | None = None

    def serve(self) -> None:
        """Until the run has finished. Raises FedFMSLError if this device cannot take part."""
        topics, name = self._topics, self._device.name
        session = self._device.store.session
        outbox = self._device.store.outbox(session)
        state = State(bundle=self._device.bundle.sha256, session=session, unsettled=frozenset(outbox))
        self._link.subscribe(topics.ack(name))
        self._link.subscribe(topics.server_status)
        self._link.subscribe(topics.round)
        self._announce()
        try:
            self._follow(state, [Send(round_) for round_ in sorted(outbox)])
            self._announce(online=False)
        except FedFMSLError as error:
            self._announce(online=False, error=str(error))
            raise
        finally:
            self._link.close(self._last)

    def _follow(self, state: State, commands: Sequence[Command]) -> None:
        """Events in, commands out, until one of them is to leave."""
        wait = 0.0
        while True:
            todo = deque(commands)
            while todo:
                command = todo.popleft()
                if isinstance(command, Leave):
                    if command.error:
                        raise RunError(command.error)
                    return
                result = self._carry_out(command)
                if result is not None:
                    state, more = advance(state, result)
                    todo.extend(more)
            event = self._event(wait)
            wait = 0.0 if event else LOOK_SECONDS
            state, commands = advance(state, event or Idle())

    def _event(self, timeout: float) -> Event | None:
        received = self._link.next_event(timeout)
        if isinstance(received, Connected):
            self._announce()
            return Reconnected()
        if not isinstance(received, Received) or not received.payload:
            return None
        try:
            if received.topic == self._topics.server_status:
                return ServerSeen(parse(ServerStatus, received.payload))
            if received.topic == self._topics.round:
                return RoundSeen(parse(Round, received.payload))
            if received.topic == self._topics.ack(self._device.name):
                return AckSeen(parse(Ack, received.payload))
            return self._global_chunk(received)
        except MessageError as error:
            console.print(f"dropped a message on {received.topic}: {error}")
            return None

    def _global_chunk(self, received: Received) -> Event | None:
        sha256 = self._topics.globals_of(received.topic)
        if sha256 not in self._assemblers:  # amqtt sends a new client what is retained for any other
            return None
        self._bytes_down += len(received.payload)
        blob = self._assemblers[sha256].add(received.payload)
        if blob is None:
            return None
        if blob_hash(blob) != sha256:
            raise MessageError(f"the blob under {sha256[:12]}… has another SHA-256")
        self._link.unsubscribe(self._topics.globals_chunk(sha256, "+"))
        del self._assemblers[sha256]
        self._device.store.keep_global(blob)
        return GlobalArrived(sha256)

    def _carry_out(self, command: Command) -> Event | None:
        if isinstance(command, Fetch):
            if self._device.store.global_blob(command.sha256) is not None:
                return GlobalArrived(command.sha256)
            bundle = self._device.bundle
            cap_bytes = blob_bytes(max(bundle.expert.total, bundle.gate.total))
            self._assemblers.setdefault(command.sha256, Assembler(cap_bytes))
            self._link.subscribe(self._topics.globals_chunk(command.sha256, "+"))
        elif isinstance(command, Work):
            return self._work(command.round)
        elif isinstance(command, Send):
            self._send(command.round)
        elif isinstance(command, Settle):
            self._device.store.drop_outbox(command.ack.round)
            if command.ack.verdict is not Verdict.ACCEPTED:
                console.print(f"update of round {command.ack.round}: {command.ack.verdict.value} {command.ack.reason}")
        return None

    def _work(self, task: Round) -> WorkDone:
        started = time.perf_counter()
        self._device.store.enter(task.session)
        self._device.store.drop_globals(keep=wanted(task))
        outcome = STAGES[task.stage](self._device, task, self._globals(task))
        # noise from the operating system's entropy: a server that knew the seed could subtract it
        rng = np.random.default_rng()
        outcome = prepare(self._device.bundle, self._device.store.residual, task, outcome, rng)
        self._device.cache.drop_unused()
        if task.stage is Stage.EVALUATE:
            write_personalized(self._device)
        seconds = time.perf_counter() - started
        update = self._update(task, outcome, seconds)
        self._device.store.put_outbox(task.round, pack(update, outcome.tensors))
        console.print(f"round {task.round}: {task.stage.value} done in {seconds:.1f} s")
        return WorkDone(task.round)

    def _update(self, task: Round, outcome: Outcome, seconds: float) -> Update:
        bytes_down, self._bytes_down = self._bytes_down, 0
        return Update(
            run=self._run,
            session=task.session,
            round=task.round,
            device=self._device.name,
            stage=task.stage,
            level=outcome.level,
            samples=outcome.samples,
            metrics=dict(outcome.metrics),
            counts=dict(outcome.counts),
            engine=self._device.engine.name,
            seconds=seconds,
            peak_rss_mb=peak_rss_mb(),
            bytes_down=bytes_down,
        )

    def _globals(self, task: Round) -> Globals:
        layout = self._device.bundle.expert
        expert, start = (self._vector(sha256, layout.join) for sha256 in (task.expert, task.start))
        return Globals(expert, start, self._vector(task.gate, self._device.bundle.gate.join))

    def _vector(self, sha256: str, join: Callable[[Tensors], Vector]) -> Vector:
        blob = self._device.store.global_blob(sha256) if sha256 else None
        if blob is None:
            return np.empty(0, np.float32)
        _, tensors = unpack(blob, GlobalsHeader)
        return join(tensors)

    def _send(self, round_: int) -> None:
        store = self._device.store
        blob = store.outbox(store.session).get(round_)
        if blob is not None:
            for index, chunk in enumerate(chunks(blob)):
                self._publish(self._topics.update_chunk(self._device.name, round_, index), chunk)

    def _announce(self, online: bool = True, error: str = "") -> None:
        device, slices = self._device, self._device.scanned
        status = DeviceStatus(
            device=device.name,
            online=online,
            bundle=device.bundle.sha256,
            level_cap=device.level_cap,
            train=len(slices.train),
            held_out=len(slices.held_out),
            test=len(slices.test),
            error=error,
        )
        self._publish(self._topics.status(device.name), encode(status), retain=True)

    def _publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self._last = self._link.publish(topic, payload, retain)
