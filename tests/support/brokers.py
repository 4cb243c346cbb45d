"""Real brokers that can be killed and started again on the same port."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from support.network_space import NetworkSpace
from support.processes import Process, Processes, answers, broker_command, free_port, wait_until
from support.tools import find_tool, require_tool

KINDS = ("amqtt", "mosquitto")


class RestartableBroker:
    """A broker that can be used as a `processes.Broker`. It is started when its address is first asked for, so that a
    test that is skipped starts none.

    A persistent mosquitto keeps sessions, queued and retained messages over a restart: all of them after `stop`, and
    after `kill` those of its last save, which happens after every `autosave` changes. amqtt keeps nothing.
    """

    def __init__(
        self,
        processes: Processes,
        folder: Path,
        kind: str = "mosquitto",
        persistent: bool = False,
        autosave: int = 1,
        lines: Sequence[str] = ("allow_anonymous true", "max_queued_messages 0"),
        network: NetworkSpace | None = None,
    ) -> None:
        """`lines` of mosquitto's configuration. `network`: where a mosquitto runs; by default on this host."""
        assert not (persistent and kind == "amqtt"), "amqtt keeps nothing"
        self.kind = kind
        self._port = free_port()
        self.host = network.address if network else "127.0.0.1"
        self._processes = processes
        self._starts = 0
        self._process: Process
        self._command = broker_command(kind, self._port)
        if kind == "mosquitto":
            settings = folder / "mosquitto"
            settings.mkdir(parents=True, exist_ok=True)
            lines = [f"listener {self._port} {self.host}", *lines]
            if persistent:
                lines += ["persistence true", f"persistence_location {settings}/"]
                lines += ["autosave_on_changes true", f"autosave_interval {autosave}"]
            if os.geteuid() == 0:
                lines += ["user root"]  # mosquitto would change to another user, which may not write here
            (settings / "mosquitto.conf").write_text("\n".join(lines) + "\n")
            self._command = [require_tool("mosquitto"), "-c", str(settings / "mosquitto.conf")]
        self._command = [*(network.command if network else ()), *self._command]

    @property
    def port(self) -> int:
        if not self._starts:
            self.start()
        return self._port

    @property
    def url(self) -> str:
        return f"mqtt://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Returns when it accepts connections."""
        self._starts += 1
        process = self._processes.start(f"broker-{self.kind}-{self._starts}", *self._command)
        wait_until(lambda: answers(self._port, self.host) or not process.running, f"{self.kind} on port {self._port}")
        assert process.running, process.wait().stderr
        self._process = process

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def stop(self) -> None:
        """SIGTERM, and waits for the exit."""
        self._process.end()

    def pause(self) -> None:
        self._process.pause()

    def resume(self) -> None:
        self._process.resume()


def versions() -> str:
    """Versions of both kinds, for the table."""
    text = ""
    mosquitto = find_tool("mosquitto")
    if mosquitto:
        text = subprocess.run([mosquitto, "-h"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"mosquitto version (\S+)", text)
    return f"mosquitto {found[1] if found else 'not installed'}, amqtt {version('amqtt')}"
