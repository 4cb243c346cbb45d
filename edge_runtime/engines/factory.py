"""Which engine a device trains with."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.engines.base import Engine, Fit, StepGraphEngine
from edge_runtime.engines.ort_training import OrtTrainingEngine, carries_artifacts
from fedfmsl.common.ort_training import has_ort_training, require_ort_training
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import EngineChoice


def open_engine(choice: EngineChoice, bundle: Bundle, threads: int, fits: Mapping[int, Fit] | None = None) -> Engine:
    """`auto` is onnxruntime-training where both it and the bundle's artifacts for it are there.

    Raises ConfigError if it is asked for and one of them is missing.
    """
    if choice == "step-graph" or (choice == "auto" and not (has_ort_training() and carries_artifacts(bundle))):
        return StepGraphEngine(bundle, threads, fits)
    require_ort_training("--engine ort-training")
    if not carries_artifacts(bundle):
        raise ConfigError(
            f"--engine ort-training: bundle {bundle.root} holds nothing for it; "
            "build it with python -m export.build … --ort-training"
        )
    return OrtTrainingEngine(bundle, threads, fits)
