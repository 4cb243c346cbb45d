"""The record of a run's closed rounds, as the server writes it: one line of rounds.jsonl each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from protocol.errors import MessageError, RunError
from protocol.messages import Message, Round, Stage, Update, parse


class ClosedRound(Message):
    """A line of rounds.jsonl (see `trainer_server.service`)."""

    max_bytes = 1 << 26  # it grows with the number of devices

    round: Round
    seconds: float
    updates: dict[str, Update]
    bytes_up: dict[str, int]
    missing: tuple[str, ...]
    repeated: bool

    @property
    def held_out(self) -> dict[str, float]:
        """The devices' held-out accuracies by model, sample-weighted."""
        metrics = sorted({name for update in self.updates.values() for name in update.metrics})
        means = {_model(name): self.mean(name) for name in metrics if name.startswith("held_out_")}
        return {name: value for name, value in means.items() if value is not None}

    def mean(self, metric: str) -> float | None:
        """Over the devices that report it, weighted by their samples."""
        pairs = [(u.metrics[metric], u.samples) for u in self.updates.values() if metric in u.metrics]
        total = sum(samples for _, samples in pairs)
        return sum(value * samples for value, samples in pairs) / total if total else None


def held_out_of(update: Update) -> dict[str, float]:
    """One device's held-out accuracies by model."""
    return {_model(name): value for name, value in update.metrics.items() if name.startswith("held_out_")}


def parse_round(line: str) -> ClosedRound:
    """Raises MessageError if it is not a record of a closed round."""
    return parse(ClosedRound, line.encode())


def read_rounds(folder: Path) -> list[ClosedRound]:
    """Raises RunError if the run has left no readable record."""
    path = folder / "rounds.jsonl"
    try:
        return [parse_round(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise RunError(f"{path} cannot be read, so there is nothing to report ({error.strerror})") from error
    except MessageError as error:
        raise RunError(f"{path} is damaged: {error}") from error


def counted(rounds: Sequence[ClosedRound], stage: Stage) -> list[ClosedRound]:
    """The stage's rounds that led to something, in order: of a repeated round only the last."""
    by_index = {r.round.index: r for r in rounds if r.round.stage is stage and not r.repeated}
    return [by_index[index] for index in sorted(by_index)]


def _model(metric: str) -> str:
    """held_out_local → local_expert: metrics and report name that model differently."""
    name = metric.removeprefix("held_out_")
    return "local_expert" if name == "local" else name
