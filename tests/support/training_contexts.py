"""What a stage needs: the context of a device, an announced round and the first globals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import reader_of
from edge_runtime.engines import StepGraphEngine
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.gate import Gate
from edge_runtime.training.stages import Globals
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.protocol.messages import Round, Stage, Training
from fedfmsl.protocol.task_bundle import TaskBundle

SAL = Sal(CapabilityQueue(2, 0.1), max_level=2)


def training_context(bundle: TaskBundle, photos: Path, root: Path) -> TrainingContext:
    """A device with the samples in `photos`, the state directory `root` and level cap 1."""
    store = DeviceStore(root)
    return TrainingContext(
        device_name="d",
        bundle=bundle,
        scanned=scan_once(photos, bundle.classes, reader_of(bundle).kind),
        cache=FeatureCache(DiskCache(store.cache), bundle, threads=1),
        engine=StepGraphEngine(bundle, threads=1),
        gate=Gate(bundle, threads=1),
        store=store,
        level_cap=1,
        report=lambda *_: None,
    )


def announced_round(stage: Stage, level: int = 1, **change: Any) -> Round:
    fields: dict[str, Any] = {"run": "r", "session": "s", "round": 3, "index": 0, "of": 2, **change}
    return Round(**fields, stage=stage, level=level, training=Training(epochs=2, learning_rate=1e-2), sal=SAL)


def initial_globals(bundle: TaskBundle, level: int) -> Globals:
    """The bundle's initial expert at `level`, at level 1 as the start, and the initial gate adapter."""
    expert, gate = bundle.initial()
    return Globals(expert[: bundle.expert.size(level)], expert[: bundle.expert.size(1)], gate)
