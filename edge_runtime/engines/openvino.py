"""Graphs of a bundle in OpenVINO, which multiplies in bfloat16 on x86-64 processors that can.

Products in bfloat16 (8 bits of precision) are faster than ONNX Runtime's in float32. Inputs, outputs and trainables
stay float32. OpenVINO is not offered on processors without bfloat16: it is no faster there, and its gradients of LoRA
in float32 were wrong (2026.4.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Floats
from fedfmsl.common.onnx_runtime import every_processor_has

OPENVINO = "openvino"  # its name among the execution providers
DEVICE = "CPU"
BF16 = {"avx512_bf16", "amx_bf16"}  # Linux names


def openvino_version() -> str:
    """Of the installed package; empty if there is none."""
    try:
        return version("openvino")
    except PackageNotFoundError:
        return ""


def offers_openvino() -> bool:
    """Whether OpenVINO is installed, and this processor multiplies in bfloat16. Does not import OpenVINO."""
    return bool(openvino_version()) and every_processor_has(BF16)


class OpenVinoSession:
    """An ONNX file, with the `run` of ONNX Runtime's InferenceSession."""

    def __init__(self, path: Path, threads: int) -> None:
        """`threads` = 0 uses all cores. Raises RuntimeError if OpenVINO cannot read the file."""
        options = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        model = _core().read_model(path)
        self._outputs = [output.get_any_name() for output in model.outputs]  # a compiled model has more names for one
        self._request = _core().compile_model(model, DEVICE, options).create_infer_request()

    def run(self, outputs: list[str], inputs: Mapping[str, NDArray[Any]], options: object = None) -> list[Floats]:
        """Computes all outputs, and returns those that are asked for. `options`, of ONNX Runtime, have no effect."""
        results = self._request.infer(dict(inputs), share_inputs=True).to_tuple()
        return [results[self._outputs.index(name)] for name in outputs]


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()
