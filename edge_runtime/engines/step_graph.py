"""`StepGraphEngine` trains on the step graphs of a bundle, with any ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.base import Batch, MemoryPlan, expert_decay
from edge_runtime.engines.memory import release_free_memory
from edge_runtime.engines.sessions import CPU, ON_PROCESSOR, InferenceSession, open_session, run
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.protocol.bundle import Dims
from fedfmsl.protocol.messages import EngineName, Training
from fedfmsl.protocol.task_bundle import TaskBundle

ACTIVATION_BYTES = 128 * 2**20  # on the CPU
ACCELERATOR_BYTES = 2**31  # a GPU needs many rows: at level 12 a step of 16 samples takes 198 ms with 1, 42 with 16
# Tokens of a micro-batch on the CPU, which are the rows of its products. Products with 200 to 800 rows are fastest, and
# with more than 400 the operators between them read from memory instead of the caches. Measured on x86-64.
PRODUCT_ROWS = 400
# Activations that a block keeps for the backward pass, in hidden states (B, N, D). Measured on ViT-B/16.
BLOCK_STATES, LAST_BLOCK_STATES = 15, 4


class StepGraphEngine:
    """Runs step graphs in micro-batches and applies AdamW to the summed gradient.

    Usage, for a bundle and hidden states (B, N, D) below the level's suffix:

        engine = StepGraphEngine(bundle)
        engine.load(level)
        engine.set(theta, Training(epochs=1, learning_rate=1e-3))  # theta (P,) = bundle.initial()[0][: size of level]
        loss = engine.step(Batch.cross_entropy(hidden, labels, classes))
        logits = engine.predict(hidden)
    """

    name: EngineName = "step-graph"

    def __init__(
        self,
        bundle: TaskBundle,
        threads: int = 0,
        memory_plans: Mapping[int, MemoryPlan] | None = None,
        provider: str = CPU,
    ) -> None:
        """`threads` = 0 uses all cores. `memory_plans` by level; see `memory_plan_of` for the default. `provider`: the
        execution provider of ONNX Runtime, or `openvino`."""
        self._bundle = bundle
        self._threads = threads
        self._provider = provider
        self._memory_plans = memory_plans or {}
        self._memory_plan = MemoryPlan(1)
        self._sessions: dict[str, InferenceSession] = {}
        self._level = 0
        self._theta: Vector = np.empty(0, np.float32)
        self._optimizer: AdamW | None = None

    def load(self, level: int) -> None:
        if level != self._level:
            self.release()
            self._level = level
            self._memory_plan = memory_plan_of(self._memory_plans, self._bundle, level, self._provider)
        self._theta = np.empty(0, np.float32)
        self._optimizer = None

    def set(self, theta: Vector, training: Training | None = None) -> None:
        self._theta = theta
        self._optimizer = None
        if training is not None:
            decay = expert_decay(self._bundle.expert, theta.size, training.weight_decay)
            self._optimizer = AdamW(training.learning_rate, decay)

    def get(self) -> Vector:
        return self._theta

    def step(self, batch: Batch) -> float:
        if self._optimizer is None:
            raise RuntimeError("step() needs an optimizer: call set(theta, training) first")
        loss, gradient = self.gradient(batch)
        self._theta = self._optimizer.step(self._theta, gradient)
        return loss

    def gradient(self, batch: Batch) -> tuple[float, Vector]:
        """The mean loss of the batch and its gradient (P,). For callers with an optimizer of their own."""
        loss, gradient = 0.0, np.zeros_like(self._theta)
        for inputs in batch.micro_batches(self._memory_plan.micro_batch):
            part_loss, part_gradient = self._run("step", ["loss", "gradient"], theta=self._theta, **inputs)
            loss += float(part_loss)
            gradient += part_gradient
        return loss, gradient

    def predict(self, hidden: Floats) -> Floats:
        (logits,) = self._run("predict", ["logits"], hidden=hidden, theta=self._theta)
        return logits

    def features(self, hidden: Floats) -> Floats:
        (features,) = self._run("predict", ["feature"], hidden=hidden, theta=self._theta)
        return features

    def release(self) -> None:
        if self._sessions:
            self._sessions.clear()
            release_free_memory()

    def _run(self, kind: str, outputs: list[str], **inputs: NDArray[Any]) -> list[Floats]:
        if kind not in self._sessions:
            lean = self._memory_plan.lean
            if lean:
                self.release()
            self._sessions[kind] = self._open(f"{kind}-{self._level}.onnx", prepack=not lean)
        return run(self._sessions[kind], outputs, inputs)

    def _open(self, name: str, prepack: bool) -> InferenceSession:
        return open_session(self._bundle, name, self._threads, prepack, self._provider)


def memory_plan_of(
    memory_plans: Mapping[int, MemoryPlan], bundle: TaskBundle, level: int, provider: str = CPU
) -> MemoryPlan:
    """The plan of the level. Default: see `default_micro_batch`."""
    return memory_plans.get(level) or MemoryPlan(default_micro_batch(bundle.manifest.dims, level, provider))


def default_micro_batch(dims: Dims, level: int, provider: str = CPU) -> int:
    """Samples whose activations for the backward pass take at most ACTIVATION_BYTES, or ACCELERATOR_BYTES.

    On the processor also about PRODUCT_ROWS tokens at most from level 2 on. Level 1 multiplies class tokens only.
    """
    state = 4 * dims.tokens * dims.hidden
    available = ACTIVATION_BYTES if provider in ON_PROCESSOR else ACCELERATOR_BYTES
    fitting = int(available / (state * (LAST_BLOCK_STATES + BLOCK_STATES * (level - 1))))
    if level > 1 and provider in ON_PROCESSOR:
        fitting = min(fitting, round(PRODUCT_ROWS / dims.tokens))
    return max(1, fitting)
