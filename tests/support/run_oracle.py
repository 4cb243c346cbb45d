"""Checks a finished run after a fault: is an update lost, counted twice, or counted with another value?

It reads the server's event log (--audit) and its records of rounds. The rounds are computed again from the log in two
ways: as the server does after a restart, and by a coordinator that gets the same updates in another order. Both must
announce the same rounds with the same hashes of globals. While no device is missing, the rounds must also equal those
of a run without the fault.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from fedfmsl.protocol.messages import Round
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import AnnounceRound, ClockTicked, UpdateSeen
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.state import Key, Plan, initial_state
from trainer_server.service.lifecycle import make_plan, open_bundle, replay_rounds, restore_state
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.run_store import RunStore

Outcome = tuple[str, int, int, str, str, str]
Undisturbed = Callable[[int, int], "Reference"]  # numbers of devices and of rounds of stage 1 → a run without a fault


@dataclass(frozen=True)
class Reference:
    """A run without a fault: its devices, and the outcomes of its rounds."""

    devices: frozenset[str]
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Findings:
    """`lost`: acknowledged updates that the server does not have. `double`: updates that it has twice, and rounds with
    another result. `missing`: devices without an update, by round. `recomputed`: rounds that were computed again, of
    which `compared` could be compared with an undisturbed run."""

    lost: int
    double: int
    repeated: int
    recomputed: int
    compared: int
    missing: dict[int, tuple[str, ...]]


def examine(out: Path, acknowledged: Iterable[Key], undisturbed: Reference) -> Findings:
    """Examines a finished run. `acknowledged`: updates that were acknowledged as accepted or duplicate."""
    store = RunStore(out)
    plan = make_plan(store, open_bundle(store))
    closed = store.rounds.all()
    times = Counter(_keys(store.events(since_checkpoint=False)))
    recorded = {(one.round.round, device) for one in closed for device in one.updates}
    announced = _announced(store, plan, closed)
    repeated_updates = sum(count - 1 for count in times.values()) + len(recorded ^ set(times))
    compared, different = _compare(closed, announced, undisturbed)
    for again in (replay_rounds(store, plan), undisturbed_by(plan, store.events(since_checkpoint=False))):
        different += sum(ours != theirs for ours, theirs in zip_longest(announced, again))
    return Findings(
        lost=len(set(acknowledged) - (recorded & set(times))),
        double=repeated_updates + different,
        repeated=sum(bool(one.repeated) for one in closed),
        recomputed=len(announced),
        compared=compared,
        missing={one.round.round: one.missing for one in closed if one.missing},
    )


def reference(out: Path) -> Reference:
    store = RunStore(out)
    closed = store.rounds.all()
    rounds = _announced(store, make_plan(store, open_bundle(store)), closed)
    return Reference(frozenset(closed[0].updates), [outcome(one) for one in rounds])


def outcome(announced: Round) -> Outcome:
    """The parts of an announced round that two runs with the same seed have in common."""
    place = (announced.stage.value, announced.index, announced.level)
    return (*place, announced.expert, announced.start, announced.gate)


def undisturbed_by(plan: Plan, events: Iterable[LoggedEvent]) -> Iterator[Round]:
    """The rounds of a coordinator without restarts that gets the same updates in another order."""
    state = initial_state(plan, 0.0)
    for logged in in_another_order(events, random.Random(0)):
        state, commands = advance(plan, state, logged.event, logged.at)
        yield from (command.round for command in commands if isinstance(command, AnnounceRound))


def in_another_order(events: Iterable[LoggedEvent], draw: random.Random) -> Iterator[LoggedEvent]:
    """Shuffles the updates of a round and moves them behind the other events of the round."""
    updates: list[LoggedEvent] = []
    for logged in events:
        if isinstance(logged.event, UpdateSeen):
            updates.append(logged)
            continue
        if isinstance(logged.event, ClockTicked):
            draw.shuffle(updates)
            yield from updates
            updates = []
        yield logged


def _keys(events: Iterable[LoggedEvent]) -> Iterator[Key]:
    for logged in events:
        if isinstance(logged.event, UpdateSeen):
            yield logged.event.update.round, logged.event.update.device


def _announced(store: RunStore, plan: Plan, closed: list[ClosedRound]) -> list[Round]:
    """Every round of a finished run. The last one is never closed, so it is read from the state."""
    last = restore_state(store, plan)[0].announced
    assert last is not None
    return [*(one.round for one in closed), last]


def _compare(closed: list[ClosedRound], announced: list[Round], undisturbed: Reference) -> tuple[int, int]:
    """The number of rounds that can be compared with an undisturbed run, and how many of these differ. After a round
    with a missing device the runs differ anyway; `undisturbed_by` alone checks the rounds after it."""
    repeated = {one.round.round for one in closed if one.repeated}
    everybody = {one.round.round for one in closed if set(one.updates) == undisturbed.devices}
    ours = [one for one in announced if one.round not in repeated]
    comparable = [all(before.round in everybody for before in ours[:index]) for index in range(len(ours))]
    pairs = zip(ours, undisturbed.outcomes, comparable, strict=True)
    return sum(comparable), sum(may and outcome(one) != other for one, other, may in pairs)
