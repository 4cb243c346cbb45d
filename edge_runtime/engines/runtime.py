"""Imports ONNX Runtime, the standard distribution or onnxruntime-training, without importing torch.

The `onnxruntime` of onnxruntime-training also imports `onnxruntime.training`. That imports torch if it is installed
(3 s and 240 MB), and fails if it is not (microsoft/onnxruntime#22070). No engine needs those parts. So an empty module
takes the place of `onnxruntime.training` during the import. Its path then leads to the submodules without torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

TRAINING = "onnxruntime.training"


def _import() -> Any:
    placeholder = ModuleType(TRAINING)
    placeholder.__path__ = []  # hides the submodules while onnxruntime is imported
    sys.modules.setdefault(TRAINING, placeholder)
    package = importlib.import_module("onnxruntime")
    folder = Path(package.__file__ or "").parent / "training"
    placeholder.__path__ = [str(folder)]
    return package


def training_api() -> Any:
    """onnxruntime.training.api: Module, Optimizer, CheckpointState."""
    return importlib.import_module(f"{TRAINING}.api")


onnxruntime = _import()
