"""A snapshot as values for the templates. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar

from fedfmsl.protocol.class_names import joined_names
from fedfmsl.protocol.messages import Activity, Round, Stage
from trainer_server.console.snapshot import Snapshot
from trainer_server.coordinator.privacy_budget import NoisedRounds, privacy_budget
from trainer_server.coordinator.proposals import Proposal, proposals
from trainer_server.coordinator.records import ClosedRound, RoundSummary
from trainer_server.storage.observations import DeviceView

PER_PAGE = 100  # rows of a table
SHOWN_MISSING = 20
STAGES = {
    Stage.STATISTICS: "class means",
    Stage.GLOBAL: "stage 1, global expert",
    Stage.HEAD: "head of the global expert",
    Stage.CANARY: "canary, some devices measure the global expert",
    Stage.PERSONAL: "stage 2, local experts and gate",
    Stage.BASELINE: "baseline, every device alone",
    Stage.EVALUATE: "evaluation on test samples",
    Stage.FINISHED: "finished",
    Stage.KEYS: "secure sums, keys",
    Stage.SHARES: "secure sums, shares",
    Stage.HOLDERS: "secure sums, holders of classes",
    Stage.UNMASK: "secure sums, removal of the masks",
}
HELD_OUT = {  # metric → line of the chart of accuracies
    "held_out_global": "global",
    "held_out_mofm": "MoFM",
    "held_out_local": "local expert",
    "held_out_novel": "MoFM, novel",
}
MEASURED = (Stage.GLOBAL, Stage.PERSONAL)  # stages whose rounds the charts show

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A device in the table. `state`: one of STATES, `why`: the reason, `when`: the last heartbeat in unix seconds."""

    name: str
    state: str
    why: str
    when: float
    doing: str
    level_cap: int
    board: str
    temperature: float | None
    train: int
    held_out: int
    test: int
    skipped: int
    took_part: str
    refused: str
    excluded: bool


STATES = {
    "online": "good",
    "paused": "warn",
    "left out": "warn",
    "excluded": "warn",
    "offline": "bad",
    "error": "bad",
    "run ended": "muted",
}


@dataclass(frozen=True)
class Page:
    """Part of a long table."""

    number: int
    count: int
    total: int


def step(announced: Round | RoundSummary) -> str:
    """A round's stage, and its number within the stage."""
    text = STAGES[announced.stage]
    number, of = announced.ordinal
    return f"{text}, round {number} of {of}" if of > 1 else text


def moment(seconds: float) -> str:
    """Unix seconds for <time datetime>."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def state_of(snapshot: Snapshot) -> tuple[str, str]:
    """Where the run stands in a word, and its colour."""
    if snapshot.ended == "finished":
        return "finished", "good"
    if snapshot.ended is not None:
        return "failed", "bad"
    if not snapshot.is_running:
        return "no server", "bad"
    if snapshot.server and snapshot.server.paused:
        return "paused", "warn"
    if snapshot.server and snapshot.server.rests:
        return "rests", "muted"
    if snapshot.server and snapshot.server.waits:
        return "waiting for devices", "bad"
    return ("waiting for devices", "warn") if snapshot.announced is None else ("running", "good")


def device_state(snapshot: Snapshot, name: str, view: DeviceView) -> tuple[str, str]:
    """A key of STATES, and the reason."""
    status = view.status
    if name in snapshot.excluded:
        return "excluded", "by the operator"
    if snapshot.ended is not None:  # nobody watches the devices any more
        return "run ended", ""
    if status is None or not status.online:
        error = status.error if status else ""
        return ("error", error) if error else ("offline", "")
    if status.error:
        return "error", status.error
    if status.paused:
        return "paused", status.paused
    if name in snapshot.left_out:
        return "left out", f"until round {snapshot.left_out[name]}: its updates were refused"
    if name in snapshot.silent:
        return "left out", f"of secure sums until round {snapshot.silent[name]}: it did not answer in one"
    return "online", ""


def missing(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Each device that the present round waits for, and why it has not answered."""
    found = []
    for name in snapshot.missing:
        view = snapshot.devices.get(name, DeviceView())
        state, why = device_state(snapshot, name, view)
        if state == "online":
            refused = snapshot.refusals.get(name, ())
            working = view.health is not None and view.health.activity is Activity.WORKING
            why = "is at work" if working else "is online and has not answered"
            why += f"; refused before: {refused[0].last}" if refused else ""
        else:
            why = f"{state}: {why}" if why else state
        found.append((name, why))
    return found


def proposed(snapshot: Snapshot) -> list[Proposal]:
    """The classes that devices propose, those of most devices first."""
    statuses = [view.status for view in snapshot.devices.values() if view.status is not None]
    return proposals(snapshot.classes, statuses, snapshot.excluded)


def names(snapshot: Snapshot, search: str = "", only: str = "") -> list[str]:
    """The devices in the order of their names: those whose names contain `search` and whose state is `only`."""
    wanted = search.casefold()
    found = [name for name in sorted(snapshot.devices) if wanted in name.casefold()]
    return [name for name in found if only in ("", device_state(snapshot, name, snapshot.devices[name])[0])]


def row(snapshot: Snapshot, name: str) -> Row:
    view = snapshot.devices[name]
    state, why = device_state(snapshot, name, view)
    status, health = view.status, view.health
    refusals = snapshot.refusals.get(name, ())
    doing = ""
    if health is not None and state in ("online", "paused"):
        doing = f"{health.activity.value}{f', round {health.round}' if health.round else ''}"
    return Row(
        name=name,
        state=state,
        why=why,
        when=view.heard,
        doing=doing,
        level_cap=status.level_cap if status else 0,
        board=", ".join(filter(None, (health.board, health.provider))) if health else "",
        temperature=health.temperature if health else None,
        train=status.train if status else 0,
        held_out=status.held_out if status else 0,
        test=status.test if status else 0,
        skipped=health.skipped if health else 0,
        took_part=f"{snapshot.took_part.get(name, 0)} of {snapshot.trained}",
        refused="; ".join(f"{each.kind} {each.count}×: {each.last}" for each in refusals),
        excluded=name in snapshot.excluded,
    )


def part(items: Sequence[T], wanted: int) -> tuple[Sequence[T], Page]:
    """The rows of page `wanted` (from 1) of a table, or of its last page."""
    count = max(-(-len(items) // PER_PAGE), 1)
    here = min(max(wanted, 1), count)
    return items[(here - 1) * PER_PAGE : here * PER_PAGE], Page(here, count, len(items))


def charts(snapshot: Snapshot) -> list[tuple[str, str, str]]:
    """Id, title and data of each chart, over the successful rounds of stages 1 and 2. Charts without values are left
    out."""
    shown = [summary for summary, _ in snapshot.closed if summary.stage in MEASURED and not summary.repeated]
    accuracies = {line: [each.means.get(metric) for each in shown] for metric, line in HELD_OUT.items()}
    candidates: list[tuple[str, str, Mapping[str, Sequence[float | None]], bool]] = [
        ("accuracy", "Held-out accuracy, mean of the devices", accuracies, True),
        (
            "participation",
            "Devices that answered",
            {"answered": [each.answered for each in shown], "missing": [each.missing for each in shown]},
            False,
        ),
        ("seconds", "Seconds that a round was open", {"seconds": [round(each.seconds, 1) for each in shown]}, False),
        (
            "bytes",
            "Megabytes of a round",
            {
                "up": [round(each.bytes_up / 1e6, 4) for each in shown],
                "down": [round(each.bytes_down / 1e6, 4) for each in shown],
            },
            False,
        ),
        ("gate", "Mean gate weight of the local expert", {"weight": _means(shown, "mean_local_weight")}, False),
    ]
    found = []
    for key, title, lines, is_share in candidates:
        drawn = {name: _rounded(values) for name, values in lines.items() if any(v is not None for v in values)}
        if drawn:
            data = {"x": [each.round for each in shown], "series": drawn, "percent": is_share}
            found.append((key, title, json.dumps(data, separators=(",", ":"))))
    return found


def _means(shown: Sequence[RoundSummary], metric: str) -> list[float | None]:
    return [each.means.get(metric) for each in shown]


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in values]


def last_mean(snapshot: Snapshot, *metrics: str) -> float | None:
    """The newest value of the first of these metrics that a closed round has."""
    for metric in metrics:
        for summary, _ in reversed(snapshot.closed):
            if metric in summary.means and not summary.repeated:
                return summary.means[metric]
    return None


def test_accuracy(snapshot: Snapshot) -> tuple[float | None, float | None]:
    """MoFM's accuracy on own test samples, and the estimate on novel classes, of the evaluation."""
    for summary, _ in reversed(snapshot.closed):
        if summary.stage is Stage.EVALUATE and not summary.repeated:
            return summary.means.get("mofm"), summary.means.get("mofm_novel_estimate")
    return None, None


def privacy_budgets(snapshot: Snapshot) -> list[tuple[str, float]]:
    """ε by observer, of a device that has answered all rounds; none without differential privacy."""
    if snapshot.origin.config.privacy is None:
        return []
    closed = NoisedRounds.of(snapshot.counts, snapshot.origin.spent_before)
    announced = None if snapshot.ended else snapshot.announced
    return list(privacy_budget(snapshot.origin.config, closed, announced, bool(snapshot.answered)).items())


def settings(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Name and value of each setting of the run as it is now, and the value at the start if it has changed."""
    start = dict(_flat(snapshot.origin.config.model_dump(mode="json", exclude_none=True)))
    limits = snapshot.limits.model_dump() if snapshot.limits else {}
    if snapshot.server and snapshot.server.round_timeout:
        limits["round_timeout"] = snapshot.server.round_timeout
    now = {**start, **{name.replace("_", " "): _value(value) for name, value in limits.items() if value is not None}}
    return [
        (name, value if value == start.get(name, value) else f"{value} (at the start {start[name]})")
        for name, value in now.items()
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}: ")
        else:
            yield name, _value(value)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_value, value)) or "none" if isinstance(value, list | tuple) else str(value)


def metrics_of(record: ClosedRound) -> list[str]:
    """The columns of a round's devices: the metrics that most of them report, at most ten."""
    summary = RoundSummary.of_record(record)
    return sorted(summary.means)[:10]


FILTERS: Mapping[str, Callable[..., str]] = {
    "line": joined_names,
    "moment": moment,
    "number": number,
    "percent": percent,
    "size": size,
    "step": step,
}
