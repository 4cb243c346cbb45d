"""A network that loses packets or is slow: the broker runs in a network namespace at the end of a cable (veth)."""

from __future__ import annotations

import os
import subprocess
from types import TracebackType

from support.tools import not_tested, require_tool

QUEUE_BYTES = 16 * 1024  # what waits for a slow cable; more is dropped
BURST_BYTES = 8 * 1024


class NetworkSpace:
    """A context. `address` is the broker's; a process with the prefix `command` runs there. Needs root."""

    def __init__(self) -> None:
        number = os.getpid() % 16_384  # a network of four addresses in the range for tests of networks (RFC 2544)
        self.name, self._cable, self._inner = f"fault{number}", f"fa{number}", f"fb{number}"
        block = f"198.18.{number // 64}"
        self._here, self.address = (f"{block}.{number % 64 * 4 + offset}" for offset in (1, 2))
        self.command = (require_tool("ip"), "netns", "exec", self.name)

    def __enter__(self) -> NetworkSpace:
        if os.geteuid() != 0:
            not_tested("a network namespace of its own for the broker, which only root may make")
        self._delete()
        made = subprocess.run(["ip", "netns", "add", self.name], capture_output=True, text=True, check=False)
        if made.returncode:
            not_tested(f"no network namespace can be made here: {made.stderr.strip()}")
        run("ip", "link", "add", self._cable, "type", "veth", "peer", "name", self._inner, "netns", self.name)
        run("ip", "addr", "add", f"{self._here}/30", "dev", self._cable)
        run("ip", "link", "set", self._cable, "up")
        self._run("ip", "addr", "add", f"{self.address}/30", "dev", self._inner)
        self._run("ip", "link", "set", self._inner, "up")
        self._run("ip", "link", "set", "lo", "up")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._delete()

    def lose(self, share: float) -> None:
        """Drops a random share of the packets in each direction."""
        for chain in ("INPUT", "OUTPUT"):
            chosen = ("-m", "statistic", "--mode", "random", "--probability", str(share))
            self._run("iptables", "-A", chain, *chosen, "-j", "DROP")

    def limit(self, kilobits: int) -> None:
        """Kilobits per second in each direction, for all clients of the broker together."""
        bucket = ("rate", f"{kilobits}kbit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES))
        run("tc", "qdisc", "add", "dev", self._cable, "root", "tbf", *bucket)
        self._run("tc", "qdisc", "add", "dev", self._inner, "root", "tbf", *bucket)

    def repair(self) -> None:
        self._run("iptables", "-F")
        for command in ((), self.command):
            cable = self._inner if command else self._cable
            delete = [*command, "tc", "qdisc", "del", "dev", cable, "root"]
            subprocess.run(delete, capture_output=True, check=False)  # there may be none

    def _run(self, *command: str) -> None:
        run(*self.command, *command)

    def _delete(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self._cable], capture_output=True, check=False)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
