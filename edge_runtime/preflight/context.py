"""The types of checks, and the values that earlier checks pass to later ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.settings import Settings
from fedfmsl.protocol.messages import ServerStatus
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle


@dataclass(frozen=True)
class Finding:
    """`code`: the exit code of a run that fails for this reason; 0 if a run can start. `warning`: it may fail or be
    slow."""

    name: str
    text: str
    code: int = 0
    warning: bool = False


@dataclass
class Context:
    """What earlier checks have found. `scratch`: a temporary directory. `config`: the file of the settings. `running`:
    the device's daemon runs. `task`: the run's, if its server is online. `largest`: the largest sample."""

    scratch: Path
    config: Path | None = None
    server: ServerStatus | None = None
    task: Task | None = None
    bundle: TaskBundle | None = None
    running: bool = False
    largest: Path | None = None


Check = Callable[[Settings, Context], Iterator[Finding]]


def format_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
