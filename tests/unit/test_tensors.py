"""Blobs: tensors with a header as bytes, and what hostile bytes can do."""

from __future__ import annotations

import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.wire import JSON, UPDATE, layouts, vector_of

from fedfmsl.errors import MessageError
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import Update
from fedfmsl.protocol.tensors import DTYPES, MAX_HEADER_BYTES, MAX_TENSORS, pack, tensors_of, unpack


@given(layouts(), st.integers(0, 9))
def test_unpack_is_the_inverse_of_pack(layout: Layout, seed: int) -> None:
    tensors = layout.split(vector_of(layout, seed))
    header, found = unpack(pack(UPDATE, tensors), Update)
    assert header == UPDATE
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_a_view_that_is_not_contiguous_is_packed_in_its_own_order() -> None:
    tensor = np.arange(12, dtype=np.float32).reshape(3, 4)
    _, found = unpack(pack(UPDATE, {"t": tensor.T, "s": tensor[:, ::2]}), Update)
    assert np.array_equal(found["t"], tensor.T)
    assert np.array_equal(found["s"], tensor[:, ::2])


TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", "F4", "U32", "C64", "?"]),
        "shape": st.lists(st.integers(-1, 2**70), max_size=2),
        "data_offsets": st.lists(st.integers(0, 16), max_size=3),
    },
)


METADATA = st.fixed_dictionaries({}, optional={"header": st.just(UPDATE.model_dump_json()) | st.text(max_size=9)})


SAFETENSORS_LIKE = st.builds(
    lambda header, body: struct.pack("<Q", len(header)) + header + body,
    st.one_of(
        st.binary(max_size=40),
        JSON.map(lambda value: json.dumps(value).encode()),
        st.dictionaries(st.sampled_from(["a", "b"]), TENSOR | JSON, max_size=2).flatmap(
            lambda tensors: METADATA.map(lambda meta: json.dumps({"__metadata__": meta, **tensors}).encode())
        ),
    ),
    st.binary(max_size=16),
)


@settings(max_examples=2000)
@given(st.binary(max_size=300) | SAFETENSORS_LIKE)
def test_unpacking_any_bytes_raises_only_message_errors(blob: bytes) -> None:
    try:
        header, _ = unpack(blob, Update)
    except MessageError:
        return
    assert header == UPDATE


@settings(max_examples=1000)
@given(st.data())
def test_a_blob_with_changed_bytes_is_refused_or_valid(data: st.DataObject) -> None:
    blob = bytearray(pack(UPDATE, {"a": np.ones(3, np.float32), "b": np.zeros((2, 2), np.float32)}))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        header, tensors = unpack(bytes(blob[: data.draw(st.integers(0, len(blob)))]), Update)
    except MessageError:
        return
    assert isinstance(header, Update)
    assert all(isinstance(tensor, np.ndarray) for tensor in tensors.values())


def blob_of(tensors: str, body: bytes = b"") -> bytes:
    """A safetensors file with a valid header and these JSON entries of tensors."""
    metadata = json.dumps({"header": UPDATE.model_dump_json()})
    text = f'{{"__metadata__":{metadata}{"," if tensors else ""}{tensors}}}'.encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(name: str, dtype: str, shape: str, *offsets: int) -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{list(offsets)}}}'


HOSTILE = {
    "the same bytes twice": blob_of(f"{entry('a', 'F32', '[1]', 0, 4)},{entry('b', 'F32', '[1]', 0, 4)}", bytes(4)),
    "bytes of no tensor": blob_of(entry("a", "F32", "[1]", 0, 4), bytes(8)),
    "empty and huge": blob_of(entry("a", "F32", f"[0,{2**63}]", 0, 0)),
    "empty and too huge": blob_of(entry("a", "F32", f"[0,{2**64 - 1}]", 0, 0)),
    "product overflows": blob_of(entry("a", "F32", f"[{2**62},{2**62}]", 0, 4), bytes(4)),
    "many dimensions": blob_of(entry("a", "F32", json.dumps([1] * 65), 0, 4), bytes(4)),
    "not finite": blob_of(entry("a", "F32", "[NaN]", 0, 4), bytes(4)),
    "a name twice": blob_of(f"{entry('a', 'F32', '[1]', 0, 4)},{entry('a', 'F32', '[1]', 4, 8)}", bytes(8)),
    "deep": blob_of('"a":' + "[" * 100_000),
    "deep in an unused field": blob_of(entry("a", "F32", "[0]", 0, 0)[:-1] + ',"x":' + "[" * 9000 + "]" * 9000 + "}"),
    "header of 100 MB": struct.pack("<Q", 10**8) + b"{}",
    "header longer than any": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header above the cap": blob_of(",".join(entry(f"{i}" * 99, "F32", "[0]", 0, 0) for i in range(4000))),
    "too many tensors": blob_of(",".join(entry(f"{i}", "I8", "[0]", 0, 0) for i in range(MAX_TENSORS + 1))),
    **{dtype: blob_of(entry("a", dtype, "[8]", 0, 8 * size), bytes(8 * size)) for dtype, size in
       {"F64": 8, "BF16": 2, "F8_E4M3": 1, "U16": 2, "BOOL": 1, "I64": 8, "C64": 8}.items()},
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_blob_is_refused_in_one_line_without_much_memory(what: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MessageError) as refused:
            unpack(HOSTILE[what], Update)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(HOSTILE[what]) + 16 * 1024 * 1024
    assert len(str(refused.value)) < 500
    assert str(refused.value).isprintable()


def test_the_memory_of_a_header_of_brackets_is_bounded() -> None:
    blob = blob_of(entry("a", "F32", "[0]", 0, 0)[:-1] + ',"x":[' + "{}," * 170_000 + "0]}")
    assert len(blob) < MAX_HEADER_BYTES + 8
    tracemalloc.start()
    try:
        _, tensors = unpack(blob, Update)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert list(tensors) == ["a"]
    assert peak < 32 * MAX_HEADER_BYTES


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_the_types_of_encodings_are_kept(dtype: type[np.generic]) -> None:
    tensor = np.arange(6).astype(dtype).reshape(2, 3)
    _, found = unpack(pack(UPDATE, {"t": tensor}), Update)
    assert found["t"].dtype == dtype
    assert np.array_equal(found["t"], tensor)


def test_the_tensors_of_an_accepted_blob_are_those_of_unpack() -> None:
    rng = np.random.default_rng(0)
    tensors = {
        np.dtype(dtype).name: (100 * rng.random((2, 3, index))).astype(dtype) for index, dtype in enumerate(DTYPES)
    }
    blob = pack(UPDATE, {**tensors, "scalar": np.array(7, np.uint64)})
    found, (_, expected) = tensors_of(blob), unpack(blob, Update)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert np.array_equal(found[name], tensor)
