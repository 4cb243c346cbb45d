"""The operator returns a run to the global expert that an earlier round has made (ours).

The order is an event of the log, with the SHA-256 of that global expert. It takes effect when the next round could open
or close, so a paused run waits for it. In stage 1 the present round begins again. Later, stage 2 begins again, because
local experts and the gate adapter fit the global expert that they were trained with.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.class_mapping import NEW, mapped_head
from fedfmsl.algorithms.server_optimizers import Moments
from fedfmsl.protocol.messages import Stage
from trainer_server.coordinator.candidates import LastGood
from trainer_server.coordinator.former_head import FormerHead
from trainer_server.coordinator.state import NO_SUMS, TRAINING, Plan, State

EXPERT = "expert"  # name of the tensor in the file of a kept global expert


def restart_position(plan: Plan, position: int) -> int:
    """The position of the schedule from which a run goes on that is rolled back at `position`. Sums for the head are
    not asked for again: devices mask one sum of each kind in a session."""
    step = plan.schedule[position]
    if step.purpose in (Stage.STATISTICS, Stage.GLOBAL):
        return plan.positions_of(step.part).start if step.part else position
    stages = [each.purpose for each in plan.schedule]
    return stages.index(Stage.PERSONAL)


def why_no_rollback(plan: Plan, state: State) -> str:
    """Why the run cannot be rolled back now, or "". With --secure a device masks each update once in a session: of two
    sums over different devices, the difference would reveal those that are only in one."""
    if state.announced is None:
        return ""
    part = plan.schedule[restart_position(plan, state.position)].part
    if part is None or part[0] not in TRAINING or state.position < plan.positions_of(part).stop - 1:
        return ""
    return (
        f"no rollback now: with --secure devices do not send their updates of {part[0].value} {part[1] + 1} again. In "
        "stage 1 repeat it in the next round; later start a new run with --from"
    )


def rolled_back(plan: Plan, state: State, position: int) -> State:
    """The state with the ordered global expert, to open the round at `position`. It is a candidate that has no other
    one to be compared with. At the start of stage 2 the gate adapter is the initial one. SAL's level stays."""
    assert state.rollback is not None
    state = replace(
        state,
        expert=_with_all_classes(plan, state.expert, np.asarray(plan.read(state.rollback.sha256)[EXPERT], np.float32)),
        expert_moments=Moments.zeros(state.expert.size),
        made=state.rollback.round,
        good=LastGood(),
        former=FormerHead(rejected=state.former.rejected),
        norms=(),
        secure=NO_SUMS,
        rollback=None,
    )
    if plan.schedule[position].purpose is not Stage.PERSONAL:
        return state
    return replace(state, gate=plan.bundle.initial()[1], gate_moments=Moments.zeros(state.gate.size))


def _with_all_classes(plan: Plan, present: Vector, earlier: Vector) -> Vector:
    """The `earlier` global expert (P',), perhaps of a session with fewer classes, in the layout of the `present` one
    (P,). Names are only ever appended, so its classes are the first ones. The others keep how they stand to them."""
    head, width = plan.bundle.expert.size(0), plan.bundle.manifest.dims.feature + 1
    before = (head - present.size + earlier.size) // width
    indices = np.where(np.arange(head // width) < before, np.arange(head // width), NEW)
    mapped = mapped_head(earlier[: before * width], indices, present[:head])
    return np.concatenate([mapped, earlier[before * width :]])
