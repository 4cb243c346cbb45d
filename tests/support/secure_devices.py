"""A run with secure sums without I/O: devices that answer with the code of the daemon, and keep it on disk."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.daemon.secure_rounds import SecureRounds
from edge_runtime.store import DeviceStore
from edge_runtime.training.stages import StageResult
from edge_runtime.training.updates import prepare_update
from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.class_means import class_sums
from fedfmsl.algorithms.fixed_point import fixed_point
from fedfmsl.protocol.encoding import SUMS
from fedfmsl.protocol.messages import EXCHANGE, Round, Stage
from fedfmsl.protocol.task_bundle import TaskBundle
from support.bundles import Built
from support.coordinators import CoordinatorRun, head_statistics, make_update, plan_for
from trainer_server.coordinator.events import Command, PublishGlobals, StatusSeen
from trainer_server.coordinator.state import TRAINING
from trainer_server.storage.checkpoint import Checkpoint, vectors_of

MIN_CLASS_COUNT = 10  # more than one device has, and fewer than two have


@dataclass(frozen=True)
class SecureDevice:
    """A device with random features (n, F) of its first classes. Every answer is from a new process."""

    name: str
    folder: Path
    features: np.ndarray
    labels: np.ndarray
    classes: int
    identity: Path | None = None
    bundle: TaskBundle | None = None
    level_cap: int = 1

    @property
    def store(self) -> DeviceStore:
        return DeviceStore(self.folder)

    def answer(self, round_: Round, masks: bool = True) -> Tensors:
        rounds = SecureRounds(self.store, self.name, self.identity)
        if round_.stage in EXCHANGE:
            return rounds.exchange(round_, self.level_cap).tensors
        result = self.trained(round_) if round_.stage in TRAINING else StageResult({SUMS: self.sums(round_)})
        return rounds.mask(round_, result).tensors if masks else result.tensors

    def trained(self, round_: Round) -> StageResult:
        """A random update of stage 1, at the device's level, or of stage 2."""
        assert self.bundle is not None
        level = min(round_.level, self.level_cap)
        size = self.bundle.expert.size(level) if round_.stage is Stage.GLOBAL else self.bundle.gate.total
        rng = self._rng(round_)
        delta = rng.normal(size=size).astype(np.float32)
        metrics = {"held_out_global": 0.5, "loss": 1.0}
        result = StageResult(delta=delta, samples=self.labels.size, level=level, metrics=metrics)
        return prepare_update(self.bundle, self.folder / "residual", round_, result, rng)

    def sums(self, round_: Round) -> np.ndarray:
        counts = np.bincount(self.labels, minlength=self.classes)
        if round_.stage is Stage.HOLDERS:
            return fixed_point(
                np.concatenate([np.minimum(counts, round_.min_class_count), counts > 0]).astype(np.float64)
            )
        asked = np.isin(np.arange(self.classes), round_.classes) if round_.classes else np.ones(self.classes, np.bool_)
        chosen = asked[self.labels]
        compute = class_sums if round_.stage is Stage.STATISTICS else head_statistics
        tensors = compute(self.features[chosen], self.labels[chosen], self.classes)
        assert self.bundle is not None
        sent = prepare_update(self.bundle, self.folder / "residual", round_, StageResult(tensors), self._rng(round_))
        return np.asarray(sent.tensors[SUMS])

    def _rng(self, round_: Round) -> np.random.Generator:
        return np.random.default_rng([round_.index, *self.name.encode()])


class SecureRun(CoordinatorRun):
    """A run whose server is restarted from its checkpoint before each round. `devices` by name."""

    def __init__(self, built: Built, devices: Iterable[SecureDevice], masks: bool = True, **config: Any) -> None:
        self.devices = {device.name: device for device in devices}
        settings = {
            "secure_sums": True,
            "min_class_count": MIN_CLASS_COUNT,
            "min_holders": 3,
            "min_updates": 1,
            **config,
        }
        self.masks = masks
        plan = plan_for(built, len(self.devices), **{"stage1_rounds": 1, "stage2_rounds": 1, **settings})
        super().__init__(replace(plan, masks=masks))
        for name, device in self.devices.items():
            self.feed(StatusSeen(self.status(name, level_cap=device.level_cap)))

    def step(self, without: Collection[str] = ()) -> list[Command]:
        """Answers the present round, and passes the deadline if devices are missing."""
        self.state = Checkpoint.of(self.state).state(vectors_of(self.state))
        round_ = self.announced
        asked = [name for name in round_.chosen or self.devices if name not in without]
        blobs = {command.sha256: command.blob for command in self.of(PublishGlobals)}
        for name, sha256 in itertools.product(asked, {round_.roster, round_.shares} - {""}):
            self.devices[name].store.globals.write(blobs[sha256])
        secure = self.plan.schedule[self.state.position].part is not None
        answers = {name: self.devices[name].answer(round_, self.masks) if secure else None for name in asked}
        hidden = {"samples": 0, "metrics": {}}
        changes = {name: {"tensors": tensors, **hidden} if secure else {} for name, tensors in answers.items()}
        commands = self.feed(*(make_update(self.plan, round_, name, **changes[name]) for name in asked))
        if self.announced.round == round_.round:
            self.now += 1000
            commands += self.feed()
        return commands

    def until(self, stage: Stage, lost: dict[tuple[Stage, int], Collection[str]] | None = None) -> None:
        """`lost`: the devices that do not answer rounds of a stage and index."""
        while self.announced.stage is not stage:
            self.step((lost or {}).get((self.announced.stage, self.announced.index), ()))


def secure_devices(
    built: Built,
    folder: Path,
    count: int,
    identities: dict[str, Path] | None = None,
    level_caps: Sequence[int] = (),
) -> list[SecureDevice]:
    """Device i holds 6 samples each of all classes but the last, which only the first device holds. `level_caps`: of
    the first devices; 1 of the others."""
    classes, dims, rng = len(built.bundle.classes), built.bundle.manifest.dims, np.random.default_rng(7)
    devices = []
    for index in range(count):
        labels = np.repeat(np.arange(classes - (index > 0)), 6)
        features = rng.normal(size=(labels.size, dims.feature)).astype(np.float32)
        name = f"d{index}"
        identity = (identities or {}).get(name)
        cap = level_caps[index] if index < len(level_caps) else 1
        devices.append(SecureDevice(name, folder / name, features, labels, classes, identity, built.bundle, cap))
    return devices
