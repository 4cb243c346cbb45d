"""The progress of a running trial, on the terminal. It reads the broker's messages and the server's records."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from devices.trial.charts import NAMES
from fedfmsl.common.cli import console
from fedfmsl.errors import MessageError, RunError
from fedfmsl.protocol.messages import DeviceStatus, Progress, Round, ServerStatus, Stage, parse
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received
from trainer_server.coordinator.records import ClosedRound, held_out_accuracies
from trainer_server.storage.run_store import RunStore

STAGES = {
    Stage.STATISTICS: "class means",
    Stage.GLOBAL: "stage 1, global expert",
    Stage.HEAD: "head of the global expert",
    Stage.PERSONAL: "stage 2, local experts and gate",
    Stage.BASELINE: "baseline, every device alone",
    Stage.EVALUATE: "evaluation on test samples",
    Stage.FINISHED: "finished",
    Stage.KEYS: "secure sums, keys",
    Stage.SHARES: "secure sums, shares",
    Stage.HOLDERS: "secure sums, holders of classes",
    Stage.UNMASK: "secure sums, removal of the masks",
}
LAST_NOTES = 3
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class DeviceRow:
    """The latest messages and totals of one device."""

    status: DeviceStatus | None = None
    progress: Progress | None = None
    held_out: dict[str, float] = field(default_factory=dict)  # by model, the latest of each
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass
class RunState:
    """The latest messages of the run, and its closed rounds."""

    topics: Topics
    server: ServerStatus | None = None
    round: Round | None = None
    rows: dict[str, DeviceRow] = field(default_factory=dict)
    held_out: list[Mapping[str, float]] = field(default_factory=list)  # of stages 1 and 2, by model
    notes: list[str] = field(default_factory=list)

    @property
    def announced(self) -> Round | None:
        """The current round. A round of an earlier session, retained by the broker, does not count."""
        is_current = self.server and self.round and self.server.session == self.round.session
        return self.round if is_current else None

    @property
    def finished(self) -> bool:
        return self.announced is not None and self.announced.stage is Stage.FINISHED

    def row(self, device: str) -> DeviceRow:
        return self.rows.setdefault(device, DeviceRow())

    def receive(self, topic: str, payload: bytes) -> None:
        """Raises MessageError, and changes nothing, if the message is not valid."""
        device = self.topics.device_of(topic)
        if topic == self.topics.server_status:
            self.server = parse(ServerStatus, payload)
        elif topic == self.topics.round:
            self.round = parse(Round, payload)
            for row in self.rows.values():
                row.progress = None
        elif device and topic == self.topics.status(device):
            status = parse(DeviceStatus, payload)
            self._receive_status(self.row(device), status)
        elif device and topic == self.topics.progress(device):
            progress = parse(Progress, payload)
            self.row(device).progress = progress

    @staticmethod
    def _receive_status(row: DeviceRow, status: DeviceStatus) -> None:
        if not status.online:
            row.progress = None
            if row.status:  # a last will has only the name
                status = row.status.model_copy(update={"online": False, "error": status.error})
        row.status = status

    def close(self, closed: ClosedRound) -> None:
        for device, update in closed.updates.items():
            row = self.row(device)
            row.held_out |= held_out_accuracies(update)
            row.bytes_up += closed.bytes_up.get(device, 0)
            row.bytes_down += update.bytes_down
        if closed.round.stage in (Stage.GLOBAL, Stage.PERSONAL) and not closed.repeated:
            self.held_out.append(closed.held_out)


class Tail:
    """The new lines of a growing text file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def lines(self) -> list[str]:
        """The complete lines since the last call."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()


class LiveView:
    """A table that is updated, on a terminal; otherwise one line for each closed round."""

    def __init__(
        self, broker: str, run: str, folder: Path, identity: Path | None = None, insecure: bool = False
    ) -> None:
        self._state = RunState(Topics(run))
        self._folder = folder
        self._last_round = 0  # the newest closed round in the view
        self._notes = Tail(folder / "notes.log")
        self._link = Link(broker, f"fedfmsl-view-{run}-{secrets.token_hex(4)}", identity=identity, insecure=insecure)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._started = time.monotonic()

    def __enter__(self) -> LiveView:
        """Raises BrokerError if the broker cannot be reached."""
        topics = self._state.topics
        self._link.connect()
        for topic in (topics.server_status, topics.round, topics.status("+"), topics.progress("+")):
            self._link.subscribe(topic)
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
        self._link.close()

    def refresh(self) -> None:
        """Receives new messages and records, and updates the view."""
        while event := self._link.next_event(0):
            if isinstance(event, Received):
                self._receive(event)
        for closed in self._closed():
            self._close(closed)
        self._state.notes = [*self._state.notes, *self._notes.lines()][-LAST_NOTES:]
        if self._live:
            self._live.update(render(self._state, time.monotonic() - self._started), refresh=True)

    def _receive(self, event: Received) -> None:
        try:
            self._state.receive(event.topic, event.payload)
        except MessageError as error:
            self._state.notes.append(f"unreadable message on {event.topic}: {error}")

    def _closed(self) -> list[ClosedRound]:
        try:
            store = RunStore(self._folder)
        except RunError:  # the server has not created the run yet
            return []
        try:
            return store.rounds(after=self._last_round)
        finally:
            store.close()

    def _close(self, closed: ClosedRound) -> None:
        self._last_round = closed.round.round
        self._state.close(closed)
        if not self._live:
            console.print(summary(closed), markup=False, highlight=False, soft_wrap=True)


def summary(closed: ClosedRound) -> str:
    """A closed round as one line."""
    round_ = closed.round
    parts = [f"round {round_.round}: {_step(round_)}", f"level {round_.level}"]
    parts += [f"{len(closed.updates)} updates in {closed.seconds:.1f} s"]
    held = closed.held_out
    parts += [f"held-out {NAMES[model]} {held[model]:.3f}" for model in NAMES if model in held]
    parts += [f"without {', '.join(closed.missing)}"] if closed.missing else []
    return ", ".join([*parts, "repeated"] if closed.repeated else parts)


def _step(round_: Round) -> str:
    number, of = round_.ordinal
    return f"{STAGES[round_.stage]}, {number} of {of}" if of > 1 else STAGES[round_.stage]


def render(state: RunState, elapsed: float) -> RenderableType:
    header = _header(state, elapsed)
    notes = [Text(note, style="dim", no_wrap=True, overflow="ellipsis") for note in state.notes]
    return Group(header, _devices(state), *_curves(state), *notes)


def _header(state: RunState, elapsed: float) -> Text:
    minutes, seconds = divmod(int(elapsed), 60)
    text = Text(state.topics.run, style="bold")
    if state.server and not state.server.online and not state.finished:
        text.append("  server offline", style="red")
    round_ = state.announced
    if round_ is None:
        text.append("  waiting for devices", style="not bold")
    elif state.finished:
        text.append("  finished", style="green")
    else:
        text.append(f"  round {round_.round}: {_step(round_)}, level {round_.level}", style="cyan not bold")
    return text.append(f"  {minutes}:{seconds:02}", style="dim not bold")


def _devices(state: RunState) -> Table:
    """One row per device, with the held-out accuracy of every model that a device has reported."""
    models = [model for model in NAMES if any(model in row.held_out for row in state.rows.values())]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for name in ("device", "", ""):
        table.add_column(name, no_wrap=True)
    names = ["train/\nheld-out/\ntest", "level\ncap", *(NAMES[model].replace(" ", "\n", 1) for model in models)]
    for name in (*names, "kB\nup", "kB\ndown"):
        table.add_column(name, justify="right", vertical="bottom")
    for name, row in sorted(state.rows.items()):
        table.add_row(
            Text(name),
            *_activity(row, state.finished),
            f"{row.status.train}/{row.status.held_out}/{row.status.test}" if row.status else "",
            str(row.status.level_cap) if row.status else "",
            *(f"{row.held_out[model]:.2f}" if model in row.held_out else "" for model in models),
            f"{row.bytes_up / 1000:.0f}",
            f"{row.bytes_down / 1000:.0f}",
        )
    return table


def _activity(row: DeviceRow, finished: bool) -> tuple[RenderableType, RenderableType]:
    """A device's activity, and its progress bar."""
    if row.status and row.status.error:
        return Text("error", style="red"), ""
    if finished:
        return Text("done", style="green"), ""
    if row.progress:
        return Text(row.progress.activity), ProgressBar(max(row.progress.total, 1), row.progress.done, width=8)
    online = row.status and row.status.online
    return Text("waiting", style="dim") if online else Text("offline", style="red"), ""


def _curves(state: RunState) -> list[Text]:
    """First, all and last held-out accuracies of the models of stage 1 and stage 2."""
    curves = {model: [held[model] for held in state.held_out if model in held] for model in ("global", "mofm")}
    return [
        Text(f"held-out {NAMES[model]:8}").append(f"{values[0]:.3f} {_spark(values)} {values[-1]:.3f}", style="green")
        for model, values in curves.items()
        if values
    ]


def _spark(values: list[float]) -> str:
    least, most = min(values), max(values)
    reach = max(most - least, 0.1)  # so that noise looks flat
    return "".join(BARS[round((value - least) / reach * (len(BARS) - 1))] for value in values)
