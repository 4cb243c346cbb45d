"""Opens rounds: selects devices, and announces what they compute."""

from __future__ import annotations

from dataclasses import replace

from fedfmsl.algorithms.draw import lowest
from fedfmsl.algorithms.secure_aggregation import MIN_DEVICES
from fedfmsl.common.persistent_map import PersistentMap
from fedfmsl.protocol.messages import MAX_NAMED, Round, Stage
from trainer_server.config import MIN_REPORTS
from trainer_server.coordinator.adoption import canaries
from trainer_server.coordinator.announce import COUNTED, PERSONALIZING, announce, pack_globals, sal_of, sums_of
from trainer_server.coordinator.events import Command, Log, Stop
from trainer_server.coordinator.limits import UNMERGED
from trainer_server.coordinator.receive import without_offline
from trainer_server.coordinator.records import listed, number_of
from trainer_server.coordinator.refusals import is_left_out, left_out_of_sums
from trainer_server.coordinator.round_end import next_deadline
from trainer_server.coordinator.round_update import suspects, without_sums
from trainer_server.coordinator.secure_sums import MAX_REPEATS, asked_devices, secure_level
from trainer_server.coordinator.selection import announced_as, at_most, eligible_devices, select_devices
from trainer_server.coordinator.sessions import ending, prepares
from trainer_server.coordinator.state import SUMS, TRAINING, Part, Plan, State, Step, with_counted

WITHOUT = {  # what a run does without a secure aggregation
    Stage.STATISTICS: "stage 1 starts from the bundle's own head",
    Stage.HEAD: "the global expert keeps the head of stage 1",
    Stage.GLOBAL: "this round does not change the global expert",
    Stage.PERSONAL: "this round does not change the gate adapter",
}
REMEMBERED_ROUNDS = 2  # updates of older rounds are reported as late, also if they were accepted before


def maybe_start(plan: Plan, state: State, wall: float, now: float) -> tuple[State, list[Command]]:
    """A later session does not wait for all devices, like a round. It waits for those with samples of an added class,
    and in a standing run for news."""
    if commands := ending(plan, state, 0):
        return state, commands
    timed_out, least = now >= next_deadline(plan, state), state.limits.min_updates
    wanted = plan.config.devices if state.round == 0 else least
    if (len(state.devices) < wanted or prepares(plan, state)) and not timed_out:
        return state, []
    if state.standing.needs_news and state.standing.lacks(state.limits, map(state.devices.__getitem__, state.ready)):
        return state, []
    begun = replace(state, standing=state.standing.opened(wall))
    ready = len(state.ready if state.round else state.online)
    if ready >= wanted:
        return open_round(plan, begun, 0, now)
    if timed_out and ready >= least:
        state, commands = open_round(plan, begun, 0, now)
        joined = f"only {ready} of {plan.config.devices} devices joined within {plan.config.join_timeout:.0f} s"
        return state, [Log(f"{joined}; the run starts without the others", warning=True), *commands]
    if timed_out:
        count = number_of(ready, "device")
        error = (
            f"{count} joined within {plan.config.join_timeout:.0f} s, at least {least} must (--min-updates); check "
            f"that devices use --run {plan.config.run} and this broker, or raise --join-timeout"
        )
        return state, [Stop(error)]
    return state, []


def open_round(
    plan: Plan, state: State, position: int, now: float, is_end: bool = False
) -> tuple[State, list[Command]]:
    """Selects devices, publishes the globals and announces the round at `position` of the schedule; or ends the
    session instead, if it is not the end of the run."""
    if not is_end and (ends := ending(plan, state, position)):
        return state, ends
    state = without_offline(plan, state)
    config, number, step = plan.config, state.round + 1, plan.schedule[position]
    stage, level = step.stage, state.sal.level
    starts = step.part is None or position == plan.positions_of(step.part).start
    selected = _selected(plan, state, step, number)
    if step.part is not None:
        if starts and step.part[0] in SUMS and len(state.ready) < MIN_DEVICES:
            few = f"it needs {MIN_DEVICES} devices, and {len(state.ready)} can take part"
            return skip_part(plan, state, step.part, few, now)
        if step.part[0] is Stage.GLOBAL:
            level = secure_level(state, selected) if starts else state.secure.level
    if stage is Stage.CANARY and not selected:
        able = "answer it" if state.repeats else "that are online have measured the last global expert"
        state, commands = open_round(plan, replace(state, repeats=0), position + 1, now)
        return state, [Log(f"no canary round: fewer than {MIN_REPORTS} devices {able}", warning=True), *commands]
    oldest = number - max(config.max_staleness, REMEMBERED_ROUNDS)
    closed = [*state.recent, *([state.announced] if state.announced else [])]
    blobs = pack_globals(plan, state, stage)
    asked = announced_as(selected, state.ready, state.excluded, config.seed, number)
    if step.part is not None:  # the members of a secure aggregation are named
        asked = {"chosen": tuple(sorted(selected))}
    announced = Round(
        run=config.run,
        session=plan.session,
        round=number,
        stage=stage,
        index=step.index,
        of=step.of,
        level=level,
        repetitions={Stage.BASELINE: config.stage1_rounds, Stage.FINISHED: config.stage2_rounds}.get(stage, 1),
        training=config.stage2 if stage in PERSONALIZING else config.stage1,
        sal=sal_of(plan, state, stage),
        encoding=config.encoding,
        privacy=config.privacy,
        sums=sums_of(plan, state, stage),
        min_class_count=config.min_class_count if stage in COUNTED and config.privacy is None else 0,
        secure=step.part is not None,
        classes=state.secure.classes if stage in SUMS else (),
        **{**asked, **{kind: sha256 for kind, (sha256, _) in blobs.items()}},
    )
    state = replace(
        state,
        position=position,
        round=number,
        announced=announced,
        since=now,
        waiting=False,
        stretch=1 if stage in UNMERGED else state.stretch,  # their deadline follows measured time
        expected=selected,
        updates=PersistentMap(),
        recent=tuple(closed[len(closed) - config.max_staleness :]) if config.max_staleness else (),
        counted={
            round_: devices
            for round_, devices in with_counted(state.counted, state.updates).items()
            if round_ >= oldest
        },
    )
    commands = announce(blobs, announced)
    if step.purpose is Stage.HEAD and starts and (unasked := sorted(suspects(plan, state) - selected)):
        about = "their updates often pointed away from the others; check these devices and their labels"
        commands = [Log(f"no sums of {listed(unasked)}: {about}", warning=True), *commands]
    return state, commands


def _selected(plan: Plan, state: State, step: Step, number: int) -> frozenset[str]:
    """The devices that the round asks. A repeated round of training asks every device, because the same selection could
    fail again. For the head only devices whose updates were not often left out are asked."""
    if step.part is not None and plan.masks and step.stage is not Stage.KEYS:
        return asked_devices(state, step.stage) - state.excluded
    ready, least = {name: state.devices[name] for name in state.ready}, state.limits.min_updates
    left_out_ones = {name for name in ready if is_left_out(state.refused.get(name), number)}
    if step.part is not None:
        left_out_ones |= left_out_of_sums(state.silent, number).keys()
        least = max(least, MIN_DEVICES)
    eligible = eligible_devices(ready, left_out_ones, least)
    if step.purpose is Stage.HEAD:
        eligible = eligible_devices(eligible, suspects(plan, state), max(least, MIN_DEVICES))
    if step.stage is Stage.CANARY:
        selected = canaries(plan, state, eligible, number) if state.repeats <= MAX_REPEATS else frozenset()
    elif step.purpose not in TRAINING or state.repeats:
        selected = frozenset(eligible)
    else:
        selected = select_devices(plan.config, eligible, state.sal.level, number, least)
    if step.part is not None:  # the same ones in all of its rounds
        return frozenset(lowest(selected, MAX_NAMED, plan.config.seed, plan.positions_of(step.part).start))
    return at_most(selected, state.ready, state.excluded, plan.config.seed, number)


def skip_part(plan: Plan, state: State, part: Part, reason: str, now: float) -> tuple[State, list[Command]]:
    """Goes on without a secure aggregation."""
    state = replace(without_sums(plan, state, part[0]), repeats=0, stretch=1)
    state, commands = open_round(plan, state, plan.positions_of(part).stop, now)
    return state, [Log(f"no secure aggregation: {reason}; {WITHOUT[part[0]]}", warning=True), *commands]
