"""What an execution provider computes of random samples, and whether that agrees with the CPU (ours)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from edge_runtime.engines.base import Batch
from edge_runtime.engines.openvino import OPENVINO, offers_openvino
from edge_runtime.engines.sessions import IN_FP16, open_session, run
from edge_runtime.engines.step_graph import StepGraphEngine
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.protocol.bundle import ImagePreprocessing
from fedfmsl.protocol.layout import HEAD
from fedfmsl.protocol.task_bundle import TaskBundle

SAMPLES = 4
TOKENS = 10  # ids that every vocabulary has
SPREAD = 0.02  # standard deviation of what is added to the trainables, so that no gradient is zero
LEVEL = 2  # the first level whose step has a backward pass through a whole block
REPEATS = 3
GRADIENT = "gradient"  # the names of its parts begin so

Outputs = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Bounds:
    """Of the differences to the CPU. `error`: of hidden states, features, logits and loss, in the Euclidean norm.
    `cosine`: the least one between gradients of the head, or of one block."""

    error: float = 1e-3
    cosine: float = 0.9999


# bfloat16 has 8 bits. Measured: errors of 0.007, cosines of 0.9999 with ViT-B/16. With int8 weights: 0.05, 0.9993 with
# ViT-B/16 and 0.991 with MiniLM.
IN_BFLOAT16 = Bounds(error=0.02, cosine=0.99)
# float16 has 11 bits. Measured: errors of 0.001, cosines of 0.9999 at every level with DINOv2 ViT-S/14 and ViT-B/16.
IN_FLOAT16 = Bounds(error=0.005, cosine=0.999)


def bounds_of(provider: str) -> Bounds:
    """Those of the precision in which `open_session` computes. onnxruntime-openvino, which is used where the package
    openvino is not, computes in float32."""
    if provider == OPENVINO and offers_openvino():
        return IN_BFLOAT16
    return IN_FLOAT16 if provider.endswith(IN_FP16) else Bounds()


class Trial(BaseModel):
    """`refused`: why the provider is not used; empty if it may be. `temporary`: it may work at the next start, for
    example because memory was short. `seconds` of its feature pass, prediction and step together."""

    refused: str = ""
    temporary: bool = False
    seconds: float = 0.0


def try_provider(bundle: TaskBundle, provider: str, threads: int) -> tuple[Trial, dict[str, Floats]]:
    """What the provider computes: `hidden` (B, N, D), `feature` (B, F), `logits` (B, C), `loss` (1,) and the gradient
    of each part, because the head's is so large that it hides the others. The seconds of the trial are the least of
    REPEATS turns, after a first one that is not counted.

    Raises BundleError if the provider cannot be started.
    """
    level = min(LEVEL, bundle.manifest.levels)
    rng = np.random.default_rng(0)
    session = open_session(bundle, "features.onnx", threads, provider=provider)
    engine = StepGraphEngine(bundle, threads, provider=provider)
    engine.load(level)
    initial = bundle.initial()[0][: bundle.expert.size(level)]
    engine.set(initial + SPREAD * rng.standard_normal(initial.size, np.float32))  # the head starts at zero
    inputs, labels = random_inputs(bundle, SAMPLES, rng), rng.integers(0, len(bundle.classes), SAMPLES)
    outputs, seconds = dict[str, Floats](), []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        hidden, feature = run(session, [f"hidden_{level}", "pooled"], inputs)
        logits = engine.predict(hidden)
        loss, gradient = engine.gradient(Batch.cross_entropy(hidden, labels, len(bundle.classes)))
        seconds.append(time.perf_counter() - started)
        outputs = {"hidden": hidden, "feature": feature, "logits": logits, "loss": np.array([loss], np.float32)}
        parts = bundle.expert.parts_of(level)
        outputs |= {f"{GRADIENT} of {_part_name(part)}": gradient[at] for part, at in parts.items()}
    return Trial(seconds=min(seconds[1:])), outputs


def _part_name(part: str) -> str:
    return f"the {part}" if part == HEAD else f"block {part}"


def random_inputs(bundle: TaskBundle, samples: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """The input of the graph of features for random images or texts."""
    preprocessing = bundle.manifest.preprocessing
    if isinstance(preprocessing, ImagePreprocessing):
        shape = (samples, preprocessing.size, preprocessing.size, 3)
        return {"pixels": rng.integers(0, 256, shape, np.uint8)}
    tokens = rng.integers(0, TOKENS, (samples, preprocessing.max_tokens))
    return {"tokens": np.where(tokens == preprocessing.pad_id, preprocessing.pad_id + 1, tokens).astype(np.int64)}


def disagreement(reference: Outputs, outputs: Outputs, bounds: Bounds) -> str:
    """Why `outputs` are not those of the CPU within the bounds, or ""."""
    for name in reference:
        expected, found = (np.asarray(each[name], np.float64) for each in (reference, outputs))
        if found.shape != expected.shape:
            return f"its {name} has shape {found.shape}, not {expected.shape}"
        if not np.isfinite(found).all():
            return f"its {name} is not finite"
        if name.startswith(GRADIENT):
            if not (similarity := cosine(found, expected)) >= bounds.cosine:
                return f"its {name} has cosine {similarity:.5f} to the CPU's, less than {bounds.cosine}"
        elif not (error := relative_error(found, expected)) <= bounds.error:
            return f"its {name} differs from the CPU's by {error:.2g}, more than {bounds.error}"
    return ""


def cosine(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Between two vectors; 0 if one is zero."""
    norms = np.linalg.norm(found) * np.linalg.norm(expected)
    return float(found @ expected / norms) if norms else 0.0


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """In the Euclidean norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
