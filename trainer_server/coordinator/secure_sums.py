"""Secure aggregation: what the server does in its rounds (see `fedfmsl.protocol.secure_sums`).

If class sums fail, the run goes on without them: the first head is then the bundle's own, and the global expert keeps
the head of stage 1. Before the first masks are removed they are tried again, with fresh keys. Afterwards they are not:
the difference of two sums over different devices would reveal the devices that are only in one. Updates of stages 1 and
2 are tried again as in other runs, until their masks may have been removed; then the round changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from fedfmsl.algorithms.arrays import Doubles, Parts, Tensors
from fedfmsl.algorithms.fixed_point import Words, numbers
from fedfmsl.algorithms.secure_aggregation import (
    MIN_DEVICES,
    SEED_BYTES,
    SHARE_BYTES,
    Roster,
    SecureAggregationError,
    check_public_keys,
    held_members,
    unmask,
)
from fedfmsl.algorithms.weighted_sums import FRACTION_BITS, weighted_values
from fedfmsl.errors import MessageError
from fedfmsl.protocol.encoding import SUMS
from fedfmsl.protocol.messages import Round, Stage, Update
from fedfmsl.protocol.secure_sums import (
    OPENED,
    SHARES,
    SignedKeys,
    context,
    read_roster,
    roster_of,
    roster_tensors,
    tensor_of,
    thin_level,
    vector_of,
)
from trainer_server.coordinator.records import number_of
from trainer_server.coordinator.state import NO_SUMS, TRAINING, Plan, SecureSums, State

MAX_REPEATS = 2  # before the run goes on without the sums


@dataclass(frozen=True)
class Sums:
    """`total` (P,): the sum of the vectors of statistics, head or updates, once it is complete."""

    state: State
    total: Doubles | None = None


def asked_devices(state: State, stage: Stage) -> frozenset[str]:
    """The devices that take part in a round of the secure sums after their keys."""
    return frozenset(state.secure.survivors if stage is Stage.UNMASK else state.secure.members)


def shortage(plan: Plan, state: State, closing: Round) -> str:
    """Why the updates of a round of the secure sums are too few, or ""."""
    answered, count = _answered(state), len(state.answered)
    if count < MIN_DEVICES:
        return f"round {state.round} got {number_of(count, 'update')}, and secure aggregation needs {MIN_DEVICES}"
    if closing.stage is Stage.KEYS or not plan.masks:
        return ""
    roster = _roster(plan, state.secure)
    members = answered if closing.stage is Stage.SHARES else state.secure.members
    if not roster.enough(_places(roster, answered), _places(roster, members)):
        return f"round {state.round} got {count} updates, too few to remove the masks"
    if closing.stage is Stage.GLOBAL:
        levels = read_roster(state.secure.roster)
        level = thin_level((levels[name].level for name in answered), closing.level)
        if level:
            return f"round {state.round} got updates of fewer than {MIN_DEVICES} devices at level {level} or above"
    return ""


def secure_level(state: State, asked: Iterable[str]) -> int:
    """The level of a round of stage 1: up to SAL's, the highest that MIN_DEVICES of the asked devices train. Each
    repeat from the second on is one level lower, because devices of a level that do not answer would have it repeated
    without end."""
    caps = sorted((state.devices[name].level_cap for name in asked), reverse=True)
    highest = min(state.sal.level, caps[MIN_DEVICES - 1]) if len(caps) >= MIN_DEVICES else 1
    return max(highest - max(state.repeats - MAX_REPEATS + 1, 0), 1)


def _merged(secure: SecureSums, members: tuple[str, ...], level: int) -> SecureSums:
    """With `members`, at the highest level up to `level` that enough of them train: devices of higher levels train at
    it too."""
    levels = read_roster(secure.roster)
    thin = thin_level((levels[name].level for name in members), level)
    return replace(secure, members=members, level=thin - 1 if thin > 1 else level)


def check_update(plan: Plan, state: State, task: Round, update: Update, tensors: Tensors) -> None:
    """Raises MessageError if an update for a round of secure aggregation is not valid."""
    if update.stage is Stage.KEYS:
        signed = SignedKeys.read(tensors)
        plan.check_keys(update.device, signed, signed.message(update.device, _context(plan, update.round)))
        try:
            check_public_keys(signed.keys)
        except SecureAggregationError as error:
            raise MessageError(str(error)) from error
        return
    if update.stage in (Stage.SHARES, Stage.UNMASK):
        roster = _roster(plan, state.secure)
        device = _positions(roster).get(update.device)
        if device is None:
            raise MessageError("its keys are not in the roster")
        if update.stage is Stage.SHARES:
            tensor_of(tensors, SHARES, np.uint8, (len(roster.holders(device)), SHARE_BYTES))
        else:
            held = held_members(roster, device, _places(roster, state.secure.members))
            tensor_of(tensors, OPENED, np.uint8, (len(held), SEED_BYTES))
    else:
        tensor_of(tensors, SUMS, np.uint64, (_values(plan, update.stage, task.level),))
    if len(tensors) != 1:
        raise MessageError(f"the update holds {len(tensors)} tensors, expected 1")


def apply_updates(plan: Plan, state: State, closing: Round) -> Sums:
    """The state after a round of the secure sums. Raises SecureAggregationError or MessageError if they fail."""
    secure = state.secure
    if closing.stage is Stage.KEYS:
        signed = {name: SignedKeys.read(tensors) for name, tensors in _tensors(plan, state)}
        secure = SecureSums(roster_tensors(signed), closing.round)
        return _progress(state, _merged(secure, tuple(sorted(signed)), closing.level))
    if closing.stage is Stage.SHARES:
        roster = _roster(plan, secure)
        shares = np.zeros((len(roster.names), len(roster.holders(0)), SHARE_BYTES), np.uint8)
        for name, tensors in _tensors(plan, state):
            shares[_positions(roster)[name]] = tensors[SHARES]
        return _progress(state, _merged(replace(secure, shares=shares), _answered(state), secure.level))
    if closing.stage is not Stage.UNMASK:
        masked = np.zeros(_values(plan, closing.stage, closing.level), np.uint64)
        for _, tensors in _tensors(plan, state):
            masked += np.asarray(tensors[SUMS], np.uint64)
        secure = replace(secure, masked=masked, survivors=_answered(state))
        return _progress(state, secure) if plan.masks else _completed(plan, state, secure, closing.stage, masked)
    roster = _roster(plan, secure)
    position = _positions(roster)
    opened = {position[name]: np.asarray(tensors[OPENED], np.uint8) for name, tensors in _tensors(plan, state)}
    places, survivors = _places(roster, secure.members), _places(roster, secure.survivors)
    total = unmask(roster, vector_of(closing), places, survivors, secure.masked, opened)
    masked_stage = plan.schedule[state.position - 1].stage
    return _completed(plan, state, replace(secure, members=_answered(state)), masked_stage, total)


def _completed(plan: Plan, state: State, secure: SecureSums, stage: Stage, total: Words) -> Sums:
    """Raises MessageError if no class has enough samples and holders."""
    values = numbers(total, FRACTION_BITS) if stage in TRAINING else numbers(total)
    secure = replace(secure, masked=NO_SUMS.masked)
    if stage is not Stage.HOLDERS:
        return Sums(replace(state, secure=NO_SUMS), values)
    samples, holders = values.reshape(2, -1)
    config = plan.config
    enough = (samples >= config.min_class_count) & (holders >= config.min_holders)
    classes = tuple(int(index) for index in np.flatnonzero(enough))
    if not classes:
        least = f"{config.min_class_count} samples on {config.min_holders} or more devices"
        raise MessageError(f"no class has {least} to learn from (--min-class-count, --min-holders)")
    return _progress(state, replace(secure, classes=classes))


def _progress(state: State, secure: SecureSums) -> Sums:
    return Sums(replace(state, secure=secure))


def update_parts(plan: Plan, stage: Stage, level: int) -> Parts:
    """The parts of an update of stage 1 or 2."""
    return plan.bundle.expert.parts_of(level) if stage is Stage.GLOBAL else plan.bundle.gate.parts


def _values(plan: Plan, stage: Stage, level: int) -> int:
    """Length of the vectors of a masked stage."""
    if stage in TRAINING:
        return weighted_values(update_parts(plan, stage, level))
    if stage is Stage.HOLDERS:
        return 2 * len(plan.bundle.classes)
    return plan.statistics.total if stage is Stage.STATISTICS else plan.head_statistics.total


def _context(plan: Plan, keys_round: int) -> bytes:
    return context(plan.config.run, plan.session, keys_round)


def _roster(plan: Plan, secure: SecureSums) -> Roster:
    return roster_of(read_roster(secure.roster), _context(plan, secure.keys_round))


def _positions(roster: Roster) -> dict[str, int]:
    return {name: position for position, name in enumerate(roster.names)}


def _places(roster: Roster, devices: Iterable[str]) -> frozenset[int]:
    return frozenset(map(_positions(roster).__getitem__, devices))


def _answered(state: State) -> tuple[str, ...]:
    return tuple(sorted(state.answered))


def _tensors(plan: Plan, state: State) -> Iterator[tuple[str, Tensors]]:
    """Name and tensors of each device, one at a time."""
    for round_, device in sorted(state.updates):
        yield device, plan.read(state.updates[round_, device].sha256)
