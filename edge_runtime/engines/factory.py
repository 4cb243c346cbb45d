"""Opens the engine that a device trains with."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.engines.base import Engine, MemoryPlan
from edge_runtime.engines.ort_training import OrtTrainingEngine, has_artifacts
from edge_runtime.engines.sessions import CPU
from edge_runtime.engines.step_graph import StepGraphEngine
from fedfmsl.common.onnx_runtime import has_ort_training, require_ort_training
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.setting_types import EngineChoice
from fedfmsl.protocol.task_bundle import TaskBundle


def open_engine(
    choice: EngineChoice,
    bundle: TaskBundle,
    threads: int = 0,
    memory_plans: Mapping[int, MemoryPlan] | None = None,
    provider: str = CPU,
) -> Engine:
    """`auto` selects onnxruntime-training if it is installed and the bundle has its artifacts, else step graphs.
    onnxruntime-training has the CPU's provider only.

    Raises ConfigError if `choice` is ort-training and the package or the artifacts are missing.
    """
    if choice == "step-graph" or (choice == "auto" and not (has_ort_training() and has_artifacts(bundle))):
        return StepGraphEngine(bundle, threads, memory_plans, provider)
    require_ort_training("--engine ort-training")
    if not has_artifacts(bundle):
        raise ConfigError(
            f"--engine ort-training: bundle {bundle.root} has no onnxruntime-training artifacts; "
            "build it with python -m export.build … --ort-training"
        )
    return OrtTrainingEngine(bundle, threads, memory_plans)
