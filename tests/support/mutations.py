"""Seeded mutations of valid bytes: fast enough for a million inputs, aware of JSON and of length fields."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Sequence

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|[\[\]{}:,]')
_NASTY = (
    *(b"0 -1 1 2147483648 4294967296 9007199254740993 18446744073709551615 18446744073709551616 1e400 -0.0".split()),
    *(b'NaN Infinity -Infinity 1.5 1e-400 null true {} [] "" [[]] {"":{}} [0,0] [4,0] [0]'.split()),
    *(rb'"\ud800" "\u0000" "\u001b[31m" "[/x]" "../x" "/" "+" "#" "F64" "BF16" "F8_E4M3" "U8" "I8" "F16"'.split()),
    b"9" * 400,
    b"9" * 5000,
    b'"' + b"a" * 3000 + b'"',
    b"[" * 300,
    b'{"a":' * 300,
    b"{" * 40 + b"}" * 40,
    '"é\u202e\U0001f980"'.encode(),
    b'"\xff\xfe"',
)
_LENGTHS = (0, 1, 7, 8, 255, 2**16, 2**19, 2**19 + 1, 10**8, 10**8 + 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
MOST = 1 << 20  # bytes of an input

Mutation = Callable[["Mutator", bytes], bytes]


class Mutator:
    """Draws inputs: one of the seeds, changed in one to four places."""

    def __init__(self, seeds: Sequence[bytes], random_: random.Random) -> None:
        self.seeds = seeds
        self.random = random_

    def __call__(self) -> bytes:
        return self.changed(self.random.choice(self.seeds))

    def changed(self, data: bytes) -> bytes:
        for _ in range(self.random.choice((1, 1, 1, 2, 2, 3, 4))):
            data = self.random.choice(MUTATIONS)(self, data)
        if self.random.random() < 0.002:
            data = _swollen(self, data)
        return data[:MOST]

    def place(self, data: bytes) -> int:
        return int(self.random.random() * (len(data) + 1))

    def span(self, data: bytes, longest: int = 64) -> slice:
        start = self.place(data)
        return slice(start, start + int(self.random.random() * longest))


def _flipped(mutator: Mutator, data: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[int(mutator.random.random() * len(data))] ^= 1 << mutator.random.randrange(8)
    return bytes(changed)


def _truncated(mutator: Mutator, data: bytes) -> bytes:
    return data[: mutator.place(data)]


def _cut(mutator: Mutator, data: bytes) -> bytes:
    span = mutator.span(data)
    return data[: span.start] + data[span.stop :]


def _repeated(mutator: Mutator, data: bytes) -> bytes:
    span = mutator.span(data)
    return data[: span.stop] + data[span.start :]


def _noise(mutator: Mutator, data: bytes) -> bytes:
    span = mutator.span(data, longest=12)
    return data[: span.start] + mutator.random.randbytes(span.stop - span.start) + data[span.stop :]


def _spliced(mutator: Mutator, data: bytes) -> bytes:
    other = mutator.random.choice(mutator.seeds)
    return data[: mutator.place(data)] + other[mutator.place(other) :]


def _length_field(mutator: Mutator, data: bytes) -> bytes:
    """At one of the first places, where this wire has its lengths and counts, or anywhere."""
    form = mutator.random.choice(("<Q", ">I"))
    size = struct.calcsize(form)
    number = mutator.random.choice(_LENGTHS) % 256**size
    start = mutator.random.choice((0, 4, 8, mutator.place(data)))
    return data[:start] + struct.pack(form, number) + data[start + size :]


def _other_token(mutator: Mutator, data: bytes) -> bytes:
    """A JSON token becomes another."""
    found = _TOKEN.search(data, mutator.place(data))
    if found is None:
        return data
    return data[: found.start()] + mutator.random.choice(_NASTY) + data[found.end() :]


def _moved_token(mutator: Mutator, data: bytes) -> bytes:
    """A JSON token becomes one that stands elsewhere in a valid input."""
    other = mutator.random.choice(mutator.seeds)
    found, source = _TOKEN.search(data, mutator.place(data)), _TOKEN.search(other, mutator.place(other))
    if found is None or source is None:
        return data
    return data[: found.start()] + source.group() + data[found.end() :]


def _swollen(mutator: Mutator, data: bytes) -> bytes:
    """A few bytes of it, very often."""
    span = mutator.span(data, longest=24)
    return data[: span.start] + data[span] * mutator.random.choice((1_000, 10_000, 40_000)) + data[span.stop :]


MUTATIONS: tuple[Mutation, ...] = (
    _flipped,
    _truncated,
    _cut,
    _repeated,
    _noise,
    _spliced,
    _length_field,
    _other_token,
    _other_token,
    _moved_token,
    _moved_token,
)


class BlobMutator(Mutator):
    """Of blobs: also of their JSON alone, and of the header inside it, with lengths that fit again."""

    def __call__(self) -> bytes:
        blob, kind = self.random.choice(self.seeds), self.random.random()
        if kind < 0.3:
            return self.changed(blob)
        start = 8 + int.from_bytes(blob[:8], "little")
        text, body = blob[8:start], blob[start:]
        if kind < 0.7:
            text = self.changed(text)
        else:
            outer = json.loads(text)
            header = self.changed(outer["__metadata__"]["header"].encode())
            outer["__metadata__"]["header"] = header.decode(errors="replace")
            text = json.dumps(outer).encode()
        return len(text).to_bytes(8, "little") + text + body
