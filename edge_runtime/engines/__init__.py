"""Engines train and evaluate experts with ONNX Runtime.

engine = StepGraphEngine(Bundle.load(path))
engine.load(level)
engine.set(theta, Training(epochs=1, learning_rate=1e-3))
loss = engine.step(Batch.cross_entropy(hidden, labels, classes))
theta = engine.get()
"""

from edge_runtime.engines.base import Batch, Engine, MemoryPlan
from edge_runtime.engines.factory import open_engine
from edge_runtime.engines.step_graph import StepGraphEngine

__all__ = ["Batch", "Engine", "MemoryPlan", "StepGraphEngine", "open_engine"]
