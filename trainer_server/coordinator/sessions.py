"""A run as a sequence of sessions (ours).

A plan never changes. So if the operator or a rule approves a class, the present round closes, and the next session of
the run begins: with another task, from the global expert, the gate adapter and the level of the one before, in the same
folder. Round numbers go on, and so do the records of rounds and the privacy budget. Names of classes are only ever
appended, so the index of a class never changes within a run.

Stage 1 of the next session has the rounds that were left of it, and at least LEAST_ROUNDS. Then stage 2 begins again.

A standing run begins its next session after the last round, too: with the same task, and with all rounds
(`trainer_server.coordinator.standing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedfmsl.common.persistent_map import remembered
from fedfmsl.protocol.class_names import MAX_CLASSES, describe_classes
from fedfmsl.protocol.messages import DeviceStatus, Stage
from trainer_server.coordinator.events import BeginSession, Command, Log
from trainer_server.coordinator.proposals import approved_by, why_not_new
from trainer_server.coordinator.records import listed
from trainer_server.coordinator.state import Plan, State, initial_state

LEAST_ROUNDS = 3  # of stage 1, for new classes


def ending(plan: Plan, state: State, position: int) -> list[Command]:
    """What ends the session in place of the round at `position` of the schedule; nothing if that round may open. No
    session ends within a secure aggregation."""
    step, names = plan.schedule[position], approved(plan, state)
    if step.part is not None and position != plan.positions_of(step.part).start:
        return []
    if not names:
        return _begin_again(plan) if step.stage is Stage.FINISHED and plan.config.standing else []
    text = f"the run goes on with {describe_classes([*plan.bundle.classes, *names])}; new: {listed(names)}"
    return [Log(text), BeginSession(names, max(_left(plan, position), LEAST_ROUNDS))]


def approved(plan: Plan, state: State) -> tuple[str, ...]:
    """The classes to add: those of the operator, then those that the rule approves."""
    rule = plan.config.approve_classes
    if rule is None:
        return state.approved
    return (*state.approved, *_by_rule(rule, plan.bundle.classes, state.approved, state.devices, state.excluded))


@remembered
def _by_rule(
    rule: str,
    classes: tuple[str, ...],
    added: tuple[str, ...],
    devices: Mapping[str, DeviceStatus],
    excluded: frozenset[str],
) -> tuple[str, ...]:
    return approved_by(rule, {*classes, *added}, devices.values(), excluded)


def _begin_again(plan: Plan) -> list[Command]:
    return [Log("the last round of this session is closed; the next session begins with new samples"), BeginSession()]


def _left(plan: Plan, position: int) -> int:
    """Rounds of stage 1 that are not closed before the one at `position` opens."""
    return len({step.part or step for step in plan.schedule[position:] if step.purpose is Stage.GLOBAL})


def why_no_classes(plan: Plan, state: State, names: Sequence[str]) -> str:
    """Why these classes cannot be added now, or ""."""
    if not names:
        return "no class is named, so none is added"
    if why := why_not_new(names, plan.bundle.classes, state.approved):
        return f"no class is added: {why}"
    count = len(plan.bundle.classes) + len(state.approved) + len(names)
    if count > MAX_CLASSES:
        return f"{count} classes are more than {MAX_CLASSES}, so none is added"
    return ""


def why_not_withdrawn(plan: Plan, state: State, names: Sequence[str]) -> str:
    """Why these classes cannot be withdrawn now, or ""."""
    left = approved(plan, replace(state, approved=tuple(name for name in state.approved if name not in names)))
    for name in names:
        if name in left:
            return f"devices propose the class {name!r} and --approve-classes adds it; exclude these devices first"
        if name not in state.approved:
            return f"the class {name!r} does not wait to be added, so nothing is withdrawn"
    return ""


def prepares(plan: Plan, state: State) -> bool:
    """Whether the latest status of a device that is online still proposes a class of the task: it has samples of it,
    and is not prepared for the task yet."""
    classes = {*plan.bundle.classes}
    return any(
        status.online and status.proposed and name not in state.excluded and not classes.isdisjoint(status.proposed)
        for name, status in state.devices.items()
    )


def first_state(plan: Plan, before: State, begins: BeginSession, now: float) -> State:
    """The state in which the session of `plan` begins, after a session that has ended in the state `before`. It begins
    with the devices that are online, like a round, and with a global expert that is compared with none."""
    ready = map(before.devices.__getitem__, before.ready)
    return replace(
        initial_state(plan, now),
        standing=before.standing.with_news() if begins.classes else before.standing.next(ready),
        limits=before.limits,
        slowest=before.slowest,
        round=before.round,
        devices=before.devices,
        refused=before.refused,
        silent=before.silent,
        made=before.former.made if before.former.head.size else before.made,  # as `trained`
        excluded=before.excluded,
    )
