"""Real processes with their exit codes and output, and the messages of a run on a broker."""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from fedfmsl.errors import MessageError
from fedfmsl.protocol.chunks import MAX_BLOB_BYTES, Assembler
from fedfmsl.protocol.messages import (
    Ack,
    DeviceStatus,
    Health,
    Message,
    Prediction,
    Progress,
    Round,
    ServerStatus,
    parse,
)
from fedfmsl.protocol.topics import ROOT, Topics
from fedfmsl.transport.link import Link, Received
from support.tools import require_tool
from support.warm_python import Ended, WarmPython
from trainer_server.storage.run_store import RunStore

SECONDS = 90.0  # timeout of every wait, for a busy machine
RUN_SECONDS = 600.0  # timeout of a wait for the end of a run

# What most commands need. Without pyarrow, which starts a thread: a fork of a process with threads may hang.
IMPORTED = (
    "devices.provisioning.fleet",
    "devices.trial.evaluation",
    "devices.trial.report",
    "edge_runtime.daemon.launch",
    "edge_runtime.inference.stream",
    "edge_runtime.preflight",
    "simulation.federation",
    "simulation.report",
    "trainer_server.inspect",
)

M = TypeVar("M", bound=Message)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Polls a condition that no event announces. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s without: {what}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def answers(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def run_module(
    module: str, *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Ended:
    """`python -m module arguments` to its end."""
    if environment is None:
        return _warm_python().run(module, *arguments, cwd=cwd)
    with WarmPython(environment=environment) as python:
        return python.run(module, *arguments, cwd=cwd)


@cache
def _warm_python() -> WarmPython:
    """The one of this process."""
    python = WarmPython(*IMPORTED)
    atexit.register(python.close)
    return python


class Process:
    """A running process whose output goes to two files."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.with_suffix(".out").open("wb") as out, log.with_suffix(".err").open("wb") as err:
            self._popen = subprocess.Popen(
                command,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "COLUMNS": "1000", **(environment or {})},
            )

    @property
    def stdout(self) -> str:
        return self.log.with_suffix(".out").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.log.with_suffix(".err").read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def libraries(self) -> set[str]:
        """Names of the shared libraries it has in memory."""
        lines = Path(f"/proc/{self._popen.pid}/maps").read_text().splitlines()
        return {line.split()[-1] for line in lines if ".so" in line}

    def send_signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def pause(self) -> None:
        self.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        self._popen.kill()
        assert self._popen.wait(SECONDS) == -signal.SIGKILL

    def wait(self, seconds: float = SECONDS) -> Ended:
        try:
            code = self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            output = (self.stdout + self.stderr)[-500:]
            raise AssertionError(
                f"waited {seconds:.0f} s without success for {self.log.name} to end; output: {output}"
            ) from None
        return Ended(code, self.stdout, self.stderr)

    def end(self) -> None:
        if self.running:
            self.resume()
            self._popen.terminate()
            try:
                self._popen.wait(10)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()


def broker_command(kind: str, port: int) -> list[str]:
    """What starts an amqtt or a mosquitto with its default settings."""
    if kind == "mosquitto":
        return [require_tool("mosquitto"), "-p", str(port)]
    return [sys.executable, "-m", "devices.trial.broker", "--port", str(port)]


@dataclass(frozen=True)
class Broker:
    kind: str
    url: str


class Processes:
    """Starts processes, and ends all of them on exit."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self.started: dict[str, Process] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in reversed(self.started.values()):
            process.end()

    def start(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> Process:
        assert name not in self.started
        self.started[name] = Process(command, self._logs / name, environment)
        return self.started[name]

    def start_module(
        self,
        name: str,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = ("-m",),
    ) -> Process:
        """`python -m module arguments`, or with another `launcher` of modules than -m."""
        return self.start(name, sys.executable, *launcher, module, *arguments, environment=environment)

    def start_broker(self, kind: str = "amqtt") -> Broker:
        port = free_port()
        process = self.start(f"broker-{kind}", *broker_command(kind, port))
        wait_until(lambda: answers(port) or not process.running, f"{kind} on port {port}")
        assert process.running, process.wait().stderr
        return Broker(kind, f"mqtt://127.0.0.1:{port}")


class Observer:
    """Receives and keeps every message of a run. `unreadable` has the topics of invalid messages."""

    def __init__(self, broker: Broker, run: str) -> None:
        self._topics = Topics(run)
        self._link = Link(broker.url, f"observer-{secrets.token_hex(4)}")
        self._assemblers: dict[str, Assembler] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[Message] = []
        self.unreadable: list[str] = []
        self._link.connect()
        self._link.subscribe(f"{ROOT}/{run}/#")

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._link.close()

    def wait(
        self, kind: type[M], matches: Callable[[M], bool], what: str, since: int = 0, seconds: float = SECONDS
    ) -> M:
        """The first matching message after the first `since` messages. Waits for it."""
        end, checked = time.monotonic() + seconds, since
        while True:
            for message in self.seen[checked:]:
                if isinstance(message, kind) and matches(message):
                    return message
            checked = len(self.seen)
            left = end - time.monotonic()
            assert left > 0, f"waited {seconds:.0f} s without success for {what}; seen last: {self.seen[-3:]}"
            self._receive(left)

    def catch_up(self) -> int:
        """Receives what has arrived. Returns the number of messages so far, for `since`."""
        while self._receive(0):
            pass
        return len(self.seen)

    def _receive(self, seconds: float) -> bool:
        """False if no event has arrived."""
        event = self._link.next_event(seconds)
        if isinstance(event, Received) and event.payload:
            try:
                self.keep(event.topic, event.payload)
            except MessageError:
                self.unreadable.append(event.topic)
        return event is not None

    def keep(self, topic: str, payload: bytes) -> None:
        device, sha256 = self._topics.device_of(topic) or "nobody", self._topics.globals_of(topic)
        if topic == self._topics.server_status:
            self.seen.append(parse(ServerStatus, payload))
        elif topic == self._topics.round:
            self.seen.append(parse(Round, payload))
        elif topic == self._topics.status(device):
            self.seen.append(parse(DeviceStatus, payload))
        elif topic == self._topics.ack(device):
            self.seen.append(parse(Ack, payload))
        elif topic == self._topics.health(device):
            self.seen.append(parse(Health, payload))
        elif topic == self._topics.progress(device):
            self.seen.append(parse(Progress, payload))
        elif topic == self._topics.prediction(device):
            self.seen.append(parse(Prediction, payload))
        elif sha256 is not None:
            blob = self._assemblers.setdefault(sha256, Assembler(MAX_BLOB_BYTES)).add(payload)
            if blob is not None:
                self.blobs[sha256] = blob


@dataclass
class Federation:
    """A server and its devices, each in its own process, on one broker."""

    run: str
    broker: Broker
    bundle: Path
    photos: Mapping[str, Path]  # device → its folder of images
    folder: Path
    processes: Processes
    devices: dict[str, Process] = field(default_factory=dict)

    def state(self, device: str) -> Path:
        return self.folder / "devices" / device

    @property
    def server_folder(self) -> Path:
        return self.folder / "server"

    def rounds(self) -> list[dict[str, Any]]:
        """The server's records of closed rounds."""
        return [closed.model_dump(mode="json") for closed in RunStore(self.server_folder).rounds.all()]

    def start_server(self, *arguments: str, launcher: Sequence[str] = ("-m",)) -> Process:
        """May be called again after the server has ended: it resumes its run. The sums are plain unless the arguments
        say otherwise."""
        plain = [] if any(argument.startswith("--secure") for argument in arguments) else ["--no-secure-sums"]
        starts = sum(name.startswith("server") for name in self.processes.started)
        return self.processes.start_module(
            f"server-{starts}" if starts else "server",
            "trainer_server",
            *("start", "--run", self.run, "--bundle", str(self.bundle)),
            *("--broker", self.broker.url, "--out", str(self.server_folder), "--devices", str(len(self.photos))),
            *("--learning-rate", "0.01", "--local-learning-rate", "0.01", *plain, *arguments),
            launcher=launcher,
        )

    def start_device(
        self,
        device: str,
        *arguments: str,
        again: bool = False,
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = ("-m",),
    ) -> Process:
        """`again` reuses the state folder of the first start, and the name in it."""
        starts = sum(name == device or name.startswith(f"{device}-again") for name in self.processes.started)
        self.devices[device] = self.processes.start_module(
            f"{device}-again-{starts}" if again else device,
            "edge_runtime",
            *("run", "--run", self.run, "--images", str(self.photos[device])),
            *("--broker", self.broker.url, "--state", str(self.state(device)), "--threads", "1"),
            *([] if again else ["--device", device]),
            *arguments,
            environment=environment,
            launcher=launcher,
        )
        return self.devices[device]
