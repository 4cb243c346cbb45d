"""Chunks of blobs, in any order, repeated, corrupt or too many."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfmsl.errors import MessageError
from fedfmsl.protocol.chunks import CHUNK_BYTES, CHUNK_SIZES, HEADER_BYTES, MAX_BLOB_BYTES, Assembler, chunks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5 * CHUNK_BYTES), st.data())
def test_chunks_in_any_order_and_with_repeats_make_the_blob(size: int, data: st.DataObject) -> None:
    blob = np.random.default_rng(size).bytes(size)
    pieces = list(chunks(blob))
    assert len(pieces) == -(-size // CHUNK_BYTES)
    order = data.draw(st.permutations(range(len(pieces))))
    repeats = data.draw(st.lists(st.sampled_from(order[:-1]), max_size=4)) if len(order) > 1 else []
    assembler = Assembler(MAX_BLOB_BYTES)
    assert all(assembler.add(pieces[index]) is None for index in [*order[:-1], *repeats])
    assert assembler.add(pieces[order[-1]]) == blob


@pytest.mark.parametrize("size", CHUNK_SIZES)
def test_chunks_have_any_size_of_the_list_and_the_missing_ones_are_known(size: int) -> None:
    blob = np.random.default_rng(size).bytes(3 * size + 1)
    *pieces, last = chunks(blob, size)
    assert {len(piece) for piece in pieces} == {HEADER_BYTES + size}
    assembler = Assembler(MAX_BLOB_BYTES)
    assert assembler.missing == []
    for piece in (last, pieces[1]):
        assembler.add(piece)
    assert (assembler.count, assembler.missing) == (4, [0, 2])
    assembler.add(pieces[2])
    assert assembler.add(pieces[0]) == blob


def test_a_new_blob_replaces_an_incomplete_one() -> None:
    old, new = (np.random.default_rng(seed).bytes(2 * CHUNK_BYTES) for seed in (0, 1))
    assembler = Assembler(MAX_BLOB_BYTES)
    assert assembler.add(next(chunks(old))) is None
    first, second = chunks(new)
    assert assembler.add(second) is None
    assert assembler.add(first) == new


@pytest.mark.parametrize("where", ["body", "magic", "count", "short", "long", "not full", "empty"])
def test_a_corrupt_chunk_is_a_message_error_and_the_blob_can_be_sent_again(where: str) -> None:
    blob = np.random.default_rng(2).bytes(CHUNK_BYTES + 10)
    first, last = chunks(blob)
    bad = {
        "body": last[:-1] + bytes([last[-1] ^ 1]),
        "magic": b"XXXX" + last[4:],
        "count": last[:8] + b"\xff" * 4 + last[12:],
        "short": last[:20],
        "long": first + b"more",
        "not full": first[:-1],
        "empty": last[:-10],
    }[where]
    assembler = Assembler(MAX_BLOB_BYTES)
    assembler.add(first)
    with pytest.raises(MessageError):
        assembler.add(bad)
    assert [assembler.add(chunk) for chunk in (first, last)][-1] == blob


def test_a_blob_above_the_maximum_is_refused_at_its_first_chunk() -> None:
    assembler = Assembler(CHUNK_BYTES + 1)
    fitting, larger = (np.random.default_rng(size).bytes(size) for size in (CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 1))
    with pytest.raises(MessageError, match="not expected"):
        assembler.add(next(chunks(larger)))
    assert [assembler.add(chunk) for chunk in chunks(fitting)][-1] == fitting
    with pytest.raises(MessageError, match="not expected"):
        Assembler(10 * MAX_BLOB_BYTES).add(struct.pack(">4sII32s", b"FMS1", 0, 700, bytes(32)) + bytes(CHUNK_BYTES))


@given(st.binary(max_size=200))
def test_any_bytes_as_a_chunk_raise_only_message_errors(chunk: bytes) -> None:
    with pytest.raises(MessageError):
        Assembler(MAX_BLOB_BYTES).add(chunk)
