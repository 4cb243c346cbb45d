"""Is onnxruntime-training here? It is another distribution of the package `onnxruntime`, so either it or the plain one
is found, and nothing needs importing to know which."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fedfmsl.errors import ConfigError

INSTALL = "pip install --no-deps --target ort-training onnxruntime-training-cpu==1.19.2"


def has_ort_training() -> bool:
    spec = find_spec("onnxruntime")
    return bool(spec and spec.origin and (Path(spec.origin).parent / "training").is_dir())


def require_ort_training(option: str) -> None:
    """Raises ConfigError if the package that `option` needs is not installed."""
    if not has_ort_training():
        raise ConfigError(
            f"{option} needs onnxruntime-training (x86-64, Python 3.12 or older): {INSTALL}, then the same command "
            "with PYTHONPATH=ort-training, for the plain ONNX Runtime is a package of the same name"
        )
