"""Bundles of models of real size with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from export.bundle import build_bundle
from export.pipeline import write_task
from export.weights import load_backbone
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.setting_types import Precision
from fedfmsl.protocol.task import Task
from support.samples import CLASSES


def export(
    out: Path,
    model: str,
    weights: str | None = None,
    *,
    levels: int,
    classes: Sequence[str] = CLASSES,
    image_size: int | None = None,
    precision: Precision = "fp32",
) -> Path:
    """What `python -m export.build` writes for a device with plain ONNX Runtime."""
    source = load_backbone(model, weights, len(classes), image_size, None, 0)
    for _ in build_bundle(source, levels, source.family.lora(4), out, 0, precision, False):
        pass
    bundle = Bundle.load(out)
    write_task(bundle, Task.of(bundle.sha256, classes, "the test"))
    return out
