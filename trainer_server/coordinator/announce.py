"""What a round publishes: its globals as blobs, and the announcement after them."""

from __future__ import annotations

from dataclasses import replace

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.sal import Sal
from fedfmsl.algorithms.secure_aggregation import MIN_DEVICES
from fedfmsl.protocol.messages import EXCHANGE, Globals, Round, Stage, Sums
from fedfmsl.protocol.secure_sums import SHARES
from fedfmsl.protocol.tensors import blob_hash, pack
from trainer_server.config import Head
from trainer_server.coordinator.events import AnnounceRound, Command, PublishGlobals
from trainer_server.coordinator.state import Plan, State

COUNTED = (Stage.HOLDERS, Stage.STATISTICS, Stage.HEAD)  # rounds that follow `min_class_count`
PERSONALIZING = (Stage.PERSONAL, Stage.FINISHED)  # stage 2; after the end, of devices that took no part
Blobs = dict[str, tuple[str, bytes]]  # kind of globals → SHA-256 and blob


def announcement(plan: Plan, state: State, announced: Round) -> list[Command]:
    """Publishes the present round again, after a restart or for a broker that lost its retained messages."""
    return announce(pack_globals(plan, state, announced.stage), announced)


def announce(blobs: Blobs, announced: Round) -> list[Command]:
    return [*(PublishGlobals(sha256, blob) for sha256, blob in blobs.values()), AnnounceRound(announced)]


def pack_globals(plan: Plan, state: State, stage: Stage) -> Blobs:
    """The globals by kind: the global expert at its level, the expert that stage 1 started from, the gate adapter; in
    the rounds of secure sums also keys and shares. Before stage 1 there are no experts."""
    tensors: dict[str, Tensors] = {}
    if state.start.size:
        tensors = {
            "expert": plan.bundle.expert.split(state.expert[: plan.bundle.expert.size(state.sal.level)]),
            "start": plan.bundle.expert.split(state.start),
            "gate": plan.bundle.gate.split(state.gate),
        }
    if state.secure.roster and stage is not Stage.KEYS:
        tensors["roster"] = state.secure.roster
        if stage is Stage.UNMASK:
            tensors["shares"] = {SHARES: state.secure.shares}
    blobs = {kind: pack(Globals(run=plan.config.run, kind=kind), named) for kind, named in tensors.items()}
    return {kind: (blob_hash(blob), blob) for kind, blob in blobs.items()}


def sums_of(plan: Plan, state: State, stage: Stage) -> Sums:
    """What devices sum in a round of this stage, or in stage 1 what they will sum in the round of the head."""
    if stage is Stage.HEAD or (stage is Stage.GLOBAL and _has_head_round(plan) and not state.former.rejected):
        return plan.config.head_sums
    return Sums.FEATURES if stage is Stage.STATISTICS and plan.config.head is Head.CLASS_MEANS else Sums.NONE


def _has_head_round(plan: Plan) -> bool:
    """Whether sums will replace the head of stage 1, as far as the settings tell."""
    hidden = plan.config.secure or plan.config.secure_sums
    enough = plan.config.devices >= MIN_DEVICES or not hidden
    return enough and any(step.stage is Stage.HEAD for step in plan.schedule)


def sal_of(plan: Plan, state: State, stage: Stage) -> Sal:
    """The stage's rule. After stage 1 no device activates more blocks than the global expert has."""
    config = plan.config
    if stage in (Stage.STATISTICS, Stage.GLOBAL, Stage.HOLDERS, *EXCHANGE):
        return config.stage1_sal
    rule = config.stage2_sal if stage in PERSONALIZING else config.stage1_sal
    return replace(rule, max_level=state.sal.level)
