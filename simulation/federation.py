"""FedFMSL without network: the server's coordinator, and both stages on the devices of a fleet.

Updates and globals are packed and unpacked as on the wire, so that bytes are counted. No message is lost.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from edge_runtime.daemon.round_runner import STAGES
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.model import save_personal_model
from edge_runtime.training.stages import Globals, StageResult, read_globals
from edge_runtime.training.updates import prepare_update, update_header
from fedfmsl.errors import RunError
from fedfmsl.protocol.chunks import chunks
from fedfmsl.protocol.messages import DeviceStatus, Round, Stage, Update, Verdict
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import blob_hash, pack, unpack
from simulation.fleet import Fleet
from simulation.spill import StoredUpdates
from trainer_server.config import RunConfig
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import (
    ClockTicked,
    Command,
    Event,
    PublishGlobals,
    SendAck,
    StatusSeen,
    Stop,
    StoreRound,
    UpdateSeen,
)
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.round_end import is_complete, next_deadline
from trainer_server.coordinator.state import Plan, State, initial_state
from trainer_server.coordinator.warm_start import WarmStart

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


class Federation:
    """A run, round by round. `announced`: the present round. `received`: its globals as devices read them, of
    `bytes_down` bytes on the wire."""

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        tamper: Tamper = honest,
        feedback: bool = True,
        hostile: Collection[str] = (),
        warm: WarmStart | None = None,
    ) -> None:
        """The devices `fleet.names` take part. Opens the first round. Without `feedback`, the rounding error of the
        encoding is dropped. The server may refuse updates of the devices `hostile`. `warm`: what the run goes on
        from."""
        self.config = config
        self.history = History()
        self.finished = False
        self._fleet = fleet
        self._tamper = tamper
        self._hostile = frozenset(hostile)
        self._feedback = feedback
        self._updates = StoredUpdates()
        self._now = 0.0
        self._plan = Plan(config, fleet.bundle, str(uuid.uuid4()), self._updates.read, masks=False, warm=warm)
        self._state = initial_state(self._plan, self._now)
        for name in fleet.names:
            self._advance(StatusSeen(_status(fleet, name)))
        self._close()

    @property
    def state(self) -> State:
        """The server's state."""
        return self._state

    def step(self, devices: Collection[str] | None = None) -> Mapping[str, int]:
        """Computes the present round and opens the next one. Returns the bytes on the wire of each device's update.

        Of the selected devices, those in `devices` answer; the others miss the round deadline. Default: all answer.
        Raises RunError if the server refuses an update of a device that is not hostile, or the run fails.
        """
        selected = [name for name in self._fleet.names if self.announced.asks(name)]
        answering = [name for name in selected if devices is None or name in devices]
        task = Task(self.announced, self.received, self.config.seed, self._tamper, self._feedback)
        sizes = {}
        for name, sent in self._fleet.each(compute, [(name, task) for name in answering]):
            if sent.norm is not None:
                self.history.norms.setdefault(self.announced.stage, []).append(sent.norm)
            event = _received(sent.blob)
            self._updates.add(event.sha256, sent.blob)
            commands = self._advance(event)
            if name not in self._hostile:
                _check_accepted(commands)
            sizes[name] = event.size
        self._close()
        return sizes

    def _advance(self, event: Event) -> list[Command]:
        self._state, commands = advance(self._plan, self._state, event, self._now)
        return commands

    def _close(self) -> None:
        """Closes the round, at its deadline if devices are missing."""
        if self._state.announced is not None and not is_complete(self._plan, self._state, self._state.announced):
            self._now = next_deadline(self._plan, self._state)
        commands = self._advance(ClockTicked())
        self._updates.clear()
        self.history.rounds += [command.closed for command in commands if isinstance(command, StoreRound)]
        self.finished = _stopped(commands)
        assert self._state.announced is not None
        self.announced = self._state.announced
        self.received, self.bytes_down = _read_globals(self._fleet.bundle, self.announced, commands)


def federate(
    config: RunConfig,
    fleet: Fleet,
    tamper: Tamper = honest,
    feedback: bool = True,
    hostile: Collection[str] = (),
) -> History:
    """Runs all rounds on the devices `fleet.names`. Each device's model is in its state directory then.

    Raises RunError if the server refuses an update of a device that is not `hostile`, or the run fails.
    """
    run = Federation(config, fleet, tamper, feedback, hostile)
    while not run.finished:
        run.step()
    return run.history


def compute(device: TrainingContext, task: Task) -> Sent:
    """The update of a device."""
    round_ = task.round
    result = STAGES[round_.stage](device, round_, task.received)
    # A real device writes its model after each round. Here it is used after the last round only.
    if round_.stage is Stage.EVALUATE:
        save_personal_model(device, round_, task.received, result.model)
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


def _read_globals(bundle: TaskBundle, round_: Round, commands: Iterable[Command]) -> tuple[Globals, int]:
    """The globals of a round, and their bytes on the wire."""
    blobs = {command.sha256: command.blob for command in commands if isinstance(command, PublishGlobals)}
    return read_globals(bundle, blobs.get, round_), sum(len(chunk) for blob in blobs.values() for chunk in chunks(blob))


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
