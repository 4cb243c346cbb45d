"""FedFMSL without network: the server's coordinator, and both stages on the devices of a fleet.

Updates and globals are packed and unpacked as on the wire, so that bytes are counted. No message is lost.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from edge_runtime.daemon.round_runner import STAGES
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.model import save_personal_model
from edge_runtime.training.stages import Globals, StageResult
from edge_runtime.training.updates import prepare_update, update_header
from fedfmsl.algorithms.arrays import Tensors, Vector
from fedfmsl.errors import RunError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.chunks import chunks
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import DeviceStatus, Round, Stage, Update, Verdict
from fedfmsl.protocol.messages import Globals as GlobalsHeader
from fedfmsl.protocol.tensors import blob_hash, pack, unpack
from simulation.fleet import Fleet
from trainer_server.config import RunConfig
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import (
    ClockTicked,
    Command,
    PublishGlobals,
    SendAck,
    StatusSeen,
    Stop,
    StoreRound,
    UpdateSeen,
)
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.state import Plan, initial_state

Tamper = Callable[[str, StageResult], StageResult]  # changes the result of a device before it is prepared for sending


def honest(_: str, result: StageResult) -> StageResult:
    return result


@dataclass
class History:
    """The rounds of a run. `norms`: by stage, the L2 norm of each update before it is encoded."""

    rounds: list[ClosedRound] = field(default_factory=list)
    norms: dict[Stage, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A device's part of a round. Without `feedback`, the rounding error of the encoding is dropped."""

    round: Round
    received: Globals
    seed: int
    tamper: Tamper
    feedback: bool


@dataclass(frozen=True)
class Sent:
    """An update as it is on the wire. `norm`: the L2 norm before it is encoded; None if the round trains nothing."""

    blob: bytes
    norm: float | None


def federate(config: RunConfig, fleet: Fleet, tamper: Tamper = honest, feedback: bool = True) -> History:
    """Runs all rounds on the devices `fleet.names`. Each device's model is in its state directory then.

    Raises RunError if the server refuses an update or the run fails.
    """
    blobs: dict[str, Tensors] = {}
    bundle = fleet.bundle
    plan = Plan(config, bundle, str(uuid.uuid4()), blobs.__getitem__)
    state, history = initial_state(plan, 0.0), History()
    for name in fleet.names:
        state, _ = advance(plan, state, StatusSeen(_status(fleet, name)), 0.0)
    while True:
        state, commands = advance(plan, state, ClockTicked(), 0.0)
        blobs.clear()
        history.rounds += [command.closed for command in commands if isinstance(command, StoreRound)]
        if _stopped(commands):
            return history
        announced = state.announced
        assert announced is not None
        task = Task(announced, _read_globals(bundle, announced, commands), config.seed, tamper, feedback)
        for sent in fleet.map(_compute, dict.fromkeys(announced.chosen or fleet.names, task)).values():
            if sent.norm is not None:
                history.norms.setdefault(announced.stage, []).append(sent.norm)
            event = _received(sent.blob)
            blobs[event.sha256] = event.tensors
            state, commands = advance(plan, state, event, 0.0)
            _check_accepted(commands)


def _compute(device: TrainingContext, task: Task) -> Sent:
    round_ = task.round
    result = STAGES[round_.stage](device, round_, task.received)
    if (
        round_.stage is Stage.EVALUATE
    ):  # a real device writes its model after each round; here it is used after the last
        save_personal_model(device, round_, task.received)
    norm = None if result.delta is None else float(np.linalg.norm(result.delta))
    if not task.feedback:
        device.store.residual.unlink(missing_ok=True)
    # seeded, unlike on a device, so that results can be repeated
    rng = np.random.default_rng([task.seed, round_.round, *device.device_name.encode()])
    result = task.tamper(device.device_name, result)
    sent = prepare_update(device.bundle, device.store.residual, round_, result, rng)
    return Sent(pack(update_header(device, round_, sent), sent.tensors), norm)


def _status(fleet: Fleet, name: str) -> DeviceStatus:
    return DeviceStatus(device=name, online=True, bundle=fleet.bundle.sha256, level_cap=fleet.level_cap(name))


def _stopped(commands: Iterable[Command]) -> bool:
    """Whether the run has finished. Raises RunError if it has failed."""
    for command in commands:
        if isinstance(command, Stop) and command.error:
            raise RunError(command.error)
    return any(isinstance(command, Stop) for command in commands)


def _read_globals(bundle: Bundle, task: Round, commands: Iterable[Command]) -> Globals:
    blobs = {command.sha256: command.blob for command in commands if isinstance(command, PublishGlobals)}

    def vector(sha256: str, layout: Layout) -> Vector:
        return layout.join(unpack(blobs[sha256], GlobalsHeader)[1]) if sha256 else np.empty(0, np.float32)

    return Globals(
        vector(task.expert, bundle.expert), vector(task.start, bundle.expert), vector(task.gate, bundle.gate)
    )


def _received(blob: bytes) -> UpdateSeen:
    update, tensors = unpack(blob, Update)
    return UpdateSeen(update, tensors, blob_hash(blob), sum(map(len, chunks(blob))))


def _check_accepted(commands: Iterable[Command]) -> None:
    for command in commands:
        if isinstance(command, SendAck) and command.ack.verdict is not Verdict.ACCEPTED:
            raise RunError(f"round {command.ack.round}, {command.ack.device}: {command.ack.reason}")


def scaled(result: StageResult, factor: float) -> StageResult:
    """The result with `factor` times its update."""
    if result.delta is None:
        return result
    return replace(result, delta=np.asarray(factor * result.delta, np.float32))


def accuracies(history: History, models: Iterable[str]) -> Mapping[str, dict[str, float]]:
    """By device: the number of its test samples ("test") and the accuracy of each model on them."""
    (evaluation,) = [closed for closed in history.rounds if closed.round.stage is Stage.EVALUATE]
    return {
        name: {"test": float(update.samples), **{model: update.metrics[model] for model in models}}
        for name, update in evaluation.updates.items()
    }
