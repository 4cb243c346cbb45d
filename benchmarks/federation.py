"""A federated run in one process, without network: the coordinator, and the stages of the devices one after the other.

Updates and globals are packed and unpacked as on the wire, so that bytes are counted. No message is lost.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edge_runtime.daemon.round_runner import STAGES
from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import reader_of
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.gate import Gate
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


def open_devices(
    bundle: Bundle, folders: Sequence[Path], states: Path, cache: Path, threads: int
) -> list[TrainingContext]:
    """A device for each folder of photos, with all features computed. They share engine, gate and feature cache.
    This is safe, because they take turns and a cache entry depends only on its name."""
    disk, engine, gate = DiskCache(cache), StepGraphEngine(bundle, threads), Gate(bundle, threads)
    features = FeatureCache(disk, bundle, threads)
    devices = []
    for folder in folders:
        scanned = scan_once(folder, bundle.manifest.classes, reader_of(bundle).kind)
        for level in range(1, bundle.manifest.levels + 1):
            features.frozen(scanned.train + scanned.held_out, level)
            features.precise().frozen(scanned.test, level)
        store = DeviceStore(states / folder.name)
        store.root.mkdir(parents=True, exist_ok=True)
        level_cap = bundle.manifest.levels
        devices.append(
            TrainingContext(folder.name, bundle, scanned, features, engine, gate, store, level_cap, lambda *_: None)
        )
    disk.drop_unused()  # states of the experts of an earlier run
    return devices


def federate(
    config: RunConfig, devices: Sequence[TrainingContext], tamper: Tamper = honest, feedback: bool = True
) -> History:
    """Runs all rounds. Without `feedback`, the rounding error of the encoding is dropped in each round.

    Raises RunError if the server refuses an update or the run fails.
    """
    blobs: dict[str, Tensors] = {}
    bundle = devices[0].bundle
    plan = Plan(config, bundle, str(uuid.uuid4()), blobs.__getitem__)
    state, history = initial_state(plan, 0.0), History()
    for device in devices:
        state, _ = advance(plan, state, StatusSeen(_status(device)), 0.0)
    while True:
        state, commands = advance(plan, state, ClockTicked(), 0.0)
        blobs.clear()
        history.rounds += [command.closed for command in commands if isinstance(command, StoreRound)]
        if _stopped(commands):
            return history
        task = state.announced
        assert task is not None
        received = _read_globals(bundle, task, commands)
        for device in devices:
            if task.chosen and device.device_name not in task.chosen:
                continue
            result = STAGES[task.stage](device, task, received)
            save_personal_model(device, task, received)
            if result.delta is not None:
                history.norms.setdefault(task.stage, []).append(float(np.linalg.norm(result.delta)))
            if not feedback:
                device.store.residual.unlink(missing_ok=True)
            # seeded, unlike on a device, so that results can be repeated
            rng = np.random.default_rng([config.seed, task.round, *device.device_name.encode()])
            sent = prepare_update(bundle, device.store.residual, task, tamper(device.device_name, result), rng)
            event = _received(pack(update_header(device, task, sent), sent.tensors))
            blobs[event.sha256] = event.tensors
            state, commands = advance(plan, state, event, 0.0)
            _check_accepted(commands)


def _status(device: TrainingContext) -> DeviceStatus:
    return DeviceStatus(device=device.device_name, online=True, bundle=device.bundle.sha256, level_cap=device.level_cap)


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
