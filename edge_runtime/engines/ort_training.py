"""`OrtTrainingEngine` trains with onnxruntime-training 1.19.2, on the artifacts that `export.ort_training` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.base import Batch, MemoryPlan, expert_decay
from edge_runtime.engines.memory import release_free_memory
from edge_runtime.engines.runtime import onnxruntime, training_api
from edge_runtime.engines.sessions import InferenceSession, open_session, run, session_options
from edge_runtime.engines.step_graph import memory_plan_of
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.errors import BundleError
from fedfmsl.protocol.messages import EngineName, Training
from fedfmsl.protocol.task_bundle import TaskBundle

OPTIMIZER = "ort-training-optimizer.onnx"


def has_artifacts(bundle: TaskBundle) -> bool:
    return OPTIMIZER in bundle.manifest.files


class TrainingSession:
    """Module, Optimizer and CheckpointState of a level, with the trainables `theta` (P,).

    The bundle's checkpoint holds names without shapes and values. `state.parameters` maps each name of the layout to
    its `data` and `grad`.
    """

    def __init__(self, bundle: TaskBundle, level: int, theta: Vector, learning_rate: float, threads: int) -> None:
        """Raises BundleError if onnxruntime-training cannot read the level's artifacts."""
        api, root = training_api(), bundle.root
        options = session_options(threads, prepack=False)  # Module fails with packed weights
        options.add_free_dimension_override_by_name("C", bundle.expert.slots[0].shape[0])
        try:
            self.state = api.CheckpointState.load_checkpoint(root / f"ort-training-{level}.checkpoint")
            self._module = api.Module(root / f"ort-training-{level}.onnx", self.state, session_options=options)
            self.put(theta)  # before the optimizer, which crashes on parameters without values
            self._optimizer = api.Optimizer(root / OPTIMIZER, self._module)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            reason = str(error).splitlines()[0]
            raise BundleError(f"onnxruntime-training cannot load level {level} of bundle {root}: {reason}") from error
        self._optimizer.set_learning_rate(learning_rate)
        self._order: list[str] = self._module.input_names()

    def put(self, theta: Vector) -> None:
        """Sets all parameters (P,)."""
        values = np.ascontiguousarray(theta)
        wrapped = onnxruntime.OrtValue.ortvalue_from_numpy(values)  # shares the memory of `values`
        self._module.copy_buffer_to_parameters(wrapped._ortvalue, trainable_only=False)

    def get(self) -> Vector:
        theta: Vector = self._module.get_contiguous_parameters(trainable_only=True).numpy()
        return theta

    def add_gradient(self, inputs: dict[str, NDArray[Any]]) -> float:
        """Adds the gradient of a micro-batch to the sum since `drop_gradient`. Returns the loss."""
        return float(self._module(*(inputs[name] for name in self._order)))

    def drop_gradient(self) -> None:
        self._module.lazy_reset_grad()

    def update(self) -> None:
        """Takes one optimizer step along the summed gradient."""
        self._optimizer.step()


class OrtTrainingEngine:
    """Trains with Module and Optimizer of onnxruntime-training, which sum the gradients of micro-batches.

    The optimizer of onnxruntime-training applies one weight decay to all parameters. Only LoRA has weight decay here.
    AdamW's decay multiplies the parameters before the step, so this class does that itself.
    """

    name: EngineName = "ort-training"

    def __init__(
        self, bundle: TaskBundle, threads: int = 0, memory_plans: Mapping[int, MemoryPlan] | None = None
    ) -> None:
        """`threads` = 0 uses all cores. `memory_plans` by level; see `memory_plan_of` for the default."""
        self._bundle = bundle
        self._threads = threads
        self._memory_plans = memory_plans or {}
        self._memory_plan = MemoryPlan(1)
        self._level = 0
        self._theta: Vector = np.empty(0, np.float32)
        self._training: Training | None = None
        self._decay_factors: Vector = np.empty(0, np.float32)  # (P,), of one step
        self._session: TrainingSession | None = None
        self._predict_session: InferenceSession | None = None

    def load(self, level: int) -> None:
        self.set(np.empty(0, np.float32))
        if level != self._level:
            self.release()
            self._level = level
            self._memory_plan = memory_plan_of(self._memory_plans, self._bundle, level)

    def set(self, theta: Vector, training: Training | None = None) -> None:
        self._theta = theta
        self._training = training
        if training is not None:
            decay = expert_decay(self._bundle.expert, theta.size, training.weight_decay)
            self._decay_factors = 1 - np.float32(training.learning_rate) * decay
        self._session = None  # drops the optimizer state, which belongs to the session

    def get(self) -> Vector:
        return self._theta

    def step(self, batch: Batch) -> float:
        if self._training is None:
            raise RuntimeError("step() needs an optimizer: call set(theta, training) first")
        if self._session is None:
            if self._memory_plan.lean:
                self.release()
            rate = self._training.learning_rate
            self._session = TrainingSession(self._bundle, self._level, self._theta, rate, self._threads)
        self._session.drop_gradient()
        loss = sum(self._session.add_gradient(inputs) for inputs in batch.micro_batches(self._memory_plan.micro_batch))
        self._session.put(self._theta * self._decay_factors)
        self._session.update()
        self._theta = self._session.get()
        return loss

    def predict(self, hidden: Floats) -> Floats:
        return self._predict("logits", hidden)

    def features(self, hidden: Floats) -> Floats:
        return self._predict("feature", hidden)

    def _predict(self, output: str, hidden: Floats) -> Floats:
        if self._predict_session is None:
            lean = self._memory_plan.lean
            self._predict_session = open_session(self._bundle, f"predict-{self._level}.onnx", self._threads, not lean)
        (values,) = run(self._predict_session, [output], {"hidden": hidden, "theta": self._theta})
        return values

    def release(self) -> None:
        """Closes the predict session. The training session stays, because it holds the optimizer state."""
        if self._predict_session is not None:
            self._predict_session = None
            release_free_memory()
