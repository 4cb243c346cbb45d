"""Bundles of the tiny backbones, and what tests compute with them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.sessions import open_session, run
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.common.onnx_runtime import has_ort_training
from fedfmsl.protocol.bundle import TOKENIZER, Bundle
from fedfmsl.protocol.setting_types import Precision
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle, with_numbered_classes
from support.samples import CLASSES
from support.shared_folders import fingerprint, made_once

if TYPE_CHECKING:
    from export.weights import Backbone

IMAGE_SIZE = 32
LAYERS = 3
MAX_TOKENS = 12
RANK = 4
FEATURE = 20  # values of CLIP's features
_ROOT = Path(__file__).parents[2]
_SOURCES = ("export", "fedfmsl", "edge_runtime/engines", "tests/support")  # what the bytes of a bundle depend on
_PACKAGES = ("numpy", "onnx", "onnxruntime", "optimum", "peft", "safetensors", "tokenizers", "torch", "transformers")

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Built:
    """A bundle with its task, and the transformers folder that it was built from."""

    weights: Path
    bundle: TaskBundle
    seed: int = 0

    @cached_property
    def source(self) -> Backbone:
        """The torch model, loaded when it is first used: torch takes seconds to import."""
        from export.weights import load_backbone

        classes = len(self.bundle.classes)
        return load_backbone(str(self.weights), None, classes, _size(self.weights), None, self.seed)


def with_names(built: Built, names: Sequence[str]) -> Built:
    """The same bundle with other classes."""
    return replace(built, bundle=TaskBundle(built.bundle, Task.of(built.bundle.sha256, names, "the test")))


def _size(weights: Path) -> int:
    return MAX_TOKENS if (weights / TOKENIZER).is_file() else IMAGE_SIZE


def build(
    weights: Path,
    out: Path,
    levels: int | None = None,
    classes: Sequence[str] = CLASSES,
    seed: int = 0,
    precision: Precision = "fp32",
    fp16: bool = False,
) -> Built:
    """Builds the bundle of a transformers folder, at IMAGE_SIZE or MAX_TOKENS. It has a zero-shot head if the model has
    a text tower, and the files of onnxruntime-training if the tests run with that engine."""
    from export.bundle import build_bundle
    from export.pipeline import write_task
    from export.weights import load_backbone
    from export.zero_shot import TEMPLATES, zero_shot_head

    source = load_backbone(str(weights), None, len(classes), _size(weights), None, seed)
    zero_shot = zero_shot_head(source, classes, TEMPLATES) if source.family.text_tower else None
    lora = source.family.lora(RANK)
    ort_training = precision == "fp32" and has_ort_training()
    for _ in build_bundle(source, levels, lora, out, seed, precision, ort_training, fp16):
        pass
    bundle = Bundle.load(out)
    return Built(weights, write_task(bundle, Task.of(bundle.sha256, classes, "the test", zero_shot)), seed)


def with_classes(built: Built, count: int) -> Built:
    """The same bundle with another number of classes."""
    return replace(built, bundle=with_numbered_classes(built.bundle, count))


def shared_weights(name: str) -> Path:
    """The tiny backbone `name` (vit, dinov2, deit, clip or bert) as a transformers folder. Read only: copy it to change
    it."""

    def write(folder: Path) -> None:
        from support import tiny_models

        getattr(tiny_models, f"write_{name}")(folder)

    return made_once(_shared() / "weights" / f"tiny-{name}", write)


@cache
def shared_bundle(name: str, fp16: bool = False) -> Built:
    """Its bundle at every level, with graphs in float16 if wanted. All workers and later runs use the same folder. It
    is built again when the code that it depends on changes. Read only: copy it to change it."""
    weights = shared_weights(name)
    made = made_once(
        _shared() / "bundles" / (f"{name}-fp16" if fp16 else name), lambda folder: build(weights, folder, fp16=fp16)
    )
    bundle = TaskBundle.load(made)
    bundle.verify()
    return Built(weights, bundle)


@cache
def _shared() -> Path:
    engine = "ort-training" if has_ort_training() else "plain"
    key = fingerprint([_ROOT / source for source in _SOURCES], _PACKAGES)
    folder = _ROOT / ".pytest_cache" / "bundles" / f"{engine}-{key}"
    for old in folder.parent.glob("*"):
        if old != folder and old.stat().st_mtime < time.time() - 86_400:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def random_samples(built: Built, size: int, seed: int) -> NDArray[Any]:
    """`size` samples as the bundle's graphs take them, pixels (B, S, S, 3) or tokens (B, N)."""
    from export import reference

    preprocessing = built.bundle.manifest.preprocessing
    return reference.random_samples(built.source, preprocessing, size, np.random.default_rng(seed))


def as_input(built: Built, samples: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Under the name that the bundle's graphs have for them."""
    return {built.source.family.input: samples}


def random_theta(bundle: TaskBundle, level: int, seed: int) -> Vector:
    """Trainables of a level, none of them zero."""
    theta = bundle.initial()[0][: bundle.expert.size(level)]
    return np.asarray(theta + np.random.default_rng(seed).normal(0, 0.1, theta.size), np.float32)


def run_graph(bundle: Bundle, name: str, outputs: Sequence[str], **inputs: NDArray[Any]) -> list[Floats]:
    return run(open_session(bundle, name, threads=1), list(outputs), inputs)


def hidden_of(built: Built, samples: NDArray[Any], level: int) -> Floats:
    """Hidden states below the suffix of a level, nothing trained underneath (B, N, D)."""
    return run_graph(built.bundle, "features.onnx", [f"hidden_{level}"], **as_input(built, samples))[0]


def relative_error(ours: NDArray[Any] | float, theirs: NDArray[Any] | float) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
