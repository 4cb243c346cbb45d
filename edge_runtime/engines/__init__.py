"""Engines train and evaluate experts with ONNX Runtime.

engine = StepGraphEngine(Bundle.load(path))
engine.load(level)
engine.set(theta, Training(epochs=1, learning_rate=1e-3))
loss = engine.step(Batch.cross_entropy(hidden, labels, classes))
theta = engine.get()

ONNX Runtime is imported at the first use of a name: processes that only need `memory` do not load it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.engines.base import Batch, Engine, MemoryPlan
    from edge_runtime.engines.factory import open_engine
    from edge_runtime.engines.step_graph import StepGraphEngine

__all__ = ["Batch", "Engine", "MemoryPlan", "StepGraphEngine", "open_engine"]
_MODULES = {
    "Batch": "base",
    "Engine": "base",
    "MemoryPlan": "base",
    "StepGraphEngine": "step_graph",
    "open_engine": "factory",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
