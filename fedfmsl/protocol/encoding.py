"""Encodings of the values of an update: fp32, fp16, or int8 with a scale per tensor.

The sender adds the rounding error to its next update (error feedback, see `edge_runtime.training.updates`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Tensors, Vector
from fedfmsl.algorithms.steps import Steps, Values, dense
from fedfmsl.errors import MessageError
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import Encoding

SUMS = "sums"  # name of the only tensor (P,) of an update of secure sums: fixed-point numbers
SCALES = "scales"  # name of a tensor (k,): the scale of each int8 tensor, in the order of the layout
_STEPS = 127
_FP16_MAX = float(np.finfo(np.float16).max)
_LARGEST_SCALE = float(np.finfo(np.float32).max) / 256  # products with 8-bit integers are finite in float32


def encode(layout: Layout, vector: Vector, encoding: Encoding) -> Tensors:
    """The tensors of a vector (P,), which may have only the first slots of the layout.

    Values are clipped to the range of the encoding. `decode` refuses values that are not finite.
    """
    return _CODECS[encoding][0](layout, vector)


def decode(layout: Layout, tensors: Tensors, encoding: Encoding) -> Vector:
    """The inverse of `encode`.

    Raises MessageError unless the tensors are the first slots of this layout, with the right shapes and types, and
    finite.
    """
    return dense(encoded(layout, tensors, encoding))


def encoded(layout: Layout, tensors: Tensors, encoding: Encoding) -> Values:
    """The vector of `decode`, and of int8 its steps. Raises MessageError as `decode` does."""
    return _CODECS[encoding][1](layout, tensors)


def _to_fp16(layout: Layout, vector: Vector) -> Tensors:
    return {
        name: np.clip(tensor, -_FP16_MAX, _FP16_MAX).astype(np.float16) for name, tensor in layout.split(vector).items()
    }


def _from_fp16(layout: Layout, tensors: Tensors) -> Vector:
    return layout.join(tensors, np.float16)


def _to_int8(layout: Layout, vector: Vector) -> Tensors:
    """Symmetric, rounded to the nearest of -127 … 127 steps."""
    encoded: dict[str, NDArray[np.generic]] = {}
    scales = []
    for name, tensor in layout.split(vector).items():
        step = np.abs(tensor).max() / np.float32(_STEPS)
        # rounded up, so that the largest value is within 127 steps despite rounding, and no scale is zero
        scale = np.minimum(np.nextafter(step, np.float32(np.inf)), np.float32(_LARGEST_SCALE))
        with np.errstate(invalid="ignore"):  # `decode` refuses a scale that is not a number
            steps = np.rint(tensor / np.float64(scale))
            encoded[name] = np.clip(steps, -_STEPS, _STEPS).astype(np.int8)
        scales.append(scale)
    return {**encoded, SCALES: np.array(scales, np.float32)}


def _from_int8(layout: Layout, tensors: Tensors) -> Steps:
    steps = {name: tensor for name, tensor in tensors.items() if name != SCALES}
    scales = tensors.get(SCALES)
    if scales is None or scales.dtype != np.float32 or scales.shape != (len(steps),):
        found = "missing" if scales is None else f"{scales.dtype}{list(scales.shape)}"
        raise MessageError(f"tensor {SCALES!r} is {found}, expected float32[{len(steps)}]")
    factors = np.asarray(scales, np.float64)
    if not all(0 <= factor <= _LARGEST_SCALE for factor in factors.tolist()):
        raise MessageError(f"tensor {SCALES!r} has values that are not finite, negative or too large")
    slots = layout.checked(steps, np.int8)
    return Steps(tuple(np.asarray(steps[slot.name], np.int8).ravel() for slot in slots), factors, layout.ends)


_Codec = tuple[Callable[[Layout, Vector], Tensors], Callable[[Layout, Tensors], Values]]
_CODECS: dict[Encoding, _Codec] = {
    Encoding.FP32: (Layout.split, Layout.join),
    Encoding.FP16: (_to_fp16, _from_fp16),
    Encoding.INT8: (_to_int8, _from_int8),
}
