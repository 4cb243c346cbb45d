"""`OrtTrainingEngine` trains with onnxruntime-training 1.19.2, on artifacts that it made itself of our graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.base import Batch, Fit, InferenceSession, fit_of, open_session, run, session_options
from edge_runtime.engines.memory import release_free_memory
from edge_runtime.engines.optimizer import expert_decay
from edge_runtime.engines.runtime import onnxruntime, training_api
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import EngineName, Training

OPTIMIZER = "ort-training-optimizer.onnx"


def carries_artifacts(bundle: Bundle) -> bool:
    return OPTIMIZER in bundle.manifest.files


class TrainingSession:
    """Module, Optimizer and CheckpointState of a level, whose nominal checkpoint `theta` (P,) fills.

    `state.parameters` holds each trainable's `data` and `grad` by its name in the layout.
    """

    def __init__(self, bundle: Bundle, level: int, theta: Vector, learning_rate: float, threads: int) -> None:
        """Raises BundleError if onnxruntime-training cannot read the level's artifacts."""
        api, root = training_api(), bundle.root
        options = session_options(threads, prepack=False)  # a Module takes no other
        try:
            self.state = api.CheckpointState.load_checkpoint(root / f"ort-training-{level}.checkpoint")
            self._module = api.Module(root / f"ort-training-{level}.onnx", self.state, session_options=options)
            self.put(theta)  # first of all: an optimizer of parameters without values crashes
            self._optimizer = api.Optimizer(root / OPTIMIZER, self._module)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            what = str(error).splitlines()[0]
            raise BundleError(f"{root}: level {level} is nothing onnxruntime-training can train: {what}") from error
        self._optimizer.set_learning_rate(learning_rate)
        self._order: list[str] = self._module.input_names()

    def put(self, theta: Vector) -> None:
        """Sets all parameters (P,)."""
        values = np.ascontiguousarray(theta)
        wrapped = onnxruntime.OrtValue.ortvalue_from_numpy(values)  # it shares memory, so both must outlive the call
        self._module.copy_buffer_to_parameters(wrapped._ortvalue, trainable_only=False)

    def get(self) -> Vector:
        theta: Vector = self._module.get_contiguous_parameters(trainable_only=True).numpy()
        return theta

    def add_gradient(self, inputs: dict[str, NDArray[Any]]) -> float:
        """Adds the gradient of a micro-batch's loss, which is returned, to what there is since `drop_gradient`."""
        return float(self._module(*(inputs[name] for name in self._order)))

    def drop_gradient(self) -> None:
        self._module.lazy_reset_grad()

    def update(self) -> None:
        """A step of the optimizer along the gradient."""
        self._optimizer.step()


class OrtTrainingEngine:
    """Module and Optimizer of onnxruntime-training, in micro-batches whose gradients they add up.

    Its AdamW decays all parameters or none. Decay that does not go through the gradient is only a factor on the
    parameters before the step, so that is done here.
    """

    name: EngineName = "ort-training"

    def __init__(self, bundle: Bundle, threads: int, fits: Mapping[int, Fit] | None = None) -> None:
        """`fits` by level; by default as for the step graphs."""
        self._bundle = bundle
        self._threads = threads
        self._fits = fits or {}
        self._fit = Fit(1)
        self._level = 0
        self._theta: Vector = np.empty(0, np.float32)
        self._training: Training | None = None
        self._kept: Vector = np.empty(0, np.float32)  # of each parameter, by the decay of a step
        self._session: TrainingSession | None = None
        self._predict: InferenceSession | None = None

    def load(self, level: int) -> None:
        self.set(np.empty(0, np.float32))
        if level != self._level:
            self.release()
            self._level = level
            self._fit = fit_of(self._fits, self._bundle, level)

    def set(self, theta: Vector, training: Training | None = None) -> None:
        self._theta = theta
        self._training = training
        if training is not None:
            decay = expert_decay(self._bundle.expert, theta.size, training.weight_decay)
            self._kept = 1 - np.float32(training.learning_rate) * decay
        self._session = None  # the optimizer's state cannot be had without its session

    def get(self) -> Vector:
        return self._theta

    def step(self, batch: Batch) -> float:
        if self._training is None:
            raise RuntimeError("step() needs an optimizer: call set(theta, training) first")
        if self._session is None:
            if self._fit.lean:
                self.release()
            rate = self._training.learning_rate
            self._session = TrainingSession(self._bundle, self._level, self._theta, rate, self._threads)
        self._session.drop_gradient()
        loss = sum(self._session.add_gradient(inputs) for inputs in batch.micro_batches(self._fit.micro_batch))
        self._session.put(self._theta * self._kept)
        self._session.update()
        self._theta = self._session.get()
        return loss

    def predict(self, hidden: Floats) -> Floats:
        if self._predict is None:
            lean = self._fit.lean
            self._predict = open_session(self._bundle, f"predict-{self._level}.onnx", self._threads, not lean)
        (logits,) = run(self._predict, ["logits"], {"hidden": hidden, "theta": self._theta})
        return logits

    def release(self) -> None:
        """The training session stays: the optimizer's state cannot be had without it."""
        if self._predict is not None:
            self._predict = None
            release_free_memory()
