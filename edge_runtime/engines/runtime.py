"""ONNX Runtime, the plain one or that of onnxruntime-training, without torch.

Importing the latter's `onnxruntime` also imports `onnxruntime.training`, and that imports torch wherever there is one,
for parts that no engine needs, and fails without (microsoft/onnxruntime#22070): 3 s and 240 MB. So an empty package of
that name stands there first, and leads to the modules that need no torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

TRAINING = "onnxruntime.training"


def _import() -> Any:
    stand_in = ModuleType(TRAINING)
    stand_in.__path__ = []  # nothing can be found in it while onnxruntime looks
    sys.modules.setdefault(TRAINING, stand_in)
    package = importlib.import_module("onnxruntime")
    folder = Path(package.__file__ or "").parent / "training"
    stand_in.__path__ = [str(folder)]
    return package


def training_api() -> Any:
    """onnxruntime.training.api: Module, Optimizer, CheckpointState."""
    return importlib.import_module(f"{TRAINING}.api")


onnxruntime = _import()
