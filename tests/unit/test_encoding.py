"""Encodings of updates: rounding, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedfmsl.errors import MessageError
from fedfmsl.protocol.encoding import SCALES, decode, encode
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import Encoding, Globals
from fedfmsl.protocol.tensors import pack, unpack

LAYOUT = Layout.build([("head", "w", (2, 3)), ("head", "b", (2,)), ("1", "a", (4,)), ("0", "c", (1, 2))])
SIZES = (8, 12, 14)
COARSE = (Encoding.FP16, Encoding.INT8)


def vectors(largest: float = 2.0**100) -> st.SearchStrategy[Any]:
    values = st.floats(-largest, largest, width=32)
    return st.sampled_from(SIZES).flatmap(lambda size: arrays.arrays(np.float32, size, elements=values))


@given(vectors())
def test_fp32_keeps_every_bit(vector: Any) -> None:
    blob = pack(Globals(run="r", kind="k"), encode(LAYOUT, vector, Encoding.FP32))
    assert decode(LAYOUT, unpack(blob, Globals)[1], Encoding.FP32).tobytes() == vector.tobytes()


@given(vectors(60_000.0))
def test_fp16_is_the_nearest_half_precision_value(vector: Any) -> None:
    blob = pack(Globals(run="r", kind="k"), encode(LAYOUT, vector, Encoding.FP16))
    decoded = decode(LAYOUT, unpack(blob, Globals)[1], Encoding.FP16)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, vector.astype(np.float16).astype(np.float32))


def test_fp16_clips_to_its_range() -> None:
    vector = np.array([1e5, -1e30, 65_504, 1, 0, 0, 0, 0], np.float32)
    assert decode(LAYOUT, encode(LAYOUT, vector, Encoding.FP16), Encoding.FP16)[:4].tolist() == [
        65504,
        -65504,
        65504,
        1,
    ]


@settings(max_examples=300)
@given(vectors())
def test_the_error_of_int8_is_at_most_half_a_step(vector: Any) -> None:
    blob = pack(Globals(run="r", kind="k"), encode(LAYOUT, vector, Encoding.INT8))
    tensors = unpack(blob, Globals)[1]
    decoded = decode(LAYOUT, tensors, Encoding.INT8)
    assert decoded.shape == vector.shape
    slots = [slot for slot in LAYOUT.slots if slot.end <= vector.size]
    for slot, scale in zip(slots, np.asarray(tensors[SCALES], np.float64), strict=True):
        part = slice(slot.offset, slot.end)
        peak = np.abs(vector[part]).max()
        error = np.abs(vector[part].astype(np.float64) - decoded[part]).max()
        assert error <= scale / 2 + peak * 1e-7
        assert scale == pytest.approx(peak / 127, rel=1e-6, abs=2e-45)


def test_int8_of_zeros_is_zeros_and_a_quarter_of_the_bytes() -> None:
    tensors = encode(LAYOUT, np.zeros(14, np.float32), Encoding.INT8)
    assert not decode(LAYOUT, tensors, Encoding.INT8).any()
    wide = Layout.build([("head", "w", (1000, 10))])
    sizes = [len(pack(Globals(run="r", kind="k"), encode(wide, np.ones(10_000, np.float32), e))) for e in Encoding]
    assert sizes[0] > 1.9 * sizes[1] > 3.6 * sizes[2]


@pytest.mark.parametrize("encoding", COARSE)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_stays_so(encoding: Encoding, value: float) -> None:
    vector = np.array([1, value, 2, 3, 4, 5, 6, 7], np.float32)
    tensors = encode(LAYOUT, vector, encoding)
    if np.isnan(value):
        with pytest.raises(MessageError, match="finite"):
            decode(LAYOUT, tensors, encoding)
    else:
        assert np.sign(decode(LAYOUT, tensors, encoding)[1]) == np.sign(value)


def changed(encoding: Encoding, **change: Any) -> dict[str, Any]:
    """A valid encoding of ones at the first level with some tensors replaced; None removes one."""
    tensors = {**encode(LAYOUT, np.ones(12, np.float32), encoding), **change}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize("encoding", Encoding)
def test_tensors_of_another_name_shape_or_type_are_refused_by_name(encoding: Encoding) -> None:
    dtype = {Encoding.FP32: np.float32, Encoding.FP16: np.float16, Encoding.INT8: np.int8}[encoding]
    for wrong in (np.ones(5, dtype), np.ones((2, 2), dtype), np.ones(4, np.float64), np.ones(4, np.int32), np.ones(())):
        with pytest.raises(MessageError, match="'a'"):
            decode(LAYOUT, changed(encoding, a=wrong), encoding)
    for names in ({"x": np.ones(4, dtype)}, {"a": None, "c": np.ones((1, 2), dtype)}, {"b": None}):
        with pytest.raises(MessageError):
            decode(LAYOUT, changed(encoding, **names), encoding)


@pytest.mark.parametrize("encoding", [Encoding.FP32, Encoding.FP16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_refused_by_name(encoding: Encoding, value: float) -> None:
    wrong = np.full(4, value, np.float32 if encoding is Encoding.FP32 else np.float16)
    with pytest.raises(MessageError, match="'a' has values that are not finite"):
        decode(LAYOUT, changed(encoding, a=wrong), encoding)


@pytest.mark.parametrize(
    "scales",
    [
        None,
        np.ones(2, np.float32),
        np.ones(4, np.float32),
        np.ones((3, 1), np.float32),
        np.ones(3),
        np.ones(3, np.float16),
        np.array([1, np.nan, 1], np.float32),
        np.array([1, np.inf, 1], np.float32),
        np.array([1, -1, 1], np.float32),
        np.array([1, 3e38, 1], np.float32),
    ],
)
def test_invalid_scales_are_refused_by_name(scales: Any) -> None:
    with pytest.raises(MessageError, match="scales"):
        decode(LAYOUT, changed(Encoding.INT8, **{SCALES: scales}), Encoding.INT8)


@pytest.mark.parametrize("sent", Encoding)
@pytest.mark.parametrize("expected", Encoding)
def test_an_update_in_another_encoding_than_the_rounds_is_refused(sent: Encoding, expected: Encoding) -> None:
    tensors = encode(LAYOUT, np.ones(12, np.float32), sent)
    if sent is not expected:
        with pytest.raises(MessageError):
            decode(LAYOUT, tensors, expected)


_SHAPES = st.sampled_from([(), (1,), (2,), (4,), (2, 3), (1, 2), (3,)])
_TYPES = st.sampled_from([np.float32, np.float16, np.int8, np.float64, np.int64, np.bool_])
_TENSORS = st.tuples(_SHAPES, _TYPES).flatmap(lambda made: arrays.arrays(made[1], made[0]))


@settings(max_examples=500)
@given(st.dictionaries(st.sampled_from(["w", "b", "a", "c", SCALES, ""]), _TENSORS), st.sampled_from(Encoding))
def test_any_tensors_give_a_finite_vector_or_a_message_error(tensors: dict[str, Any], encoding: Encoding) -> None:
    try:
        vector = decode(LAYOUT, tensors, encoding)
    except MessageError:
        return
    assert vector.dtype == np.float32
    assert vector.size <= LAYOUT.total
    assert np.isfinite(vector).all()
