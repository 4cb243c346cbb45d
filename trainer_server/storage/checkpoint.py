"""The state of a run when a round opens, as JSON and tensors. A restarted server resumes from it.

It holds no updates, because a checkpoint is written before the first update of a round arrives; and no rollback,
because the round that opens is the one that a rollback leads to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, get_type_hints

import numpy as np
from pydantic import BaseModel, TypeAdapter

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.sal import SalState
from fedfmsl.algorithms.server_optimizers import Moments
from fedfmsl.common.persistent_map import PersistentMap
from fedfmsl.protocol.messages import DeviceStatus, Round, Stage, compact
from trainer_server.coordinator.candidates import LastGood
from trainer_server.coordinator.former_head import FormerHead
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.refusals import Refused
from trainer_server.coordinator.standing import Standing
from trainer_server.coordinator.state import SecureSums, State, with_counted

SECURE = "secure_"  # start of the names of the tensors of the secure sums
SHARES, MASKED, ROSTER = f"{SECURE}shares", f"{SECURE}masked", f"{SECURE}roster_"


class Checkpoint(BaseModel):
    """A state without its vectors."""

    level: int
    queue: tuple[float, ...]
    seen: int
    since: float
    norms: tuple[float, ...]
    agreements: dict[str, float] = {}
    left_out: dict[str, int] = {}
    limits: Limits
    stretch: int
    slowest: dict[Stage, float]
    position: int
    round: int
    repeats: int
    announced: Round | None
    recent: tuple[Round, ...]
    devices: list[DeviceStatus] = []
    expected: list[str] = []
    refused: dict[str, Refused]
    silent: dict[str, int] = {}
    counted: list[tuple[int, str]] = []
    keys_round: int = 0
    secure_level: int = 0
    members: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    former_nlls: dict[str, float] = {}
    former_made: int = 0
    head_rejected: bool = False
    waiting: bool = False
    made: int = 0
    good_round: int = 0
    good_nlls: dict[str, float] = {}
    paused_at: float | None = None
    rests_at: float | None = None
    standing: Standing = Standing()
    closing: int = 0
    excluded: list[str] = []
    approved: tuple[str, ...] = ()

    @classmethod
    def of(cls, state: State) -> Checkpoint:
        return cls.model_construct(  # without copies of what it has of each device
            level=state.sal.level,
            queue=state.sal.queue,
            seen=state.sal.seen,
            since=state.since,
            norms=state.norms,
            agreements=dict(state.agreements),
            left_out=dict(state.left_out),
            limits=state.limits,
            stretch=state.stretch,
            slowest=dict(state.slowest),
            position=state.position,
            round=state.round,
            repeats=state.repeats,
            announced=state.announced,
            recent=state.recent,
            devices=list(state.devices.values()),
            expected=sorted(state.expected),
            refused=dict(state.refused),
            silent=dict(state.silent),
            counted=[(round_, device) for round_ in sorted(state.counted) for device in sorted(state.counted[round_])],
            keys_round=state.secure.keys_round,
            secure_level=state.secure.level,
            members=state.secure.members,
            survivors=state.secure.survivors,
            classes=state.secure.classes,
            former_nlls=dict(state.former.nlls),
            former_made=state.former.made,
            head_rejected=state.former.rejected,
            waiting=state.waiting,
            made=state.made,
            good_round=state.good.round,
            good_nlls=dict(state.good.nlls),
            paused_at=state.paused_at,
            rests_at=state.rests_at,
            standing=state.standing,
            closing=state.closing,
            excluded=sorted(state.excluded),
            approved=state.approved,
        )

    def state(self, tensors: Tensors) -> State:
        """The inverse of `of` and `vectors_of`. Raises KeyError if a vector is missing."""
        named = {name: tensor for name, tensor in tensors.items() if name.startswith(SECURE)}
        secure = SecureSums(
            roster={name.removeprefix(ROSTER): tensor for name, tensor in named.items() if name.startswith(ROSTER)},
            keys_round=self.keys_round,
            level=self.secure_level,
            members=self.members,
            survivors=self.survivors,
            classes=self.classes,
            shares=np.asarray(named[SHARES], np.uint8),
            masked=np.asarray(named[MASKED], np.uint64),
        )
        vectors = {name: np.asarray(tensors[name], np.float32) for name in tensors.keys() - named.keys()}
        return State(
            expert=vectors["expert"],
            gate=vectors["gate"],
            start=vectors["start"],
            expert_moments=Moments(vectors["expert_first"], vectors["expert_second"]),
            gate_moments=Moments(vectors["gate_first"], vectors["gate_second"]),
            sal=SalState(self.level, self.queue, self.seen),
            since=self.since,
            norms=self.norms,
            agreements=self.agreements,
            left_out=self.left_out,
            limits=self.limits,
            stretch=self.stretch,
            slowest=self.slowest,
            position=self.position,
            round=self.round,
            repeats=self.repeats,
            announced=self.announced,
            recent=self.recent,
            devices=PersistentMap({status.device: compact(status) for status in self.devices}),
            expected=frozenset(self.expected),
            refused=self.refused,
            silent=self.silent,
            counted=with_counted({}, self.counted),
            secure=secure,
            former=FormerHead(vectors["former_head"], self.former_nlls, self.former_made, self.head_rejected),
            waiting=self.waiting,
            made=self.made,
            good=LastGood(vectors["good_expert"], self.good_round, self.good_nlls),
            paused_at=self.paused_at,
            rests_at=self.rests_at,
            standing=self.standing,
            closing=self.closing,
            excluded=frozenset(self.excluded),
            approved=self.approved,
        )


# Fields that have an item for each device. A piece of a field has PIECE items at most.
LONG = ("devices", "expected", "counted", "agreements", "left_out", "former_nlls", "good_nlls")
PIECE = 500
_ITEMS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(get_type_hints(Checkpoint)[name]) for name in LONG}


def pieces_of(checkpoint: Checkpoint) -> tuple[str, Iterator[tuple[str, int, str]]]:
    """A checkpoint as JSON without the LONG fields; and their pieces: field, number of the first item, and items as
    JSON."""
    return checkpoint.model_dump_json(exclude=set(LONG)), _pieces(checkpoint)


def _pieces(checkpoint: Checkpoint) -> Iterator[tuple[str, int, str]]:
    for name in LONG:
        field = getattr(checkpoint, name)
        items = iter(field.items() if isinstance(field, dict) else field)
        for first in range(0, len(field), PIECE):
            part = type(field)(islice(items, PIECE))
            yield name, first, _ITEMS[name].dump_json(part).decode()


def join(rest: str, pieces: Iterable[tuple[str, str]]) -> Checkpoint:
    """The inverse of `pieces_of`. `pieces`: field and items, those of a field in order."""
    whole = Checkpoint.model_validate_json(rest)
    for name, items in pieces:
        field, part = getattr(whole, name), _ITEMS[name].validate_json(items)
        if isinstance(field, dict):
            field.update(part)
        else:
            field.extend(part)
    return whole


def vectors_of(state: State) -> Tensors:
    return {
        "expert": state.expert,
        "gate": state.gate,
        "start": state.start,
        "expert_first": state.expert_moments.first,
        "expert_second": state.expert_moments.second,
        "gate_first": state.gate_moments.first,
        "gate_second": state.gate_moments.second,
        "former_head": state.former.head,
        "good_expert": state.good.expert,
        SHARES: state.secure.shares,
        MASKED: state.secure.masked,
        **{ROSTER + name: tensor for name, tensor in state.secure.roster.items()},
    }
