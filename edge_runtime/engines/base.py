"""Engines train and evaluate experts. `StepGraphEngine` runs a bundle's step graphs on plain ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.memory import release_free_memory
from edge_runtime.engines.optimizer import AdamW, expert_decay
from edge_runtime.engines.runtime import onnxruntime
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.common.int8 import keep_int8_exact
from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import Bundle, Dims
from fedfmsl.protocol.messages import EngineName, Training

InferenceSession: TypeAlias = Any  # of whichever ONNX Runtime there is
ACTIVATION_BYTES = 128 * 2**20
BLOCK_STATES, LAST_BLOCK_STATES = 15, 4  # what a block keeps, in hidden states (B, N, D): measured on ViT-B/16


@dataclass(frozen=True)
class Batch:
    """A training batch. The loss of image i is −log(exp(gateᵢ) p(yᵢ) + exp(otherᵢ)), p the softmax of logits + bias.

    `hidden` (B, N, D), `labels` (B,), `gate` and `other` (B,), `bias` (C,).
    """

    hidden: Floats
    labels: NDArray[np.int64]
    gate: Floats
    other: Floats
    bias: Floats

    def micro_batches(self, size: int) -> Iterator[dict[str, NDArray[Any]]]:
        """A step's inputs for at most `size` images each, their weights being shares of the batch's mean."""
        images = len(self.labels)
        for start in range(0, images, size):
            part = slice(start, start + size)
            yield {
                "hidden": self.hidden[part],
                "labels": self.labels[part],
                "weights": np.full(len(self.labels[part]), 1 / images, np.float32),
                "gate": self.gate[part],
                "other": self.other[part],
                "bias": self.bias,
            }


@dataclass(frozen=True)
class Fit:
    """What a level may take of the device's memory: images at once, and, if it has to be `lean`, one open graph at a
    time whose weights are not packed for speed, which would be a second copy of them."""

    micro_batch: int
    lean: bool = False


class Engine(Protocol):
    """Trains and evaluates one expert at one level at a time, on the hidden states below that level's suffix."""

    name: EngineName

    def load(self, level: int) -> None:
        """Makes `level` the level of everything that follows; parameters and optimizer state are dropped."""

    def set(self, theta: Vector, training: Training | None = None) -> None:
        """Sets the trainables (P,), with a fresh AdamW by the settings of `training` if they are to be trained."""

    def get(self) -> Vector: ...

    def step(self, batch: Batch) -> float:
        """One optimizer step on the batch's mean loss, which is returned."""

    def predict(self, hidden: Floats) -> Floats:
        """Class logits (B, C) of hidden states (B, N, D)."""

    def release(self) -> None:
        """Frees what memory it can; everything that was set stays."""


class StepGraphEngine:
    """Runs the gradient as an ordinary inference graph, in micro-batches, with AdamW outside it."""

    name: EngineName = "step-graph"

    def __init__(self, bundle: Bundle, threads: int, fits: Mapping[int, Fit] | None = None) -> None:
        """`fits` by level; see `fit_of` for the default."""
        self._bundle = bundle
        self._threads = threads
        self._fits = fits or {}
        self._fit = Fit(1)
        self._sessions: dict[str, InferenceSession] = {}
        self._level = 0
        self._theta: Vector = np.empty(0, np.float32)
        self._optimizer: AdamW | None = None

    def load(self, level: int) -> None:
        if level != self._level:
            self.release()
            self._level = level
            self._fit = fit_of(self._fits, self._bundle, level)
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
        loss, gradient = 0.0, np.zeros_like(self._theta)
        for inputs in batch.micro_batches(self._fit.micro_batch):
            part_loss, part_gradient = self._run("step", ["loss", "gradient"], theta=self._theta, **inputs)
            loss += float(part_loss)
            gradient += part_gradient
        self._theta = self._optimizer.step(self._theta, gradient)
        return loss

    def predict(self, hidden: Floats) -> Floats:
        (logits,) = self._run("predict", ["logits"], hidden=hidden, theta=self._theta)
        return logits

    def release(self) -> None:
        if self._sessions:
            self._sessions.clear()
            release_free_memory()

    def _run(self, kind: str, outputs: list[str], **inputs: NDArray[Any]) -> list[Floats]:
        if kind not in self._sessions:
            lean = self._fit.lean
            if lean:
                self.release()
            self._sessions[kind] = open_session(self._bundle, f"{kind}-{self._level}.onnx", self._threads, not lean)
        return run(self._sessions[kind], outputs, inputs)


def fit_of(fits: Mapping[int, Fit], bundle: Bundle, level: int) -> Fit:
    """The level's, or else as many images at once as keep its activations below ACTIVATION_BYTES."""
    return fits.get(level) or Fit(default_micro_batch(bundle.manifest.dims, level))


def default_micro_batch(dims: Dims, level: int) -> int:
    """Images whose activations, kept for the way back, take at most ACTIVATION_BYTES. Smaller ones cost little time,
    as long as a product still has hundreds of rows."""
    state = 4 * dims.tokens * dims.hidden
    return max(1, int(ACTIVATION_BYTES / (state * (LAST_BLOCK_STATES + BLOCK_STATES * (level - 1)))))


def open_session(bundle: Bundle, name: str, threads: int, prepack: bool = True) -> InferenceSession:
    """Raises BundleError if ONNX Runtime cannot read the graph."""
    return session_for(bundle.path(name), threads, prepack)


def session_for(path: Path, threads: int, prepack: bool = True) -> InferenceSession:
    """Raises BundleError if ONNX Runtime cannot read the file."""
    options = session_options(threads, prepack)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise BundleError(f"{path} is not a graph ONNX Runtime can run: {str(error).splitlines()[0]}") from error


def session_options(threads: int, prepack: bool = True) -> Any:
    """With `prepack` weights are copied into the order that products read them in."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # The arena saves the page faults of large tensors (a third of a step's time); patterns would hold memory twice.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # devices have other things to do
    keep_int8_exact(options, onnxruntime.__version__)
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    return options


def run(session: InferenceSession, outputs: list[str], inputs: Mapping[str, NDArray[Any]]) -> list[Floats]:
    """Runs only what `outputs` need."""
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    results: list[Floats] = session.run(outputs, dict(inputs), options)
    return results
