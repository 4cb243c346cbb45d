"""What every local computation works with: this device's samples, caches, engine and gate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.features import FeatureCache, HiddenStates, Report
from edge_runtime.data.ledger import open_ledger
from edge_runtime.data.samples import Sample, Splits, assign_new_samples
from edge_runtime.engines.base import Engine
from edge_runtime.store import DeviceStore
from edge_runtime.training.gate import Gate
from edge_runtime.training.loop import predict_log
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.algorithms.mixture import class_mask, log_class_prior
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Sal

Samples = tuple[Sample, ...]


@dataclass(frozen=True)
class Device:
    name: str
    bundle: Bundle
    scanned: Splits
    cache: FeatureCache
    engine: Engine
    gate: Gate
    store: DeviceStore
    level_cap: int
    report: Report

    @property
    def classes(self) -> int:
        return self.bundle.manifest.dims.classes

    @cached_property
    def slices(self) -> Splits:
        """`scanned`, with newcomers dealt; kept before anybody trains on them, so that none changes over later."""
        slices = assign_new_samples(self.scanned, self.cache.pooled(self.scanned.unassigned_samples, level=1))
        with open_ledger(self.store.samples) as ledger:
            ledger.keep_splits(slices)
        return slices

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """This device's samples per class (C,), the test slice left out."""
        return self.scanned.class_counts(self.classes)

    @cached_property
    def mask(self) -> Floats:
        """Restricts a softmax to the classes this device holds (C,)."""
        return class_mask(self.counts)

    @cached_property
    def prior(self) -> Floats:
        """This device's log class prior (C,)."""
        return log_class_prior(self.counts)

    def within_cap(self, sal: Sal) -> Sal:
        """The rule for levels that are this device's own business: never past what it can bear."""
        return sal.model_copy(update={"max_level": min(sal.max_level, self.level_cap)})

    def completed(self, theta: Vector) -> Vector:
        """An expert of any level as a vector of the bundle's highest: blocks not yet active get their start."""
        full = self.bundle.initial()[0]
        full[: theta.size] = theta
        return full

    def level_of(self, theta: Vector) -> int:
        """The level whose trainables `theta` (P,) are."""
        return next(k for k in range(self.bundle.manifest.levels + 1) if self.bundle.expert.size(k) == theta.size)

    def hidden(self, images: Samples, expert: Vector, level: int) -> HiddenStates:
        """States below the suffix of `level`, with the LoRA of `expert` in the active blocks further down."""
        return self.cache.lifted(images, self.level_of(expert), level, expert)

    def log_p(self, images: Samples, expert: Vector, bias: Floats) -> Floats:
        """Class log-probabilities (n, C) of logits + bias of an expert at its own level, nothing trained below it."""
        level = self.level_of(expert)
        self.engine.load(level)
        self.engine.set(expert)
        return predict_log(self.engine, self.cache.frozen(images, level), bias)
