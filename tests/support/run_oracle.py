"""The question after every fault: is anything lost, counted twice, or counted otherwise than it was sent?

It is asked of what the server has written down (--audit): its log of accepted updates, and its records of rounds. The
rounds are done over from the log in two ways: as the server would after a restart, and by a coordinator to which
nothing happens and which gets the same updates in another order. Each must announce every round as it was announced,
the hashes of its globals included; and as long as every device was heard, as a run without the fault has.
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
from trainer_server.storage.run_store import LoggedEvent, RunStore

Outcome = tuple[str, int, int, str, str, str]
Undisturbed = Callable[[int], "Reference"]  # number of devices → their run without a fault


@dataclass(frozen=True)
class Reference:
    """A run to which nothing has happened: its devices, and the outcomes of its rounds."""

    devices: frozenset[str]
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Findings:
    """`lost`: updates that a device was told are counted and that the server does not have. `double`: updates that it
    has twice, and rounds that come out otherwise. `missing`: by round, devices that it has not waited for any longer.
    `recomputed` rounds were done over, `compared` of them are an undisturbed run's too."""

    lost: int
    double: int
    repeated: int
    recomputed: int
    compared: int
    missing: dict[int, tuple[str, ...]]


def examine(out: Path, told: Iterable[Key], undisturbed: Reference) -> Findings:
    """A finished run. `told`: what devices were told is counted (accepted, now or before)."""
    store = RunStore(out)
    plan = make_plan(store, open_bundle(store))
    closed = store.rounds()
    times = Counter(_keys(store.events(since_checkpoint=False)))
    recorded = {(one.round.round, device) for one in closed for device in one.updates}
    announced = _announced(store, plan, closed)
    twice = sum(count - 1 for count in times.values()) + len(recorded ^ set(times))
    compared, otherwise = _compare(closed, announced, undisturbed)
    for again in (replay_rounds(store, plan), undisturbed_by(plan, store.events(since_checkpoint=False))):
        otherwise += sum(ours != theirs for ours, theirs in zip_longest(announced, again))
    return Findings(
        lost=len(set(told) - (recorded & set(times))),
        double=twice + otherwise,
        repeated=sum(bool(one.repeated) for one in closed),
        recomputed=len(announced),
        compared=compared,
        missing={one.round.round: one.missing for one in closed if one.missing},
    )


def reference(out: Path) -> Reference:
    store = RunStore(out)
    closed = store.rounds()
    rounds = _announced(store, make_plan(store, open_bundle(store)), closed)
    return Reference(frozenset(closed[0].updates), [outcome(one) for one in rounds])


def outcome(announced: Round) -> Outcome:
    """Where a run stands when a round opens, as far as another run may come to the same."""
    place = (announced.stage.value, announced.index, announced.level)
    return (*place, announced.expert, announced.start, announced.gate)


def undisturbed_by(plan: Plan, events: Iterable[LoggedEvent]) -> Iterator[Round]:
    """The rounds of a coordinator to which nothing happens, and which gets the same updates in another order."""
    state = initial_state(plan, 0.0)
    for logged in in_another_order(events, random.Random(0)):
        state, commands = advance(plan, state, logged.event, logged.at)
        yield from (command.round for command in commands if isinstance(command, AnnounceRound))


def in_another_order(events: Iterable[LoggedEvent], draw: random.Random) -> Iterator[LoggedEvent]:
    """The updates of a round are shuffled, and come after all that devices have said of themselves meanwhile."""
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
    """Every round of a run that has ended. The last of them is never closed: it is where the run stands, which a server
    that was killed at the very end knows from its log alone."""
    last = restore_state(store, plan)[0].announced
    assert last is not None
    return [*(one.round for one in closed), last]


def _compare(closed: list[ClosedRound], announced: list[Round], undisturbed: Reference) -> tuple[int, int]:
    """Of the rounds that led to something, how many can be compared with an undisturbed run's, and how many of these
    differ. A round without a device that was away leads elsewhere; what comes after it is compared by `undisturbed_by`
    alone."""
    repeated = {one.round.round for one in closed if one.repeated}
    everybody = {one.round.round for one in closed if set(one.updates) == undisturbed.devices}
    ours = [one for one in announced if one.round not in repeated]
    comparable = [all(before.round in everybody for before in ours[:index]) for index in range(len(ours))]
    pairs = zip(ours, undisturbed.outcomes, comparable, strict=True)
    return sum(comparable), sum(may and outcome(one) != other for one, other, may in pairs)
