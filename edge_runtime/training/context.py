"""`TrainingContext`: the samples, caches, engine and gate that every stage of a run computes with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.features import FeatureCache, Features, HiddenStates, Report, Store
from edge_runtime.data.ledger import open_ledger
from edge_runtime.data.samples import Sample, Splits, assign_new_samples
from edge_runtime.engines.base import Engine
from edge_runtime.store import DeviceStore
from edge_runtime.training.gate import Gate
from edge_runtime.training.memo import Memo
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.algorithms.mixture import Biases, class_mask, log_softmax
from fedfmsl.algorithms.sal import Sal
from fedfmsl.protocol.task_bundle import TaskBundle

Samples = tuple[Sample, ...]


@dataclass(frozen=True)
class TrainingContext:
    """`scanned`: the samples of the last folder scan. `report`: receives the progress of long computations. `memo`: the
    logits that were computed before."""

    device_name: str
    bundle: TaskBundle
    scanned: Splits
    cache: Features[Store]
    engine: Engine
    gate: Gate
    store: DeviceStore
    level_cap: int
    report: Report
    memo: Memo = field(default_factory=Memo)

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return len(self.bundle.classes)

    @cached_property
    def splits(self) -> Splits:
        """`scanned`, with unassigned samples assigned. Saved before training, so that assignments never change."""
        splits = assign_new_samples(self.scanned, self.cache.pooled(self.scanned.unassigned_samples, level=1))
        with open_ledger(self.store.samples) as ledger:
            ledger.keep_splits(splits)
        return splits

    @cached_property
    def class_counts(self) -> NDArray[np.int64]:
        """Samples per class (C,), without the test split."""
        return self.scanned.class_counts(self.classes)

    @cached_property
    def class_mask(self) -> Floats:
        """Logit bias (C,) that restricts a softmax to the held classes."""
        return class_mask(self.class_counts)

    @cached_property
    def biases(self) -> Biases:
        """What this device adds to the experts' logits in the mixture."""
        return Biases.of_counts(self.class_counts)

    def capped(self, sal: Sal) -> Sal:
        """SAL with `max_level` limited to the level cap. For the baseline and the local expert."""
        return replace(sal, max_level=min(sal.max_level, self.level_cap))

    def to_highest_level(self, theta: Vector) -> Vector:
        """Extends an expert of any level to the bundle's highest level. Inactive blocks get their initial values."""
        full = self.bundle.initial()[0]
        full[: theta.size] = theta
        return full

    def level_of(self, theta: Vector) -> int:
        """The level with as many trainables as `theta` (P,)."""
        return next(k for k in range(self.bundle.manifest.levels + 1) if self.bundle.expert.size(k) == theta.size)

    def hidden_states(self, samples: Samples, expert: Vector, level: int) -> HiddenStates:
        """Hidden states below the suffix of `level`. The LoRA of `expert` is applied in its active blocks below it."""
        return self.cache.lifted(samples, self.level_of(expert), level, expert)

    def precise(self) -> TrainingContext:
        """The context with hidden states in fp32: predictions are then exactly those of the exported model."""
        return replace(self, cache=self.cache.precise())

    def log_p(self, samples: Samples, expert: Vector, bias: Floats) -> Floats:
        """Class log-probabilities (n, C) of the expert's logits + `bias` (C,)."""
        return log_softmax(self.logits(samples, expert, expert, self.level_of(expert)) + bias)

    def logits(self, samples: Samples, prefix: Vector, theta: Vector, level: int) -> Floats:
        """Class logits (n, C) of the expert `theta` (P,) at `level`. The LoRA of the expert `prefix` is applied in its
        active blocks below. May change the engine's level and trainables."""
        active = theta[: self.bundle.expert.size(level)]
        hidden = self.hidden_states(samples, prefix, level)

        def compute() -> Floats:
            self.engine.load(level)
            self.engine.set(active)
            logits = [self.engine.predict(batch) for batch in hidden.batches()]
            return np.concatenate(logits) if logits else np.empty((0, self.classes), np.float32)

        names = "".join(sample.sha256 for sample in samples)
        key = hashlib.sha256(f"{hidden.folder} {names} ".encode() + active.tobytes())
        return self.memo.recall(key.hexdigest(), compute)


@dataclass(frozen=True)
class DeviceContext(TrainingContext):
    """The context of a daemon, whose features are on its disk within a budget."""

    cache: FeatureCache
