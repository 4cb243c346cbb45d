"""Bundles without weights, and random updates for them, for simulated devices.

The server reads only the manifest and the initial trainables of a bundle, so a run needs no weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.discriminant import second_moments
from fedfmsl.protocol.bundle import (
    MANIFEST,
    Bundle,
    Dims,
    FileEntry,
    ImagePreprocessing,
    LoraSpec,
    Manifest,
    PeftSpec,
    file_sha256,
)
from fedfmsl.protocol.encoding import encode
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import Round, Stage, Sums, Update
from fedfmsl.protocol.task import TASK
from fedfmsl.protocol.task_bundle import TaskBundle, with_numbered_classes

INIT = "init.safetensors"
GATE_WIDTH = 32
STEP = 0.01  # standard deviation of the values of an update
HALF = (0.5, 0.5, 0.5)
VIT_B16_PARAMETERS = 85_798_656


def layout_bundle(
    folder: Path, levels: int = 12, hidden: int = 768, blocks: int = 12, rank: int = 4, classes: int = 100
) -> TaskBundle:
    """Writes a bundle with the layout of ViT-B/16, or of a smaller ViT, and without weights.

    The server and `benchmarks.simulated` can use it. It cannot be trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes: list[tuple[str, str, tuple[int, ...]]] = []
    for block in reversed(range(blocks - levels, blocks)):
        for target in ("query", "value"):
            module = f"encoder.layer.{block}.attention.attention.{target}"
            shapes.append((str(block), f"{module}.lora_A.weight", (rank, hidden)))
            shapes.append((str(block), f"{module}.lora_B.weight", (hidden, rank)))
    lora = Layout.build(shapes)
    gate = Layout.build(
        [
            ("gate", "gate.down.weight", (GATE_WIDTH, hidden)),
            ("gate", "gate.down.bias", (GATE_WIDTH,)),
            ("gate", "gate.up.weight", (2, GATE_WIDTH)),
            ("gate", "gate.up.bias", (2,)),
        ]
    )
    rng = np.random.default_rng(0)
    initial = {name: rng.normal(0, STEP, size) for name, size in (("lora", lora.total), ("gate", gate.total))}
    (folder / INIT).write_bytes(save({name: values.astype(np.float32) for name, values in initial.items()}))
    manifest = Manifest(
        model="layout-only",
        family="vit",
        precision="fp32",
        preprocessing=ImagePreprocessing(size=224, mean=HALF, std=HALF),
        dims=Dims(tokens=197, hidden=hidden, feature=hidden, blocks=blocks),
        lora=LoraSpec(rank=rank, alpha=2 * rank, targets=("query", "value")),
        levels=levels,
        lora_layout=lora.slots,
        gate_layout=gate.slots,
        peft=PeftSpec(
            base="layout-only",
            revision=None,
            prefix="vit",
            layers_pattern="layer",
            head_width=hidden,
            classifier_width=hidden,
        ),
        backbone_parameters=VIT_B16_PARAMETERS,
        files={INIT: FileEntry(size=(folder / INIT).stat().st_size, sha256=file_sha256(folder / INIT))},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    bundle = with_numbered_classes(Bundle.load(folder), classes)
    (folder / TASK).write_bytes(bundle.task.blob)
    return bundle


def update_of(bundle: TaskBundle, device: str, task: Round, level_cap: int) -> tuple[Update, Tensors]:
    """The update of a simulated device. It depends only on device, stage and index in the stage: two runs that count
    the same updates have bit-identical globals."""
    rng = np.random.default_rng([*device.encode(), list(Stage).index(task.stage), task.index])
    samples = 20 + sum(device.encode()) % 100
    level = min(task.level, level_cap)
    tensors: Tensors = {}
    if task.stage is Stage.STATISTICS:
        tensors = _statistics(bundle, samples, rng, bundle.manifest.dims.feature)
    elif task.stage is Stage.HEAD:
        classes, feature = len(bundle.classes), bundle.manifest.dims.feature
        tensors = _head_statistics(bundle, samples, rng, classes if task.sums is Sums.LOGITS else feature)
    elif task.stage is Stage.GLOBAL:
        values = STEP * rng.standard_normal(bundle.expert.size(level), np.float32)
        tensors = encode(bundle.expert, values, task.encoding)
    elif task.stage is Stage.PERSONAL:
        values = STEP * rng.standard_normal(bundle.gate.total, np.float32)
        tensors = encode(bundle.gate, values, task.encoding)
    update = Update(
        run=task.run,
        session=task.session,
        round=task.round,
        device=device,
        stage=task.stage,
        level=level,
        samples=samples,
        metrics={"held_out_global": float(rng.uniform(0.5, 0.9))} if task.stage is Stage.GLOBAL else {},
    )
    return update, tensors


def _head_statistics(bundle: TaskBundle, samples: int, rng: np.random.Generator, width: int) -> Tensors:
    """Of values with the class sums of `_statistics`, and with the same variance in every direction."""
    sums = _statistics(bundle, samples, rng, width)
    counts = sums["class_counts"]
    means = sums["class_sums"] / np.maximum(counts, 1)[:, None]
    spread = (samples / width) ** 0.5 * np.eye(width, dtype=np.float32)
    return {
        "class_sums": sums["class_sums"],
        "class_counts": counts,
        "second_moments": second_moments(np.concatenate([np.sqrt(counts)[:, None] * means, spread])),
    }


def _statistics(bundle: TaskBundle, samples: int, rng: np.random.Generator, width: int) -> Tensors:
    """Of `samples` unit vectors of this width with random classes. All vectors of a class are equal."""
    classes = len(bundle.classes)
    counts = np.bincount(rng.integers(0, classes, samples), minlength=classes)
    directions = rng.standard_normal((classes, width), np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return {
        "class_sums": (counts[:, None] * directions).astype(np.float32),
        "class_counts": counts.astype(np.float32),
        "norm_sum": np.array([samples], np.float32),
    }
