"""The fault table of docs/reliability.md."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

BEGIN, END = "<!-- the fault table: begin -->", "<!-- the fault table: end -->"
COMMAND = ("tests/faults", "--full")
HEAD = (
    "| fault | times | lost updates | counted twice | repeated rounds | recomputed rounds | equal to a run without "
    "faults | seconds to recover, median | longest |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
COUNTS = ("lost", "double", "repeated", "recomputed", "compared")


@dataclass(frozen=True)
class Trial:
    """The findings of a run with a fault that happened `times` times: lost and double updates, repeated rounds, and
    rounds that were computed again and compared (see `run_oracle.Findings`). `recovery` is in seconds, None if the
    fault lasted until the end of the run; docs/reliability.md says when it starts and ends."""

    lost: int
    double: int
    repeated: int
    recomputed: int
    compared: int
    recovery: float | None
    times: int = 1


@dataclass
class FaultTable:
    trials: dict[str, list[Trial]] = field(default_factory=lambda: defaultdict(list))

    def add(self, fault: str, trial: Trial) -> None:
        self.trials[fault].append(trial)

    def markdown(self, versions: str) -> str:
        lines = [
            f"`python -m pytest {' '.join(COMMAND)}` on {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"{versions}.",
            "",
            HEAD,
        ]
        for fault, trials in self.trials.items():
            seconds = sorted(trial.recovery for trial in trials if trial.recovery is not None)
            spread = [f"{seconds[len(seconds) // 2]:.1f}", f"{seconds[-1]:.1f}"] if seconds else ["–", "–"]
            sums = [sum(getattr(trial, name) for trial in trials) for name in ("times", *COUNTS)]
            cells = [*sums, *spread]
            lines.append(f"| {fault} | {' | '.join(map(str, cells))} |")
        return "\n".join(lines)


def is_whole(arguments: Sequence[str]) -> bool:
    """Whether pytest runs all fault tests in their long form and nothing else."""
    return tuple(arguments) == COMMAND


def write(path: Path, table: str) -> None:
    """Replaces the text between the markers. A file without markers gets them at its end."""
    text = path.read_text() if path.is_file() else "# What happens when something fails\n\n"
    if BEGIN not in text:
        text += f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")
