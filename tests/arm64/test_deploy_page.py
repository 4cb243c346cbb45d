"""The section "Put it on a Raspberry Pi" of docs/deploy.md, word for word on the emulated board.

The board has no systemd: the test starts the unit's command itself."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest
from support.arm64.board import Board
from support.arm64.wheels import LOCK, REPOSITORY
from support.bundles import Built
from support.processes import Broker, Federation, Process, Processes, free_port, wait_until
from support.provisioned_fleet import Fleet, provision, start_fleet
from support.samples import write_device_photos

from fedfmsl.protocol.messages import Health, Stage, parse

SECTION = "Put it on a Raspberry Pi"
RUN, DEVICE, HOST = "orchard", "kitchen", "fleet.example"
HOME = "/home/pi"
TIMEOUT = 600.0  # seconds
PIP_CONF = """\
[global]
no-index = true
find-links = /var/cache/wheels
[install]
no-compile = true
"""


def blocks_of(section: str) -> list[str]:
    """The code blocks of a section of docs/deploy.md."""
    text = (REPOSITORY / "docs" / "deploy.md").read_text()
    found = re.search(rf"^(#+) {re.escape(section)}\n(.*?)(?=^#{{1,6}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"docs/deploy.md has no section {section!r}"
    return re.findall(r"^```\w*\n(.*?)^```", found[2], re.DOTALL | re.MULTILINE)


@pytest.fixture
def pi(base: Board, wheel: Path, wheels: Path, tmp_path: Path) -> Board:
    """A new board with the files that the section copies to it. Its pip finds the wheels on its disk."""
    board = base.copy(tmp_path / "root")
    shutil.copy(wheel, board.path(HOME))
    shutil.copy(LOCK, board.path(HOME))
    shutil.copytree(wheels, board.path("/var/cache/wheels"))
    board.path("/etc/pip.conf").write_text(PIP_CONF)
    with board.path("/etc/hosts").open("a") as hosts:
        hosts.write(f"127.0.0.1 {HOST}\n")
    write_device_photos(board.path(f"{HOME}/photos"), {"apple": 6, "kiwi": 6}, seed=1)
    return board


@pytest.fixture
def fleet(processes: Processes, tmp_path: Path) -> Fleet:
    pki = tmp_path / "pki"
    provision(pki, "--host", HOST, "--host", "localhost", "--host", "127.0.0.1")
    started = start_fleet(pki, processes)
    provision(pki, DEVICE, "--run", RUN, "--broker", f"mqtts://{HOST}:{started.port}")
    return started


class Booted:
    """Starts a unit as systemd does: state folder, user, command, and notification socket."""

    def __init__(self, board: Board, unit: str, processes: Processes) -> None:
        parser = configparser.RawConfigParser(strict=False)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read_string(board.path(unit).read_text())
        service = parser["Service"]
        user, state = service["User"], f"/var/lib/{service['StateDirectory']}"
        board.run("install", "--directory", "--mode", service["StateDirectoryMode"], "--owner", user, state)
        self._health = board.path(state) / "health.json"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(board.path("/run/notify")))
        board.path("/run/notify").chmod(0o666)
        as_user = ("setpriv", f"--reuid={user}", f"--regid={service['Group']}", "--init-groups", "--no-new-privs")
        command = board.command(*as_user, *shlex.split(service["ExecStart"]), NOTIFY_SOCKET="/run/notify", HOME=state)
        self.process: Process = processes.start(DEVICE, *command)

    def health(self) -> Health:
        return parse(Health, self._health.read_bytes())

    def wait_until_ready(self) -> None:
        self._socket.settimeout(TIMEOUT)
        while b"READY=1" not in self._socket.recv(4096).split(b"\n"):
            pass


def test_the_deploy_page_puts_a_device_on_a_raspberry_pi(
    pi: Board, fleet: Fleet, vit: Built, processes: Processes, tmp_path: Path
) -> None:
    """From a new system to a device whose status shows that it takes part in a run."""
    _on_the_server, install, *after = blocks_of(SECTION)
    shutil.copy(fleet.device(DEVICE), pi.path(HOME))
    output = pi.run("bash", "-euc", f"cd {HOME}\n{install}", HOME=HOME)
    assert "installed /etc/systemd/system/fedfmsl.service" in output
    pi.compile("/opt/fedfmsl")  # the board's pip does not compile, because that takes a minute there
    federation = Federation(
        RUN, Broker("mosquitto", fleet.url), vit.bundle.root, {DEVICE: tmp_path}, tmp_path, processes
    )
    serve = ("--serve", f"localhost:{free_port()}", "--identity", str(fleet.server))
    federation.start_server(*serve, "--stage1-rounds", "1000")
    booted = Booted(pi, "/etc/systemd/system/fedfmsl.service", processes)
    booted.wait_until_ready()
    wait_until(lambda: len(federation.rounds()) > 1, "its updates to close rounds", TIMEOUT)
    # a device writes its health when its activity changes, and every minute
    wait_until(lambda: booted.health().stage == Stage.GLOBAL.value, "its health of a round of stage 1", TIMEOUT)
    for commands in after:
        output = pi.run("bash", "-euc", f"cd {HOME}\n{commands}", HOME=HOME)
    assert booted.process.running
    assert re.search(rf"^device +{DEVICE} ", output, re.MULTILINE)
    assert re.search(r"^round +\d+ \(global\)", output, re.MULTILINE)
