"""ONNX Runtime sessions with the options that devices need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from edge_runtime.engines.openvino import OPENVINO, OpenVinoSession, offers_openvino
from edge_runtime.engines.runtime import onnxruntime
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.common.onnx_runtime import keep_int8_exact
from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import FP16, Bundle

CPU = "cpu"
ON_PROCESSOR = (CPU, OPENVINO)  # providers that compute in the memory and with the caches of the processor
IN_FP16 = "-fp16"  # ends the name of a provider that computes the graphs with products in float16, like "cuda-fp16"
PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}  # TF32 keeps 10 bits; states agree with the CPU's

UNAVAILABLE = ("the installed ONNX Runtime has no execution provider", "ONNX Runtime cannot start")  # errors begin so

InferenceSession: TypeAlias = Any  # the class belongs to the installed ONNX Runtime distribution


def open_session(
    bundle: Bundle, name: str, threads: int, prepack: bool = True, provider: str = CPU
) -> InferenceSession:
    """A session of the bundle's graph `name`, or with products in float16 if the provider's name ends with IN_FP16.
    Raises BundleError as `open_model` does."""
    if provider.endswith(IN_FP16):
        name, provider = f"{FP16}{name}", provider.removesuffix(IN_FP16)
    return open_model(bundle.path(name), threads, prepack, provider)


def open_model(path: Path, threads: int, prepack: bool = True, provider: str = CPU) -> InferenceSession:
    """A session of an ONNX file. `threads` = 0 uses all cores. Nodes that `provider` does not support run on the CPU.
    `prepack`: see `session_options`.

    Raises BundleError if ONNX Runtime or OpenVINO cannot read the file or start the provider.
    """
    if provider == OPENVINO and offers_openvino():
        try:
            return OpenVinoSession(path, threads)
        except RuntimeError as error:
            raise BundleError(f"OpenVINO cannot load {path}: {_last_line(error)}") from error
    options = session_options(threads, prepack)
    if provider != CPU and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's libraries from Python packages, where the system has none
    if provider not in map(short_name, onnxruntime.get_available_providers()):
        raise BundleError(f"{UNAVAILABLE[0]} {provider!r}")
    wanted = list(dict.fromkeys([onnx_runtime_name(provider), onnx_runtime_name(CPU)]))
    settings = [PROVIDER_OPTIONS.get(name, {}) for name in wanted]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted, provider_options=settings)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise BundleError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from error
    if session.get_providers()[0] != wanted[0]:  # ONNX Runtime goes on with the CPU and only logs why
        raise BundleError(f"{UNAVAILABLE[1]} {wanted[0]}; its libraries or the device are missing")
    return session


def _last_line(error: Exception) -> str:
    """OpenVINO's errors name its own source files first, and the reason last."""
    return [line for line in str(error).splitlines() if line.strip()][-1].strip()


def onnx_runtime_name(provider: str) -> str:
    """ONNX Runtime's name of a provider, like `CUDAExecutionProvider` of `cuda`. Unknown names stay as they are."""
    return next((name for name in onnxruntime.get_available_providers() if short_name(name) == provider), provider)


def short_name(provider: str) -> str:
    """The name in settings, like `cuda` for `CUDAExecutionProvider`."""
    return provider.removesuffix("ExecutionProvider").lower()


def session_options(threads: int, prepack: bool = True) -> Any:
    """With `prepack`, weights are copied into the order in which matrix products read them: faster, more memory."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # The arena avoids page faults on large tensors (a third of a step's time). Memory patterns would double its size.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves the cores to other processes
    keep_int8_exact(options, onnxruntime.__version__)
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    return options


def run(session: InferenceSession, outputs: list[str], inputs: Mapping[str, NDArray[Any]]) -> list[Floats]:
    """With onnxruntime-training only the nodes that `outputs` depend on are computed. The standard package computes all
    nodes, and has no option for less (measured with 1.23 to 1.32)."""
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    results: list[Floats] = session.run(outputs, dict(inputs), options)
    return results
