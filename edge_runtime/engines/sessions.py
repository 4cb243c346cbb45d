"""ONNX Runtime sessions with the options that devices need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from edge_runtime.engines.runtime import onnxruntime
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.common.onnx_runtime import keep_int8_exact
from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import Bundle

InferenceSession: TypeAlias = Any  # the class belongs to the installed ONNX Runtime distribution


def open_session(bundle: Bundle, name: str, threads: int, prepack: bool = True) -> InferenceSession:
    """A session of the bundle's graph `name`. Raises BundleError if ONNX Runtime cannot read it."""
    return open_model(bundle.path(name), threads, prepack)


def open_model(path: Path, threads: int, prepack: bool = True) -> InferenceSession:
    """A session of an ONNX file. `threads` = 0 uses all cores. Raises BundleError if ONNX Runtime cannot read it."""
    options = session_options(threads, prepack)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise BundleError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from error


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
    """Runs only the nodes that `outputs` depend on."""
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    results: list[Floats] = session.run(outputs, dict(inputs), options)
    return results
