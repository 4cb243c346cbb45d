"""What the coordinator does with the messages of devices: statuses, updates, and updates that were refused."""

from __future__ import annotations

from dataclasses import replace

from fedfmsl.common.persistent_map import PersistentMap
from fedfmsl.protocol.messages import Ack, DeviceStatus, Verdict
from trainer_server.coordinator.events import Command, CountRefusal, Log, SendAck, UpdateSeen
from trainer_server.coordinator.limits import UNMERGED
from trainer_server.coordinator.refusals import LEFT_OUT_AFTER, LEFT_OUT_ROUNDS, refuse
from trainer_server.coordinator.state import Accepted, Plan, State
from trainer_server.coordinator.validation import validate_update

FULL = 0.75  # of the devices that a run accepts


def receive_status(plan: Plan, state: State, status: DeviceStatus) -> tuple[State, list[Command]]:
    before = state.devices.get(status.device)
    if before is None and len(state.devices) >= (most := plan.config.most_devices):
        return state, [CountRefusal(status.device, "too many devices", f"more than {most} devices")]
    stale = before is not None and not status.online and status.instance != before.instance
    known = before is not None and bool(before.error) and not (before.online or status.online or status.error)
    if stale or known:  # the last will of an earlier process, or of one that has said why it ends
        return state, []
    if before is not None and not (status.online or status.error):  # a last will proposes nothing
        status = status.model_copy(update={"proposed": before.proposed})
    commands: list[Command] = []
    if status.online and status.bundle != plan.bundle.sha256:
        error = f"it has another bundle ({status.bundle[:12]}…)"
        status = status.model_copy(update={"online": False, "error": error})
    if status == before:
        return state, []
    if status.error:
        if before is None or not before.error:  # later texts explain the same error
            commands.append(Log(f"{status.device} cannot take part: {status.error}"))
    elif before is None or before.online != status.online or before.error:
        commands.append(Log(f"{status.device} is {'online' if status.online else 'offline'}"))
    elif bool(before.paused) != bool(status.paused):
        commands.append(Log(f"{status.device} {f'paused: {status.paused}' if status.paused else 'resumes'}"))
    devices = state.devices.with_item(status.device, status)
    return replace(state, devices=devices, standing=state.standing.seen(status)), commands


def without_offline(plan: Plan, state: State) -> State:
    """The state without the devices that are offline, if the run knows many. Over years devices come and go; one that
    comes back announces itself."""
    if len(state.devices) <= FULL * plan.config.most_devices:
        return state
    kept = {name: known for name, known in state.devices.items() if known.online or name in state.expected}
    return replace(state, devices=PersistentMap(kept))


def receive_update(plan: Plan, state: State, event: UpdateSeen, now: float) -> tuple[State, list[Command]]:
    update = event.update
    validation = validate_update(plan, state, update, event.tensors)
    ack = Ack(
        run=update.run,
        session=update.session,
        round=update.round,
        device=update.device,
        verdict=validation.verdict,
        reason=validation.reason,
    )
    if validation.verdict is not Verdict.ACCEPTED:
        about = f"update for round {update.round}: {validation.reason}"
        replies: list[Command] = [SendAck(ack)]
        if validation.verdict is not Verdict.DUPLICATE:  # it counts already: its acknowledgement was lost
            replies.append(CountRefusal(update.device, validation.kind, about))
        here = (update.run, update.session, update.round) == (plan.config.run, plan.session, state.round)
        if here and validation.verdict is Verdict.REJECTED:
            state, commands = refuse_update(state, update.device)
            replies += commands
        return state, replies
    key = (update.round, state.devices[update.device].device)  # the same text in all rounds, to save memory
    slowest, refused = state.slowest, state.refused
    accepted = Accepted(update, event.sha256, event.size, validation.norm)
    if update.device in refused:
        refused = {name: last for name, last in refused.items() if name != update.device}
    if update.round == state.round and update.stage not in UNMERGED and not state.waiting:
        until = now if state.held_at is None else state.held_at
        slowest = {**slowest, update.stage: max(slowest.get(update.stage, 0.0), until - state.since)}
    updates = state.updates.with_item(key, accepted)
    return replace(state, updates=updates, slowest=slowest, refused=refused), [SendAck(ack)]


def refuse_update(state: State, device: str) -> tuple[State, list[Command]]:
    """After a refused update for the present round. It counts against selected devices only."""
    before = state.refused.get(device)
    refused = refuse(before, state.round)
    if device not in state.expected or refused == before:
        return state, []
    commands: list[Command] = []
    if refused.times >= LEFT_OUT_AFTER:
        about = f"its updates were refused in {refused.times} rounds in a row; see its log and the server's status"
        commands = [Log(f"{device} is left out of the next {LEFT_OUT_ROUNDS} rounds: {about}", warning=True)]
    return replace(state, refused={**state.refused, device: refused}), commands
