"""Compares the graphs of a bundle with torch + PEFT on the whole model. Finds errors in families and graphs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch

from export.reference import loss_and_gradient, random_samples, torch_inputs
from export.weights import Backbone
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.common.onnx_runtime import keep_int8_exact
from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import FP16, Bundle
from fedfmsl.protocol.task_bundle import TaskBundle

# int8 errors on two random samples: DINOv2 0.04, MiniLM 0.22 (on real texts its gradient has a cosine of 0.99 to fp32)
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.3}
BATCH = 2


@dataclass(frozen=True)
class Parity:
    """Largest relative differences at one level."""

    level: int
    loss: float
    gradient: float
    logits: float


def check_parity(bundle: TaskBundle, source: Backbone, level: int, seed: int, kind: str = "") -> Parity:
    """Raises BundleError if loss, gradient or logits at `level` differ from torch + PEFT by more than TOLERANCE.
    `kind`: how the names of the graphs begin, FP16 or ""."""
    manifest = bundle.manifest
    rng = np.random.default_rng(seed)
    samples = random_samples(source, manifest.preprocessing, BATCH, rng)
    labels = rng.integers(0, len(bundle.classes), BATCH)
    theta: Vector = bundle.initial()[0][: bundle.expert.size(level)]
    theta = (theta + rng.normal(0, 0.02, theta.size)).astype(np.float32)
    loss, gradient, logits = loss_and_gradient(
        source,
        manifest.lora,
        manifest.peft,
        bundle.expert,
        level,
        theta,
        torch_inputs(samples, manifest.preprocessing),
        torch.from_numpy(labels),
    )
    (hidden,) = _run(bundle, f"{kind}features.onnx", [f"hidden_{level}"], **{source.family.input: samples})
    ours_loss, ours_gradient = _run(
        bundle,
        f"{kind}step-{level}.onnx",
        ["loss", "gradient"],
        hidden=hidden,
        labels=labels,
        weights=np.full(BATCH, 1 / BATCH, np.float32),
        gate=np.zeros(BATCH, np.float32),
        other=np.full(BATCH, -1e4, np.float32),
        bias=np.zeros(len(bundle.classes), np.float32),
        theta=theta,
    )
    (ours_logits,) = _run(bundle, f"{kind}predict-{level}.onnx", ["logits"], hidden=hidden, theta=theta)
    parity = Parity(
        level,
        loss=abs(float(ours_loss) - loss) / abs(loss),
        gradient=float(np.abs(ours_gradient - gradient).max() / np.abs(gradient).max()),
        logits=float(np.abs(ours_logits - logits).max() / np.abs(logits).max()),
    )
    tolerance = TOLERANCE["fp16" if kind == FP16 else manifest.precision]
    # not their maximum: Python's `max` passes over a NaN, and float16 may overflow in the backward pass alone
    if not all(error <= tolerance for error in (parity.loss, parity.gradient, parity.logits)):
        remedy = "omit --fp16" if kind == FP16 else "this model cannot be exported"
        raise BundleError(f"the {kind}graphs of level {level} differ from torch + PEFT: {parity}; {remedy}")
    return parity


def _run(bundle: Bundle, name: str, outputs: list[str], **inputs: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    keep_int8_exact(options, onnxruntime.__version__)
    session = onnxruntime.InferenceSession(str(bundle.path(name)), options, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(outputs, inputs)
    return results
