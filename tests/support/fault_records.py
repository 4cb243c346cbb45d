"""The tries of the fault tests, kept in a file while `make faults` runs, so that the same command continues it.

One line of JSON for each finished test, in a folder that git ignores. The file is named after the last commit that
changed the product, so tries of different code are never mixed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from support.run_oracle import Findings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".faults"
PRODUCT = ("fedfmsl", "edge_runtime", "trainer_server", "devices", "benchmarks/*.py")
COUNTS = ("lost", "double", "repeated", "recomputed", "compared")


@dataclass
class Row:
    """A test's row of the table. The test sets `name` before its first fault. `seconds`: of each fault, until the fleet
    had recovered (see `support.recovery`). `counts`: of the run's oracle; empty if the test has no run."""

    name: str = ""
    seconds: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, findings: Findings) -> None:
        """Asserts that no update is lost or counted twice, and that no round misses a device."""
        for name in COUNTS:
            self.counts[name] = self.counts.get(name, 0) + getattr(findings, name)
        assert (findings.lost, findings.double, findings.repeated, findings.missing) == (0, 0, 0, {}), findings


@dataclass(frozen=True)
class Record:
    """A finished test. `failure`: the error's text; empty if it passed. `logs`: folder with the logs of its processes.
    `load`: average number of processes at work in its last minute."""

    test: str
    row: Row
    failure: str = ""
    logs: str = ""
    load: float = 0.0


def product_commit() -> str:
    """The last commit that changed the product. Ends in + if the product's files have other changes."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("log", "-1", "--format=%h", "--", *PRODUCT) or "unknown"
    return commit + ("+" if git("status", "--porcelain", "--", *PRODUCT) else "")


class Records:
    def __init__(self, commit: str, folder: Path = FOLDER) -> None:
        self.commit = commit
        self._file = folder / f"{commit}.jsonl"
        self._logs = folder / f"{commit}-logs"

    def __iter__(self) -> Iterator[Record]:
        if self._file.is_file():
            for line in self._file.read_text().splitlines():
                values = json.loads(line)
                yield Record(**{**values, "row": Row(**values["row"])})

    def append(self, test: str, row: Row, failure: str, logs: Path | None) -> None:
        """Keeps the logs of a test that failed. Several processes may append at the same time."""
        kept = ""
        if failure and logs is not None and logs.is_dir():
            target = self._logs / "".join(each if each.isalnum() else "-" for each in test.partition("::")[2])
            shutil.copytree(logs, target, dirs_exist_ok=True)
            kept = str(target.relative_to(self._file.parent.parent))
        record = Record(test, row, failure, kept, os.getloadavg()[0])
        self._file.parent.mkdir(exist_ok=True)
        with self._file.open("ab", buffering=0) as file:
            file.write(json.dumps(asdict(record)).encode() + b"\n")
