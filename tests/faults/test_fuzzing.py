"""Every decoder against mutated inputs: only the documented error comes out, and memory stays below the decoder's cap.

A hundredth of the inputs in the short form, a million and more in the long.
"""

from __future__ import annotations

import random
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel
from support.bundles import Built
from support.mutations import BlobMutator, Mutator

from edge_runtime.data.cache import DiskCache
from edge_runtime.store import DeviceStore
from edge_runtime.training.evaluation import BaselineHeader as Alone
from edge_runtime.training.local_expert import LocalExpertHeader as LocalExpert
from edge_runtime.training.personal_model import ModelHeader
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.errors import BundleError, ConfigError, FedFMSLError, MessageError
from fedfmsl.protocol.bundle import MANIFEST, Bundle
from fedfmsl.protocol.chunks import CHUNK_BYTES, Assembler, chunks
from fedfmsl.protocol.encoding import decode as decode_vector
from fedfmsl.protocol.encoding import encode as encode_vector
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import (
    Ack,
    DeviceStatus,
    Encoding,
    Globals,
    Message,
    Progress,
    Round,
    ServerStatus,
    Stage,
    Training,
    Update,
    Verdict,
    encode,
    parse,
)
from fedfmsl.protocol.task_bundle import with_numbered_classes
from fedfmsl.protocol.tensors import DTYPES, blob_hash, pack, unpack
from fedfmsl.protocol.topics import MAX_NUMBER, NAME, Topics
from trainer_server.storage.uploads import Uploads

MIB = 1 << 20
SHORT = 100  # the long form has 100 times as many inputs
SAMPLED = 50  # one input in 50 is decoded under tracemalloc, and every one of
LONG = 128 * 1024  # bytes or longer
INPUTS = 32 * MIB  # memory for making the inputs, which is part of the resident memory
SHA = "ab" * 32

MESSAGES: list[Message] = [
    ServerStatus(
        online=True, run="r", session="5e55", bundle=SHA, bundle_url="http://10.0.0.1:8000/b", model="vit-b16"
    ),
    Round(
        run="r",
        session="5e55",
        round=7,
        stage=Stage.GLOBAL,
        index=2,
        of=12,
        level=3,
        chosen=("device-0", "device-1", "pi.kitchen"),
        expert=SHA,
        start=SHA,
        training=Training(epochs=2, learning_rate=2e-3),
        sal=Sal(CapabilityQueue(3, 0.02), max_level=12),
        encoding=Encoding.INT8,
        privacy=Privacy(clip=1.0, noise_multiplier=0.8, shares=4),
    ),
    DeviceStatus(device="d", online=True, instance="abc", bundle=SHA, level_cap=12, train=80, test=20, error="no disk"),
    Progress(device="d", activity="training", done=3, total=9),
    Update(
        run="r",
        session="5e55",
        round=7,
        device="d",
        stage=Stage.GLOBAL,
        level=3,
        samples=80,
        metrics={"loss": 0.5, "held_out_global": 0.9},
        counts={"test": [3, 0, 4], "global": [2, 0, 4]},
        engine="step-graph",
        seconds=3.5,
        peak_rss_mb=512.0,
        bytes_down=100_000,
    ),
    Ack(run="r", session="5e55", round=7, device="d", verdict=Verdict.REJECTED, reason="too large"),
    Globals(run="r", kind="expert"),
]
HEADERS: list[BaseModel] = [
    next(message for message in MESSAGES if isinstance(message, Update)),
    Globals(run="r", kind="expert"),
    LocalExpert(session="s", task=SHA, round=1, level=2, queue=(0.5, 0.6), seen=2, best_level=1, best_nll=0.3),
    Alone(session="s", task=SHA, level=2),
    ModelHeader(
        run="r",
        session="s",
        round=1,
        device="d",
        level=2,
        bundle=SHA,
        task=SHA,
        expert=SHA,
        gate="",
        temperature=1.5,
        threshold=0.3,
        prior=(0.5, 0.3, 0.2),
        held=(True, True, False),
    ),
]
TENSORS = {
    "classifier.weight": np.ones((4, 8), np.float32),
    "vit.encoder.layer.2.lora_A.weight": np.ones((4, 8), np.float16),
    "q": np.arange(9, dtype=np.int8),
}


@dataclass
class Target:
    """`draw` makes an input, `decode` returns whether it accepted one. `cap` limits its memory, in bytes."""

    draw: Callable[[], bytes]
    decode: Callable[[bytes], bool]
    cap: int


def accepts(
    decode: Callable[[bytes], object], error: type[FedFMSLError], check: Callable[[Any], bool]
) -> Callable[[bytes], bool]:
    """Catches only `error`, whose text must be one short line. An accepted result must pass the check."""

    def decoded(data: bytes) -> bool:
        try:
            result = decode(data)
        except error as refused:
            text = str(refused)
            assert "\n" not in text
            assert len(text) < 1000
            return False
        assert check(result)
        return result is not None

    return decoded


def messages(kind: type[Message], rng: random.Random) -> Target:
    seeds = [encode(message) for message in MESSAGES if isinstance(message, kind)]
    whole = accepts(
        lambda data: parse(kind, data), MessageError, lambda message: parse(kind, encode(message)) == message
    )
    return Target(Mutator(seeds, rng), whole, cap=96 * MIB)


def blobs(header: BaseModel, rng: random.Random) -> Target:
    seeds = [pack(header, TENSORS), pack(header, {}), pack(header, {"theta": np.zeros(40, np.float32)})]

    def check(result: Any) -> bool:
        return all(tensor.dtype in DTYPES for tensor in result[1].values())

    decode = accepts(lambda data: unpack(data, type(header)), MessageError, check)
    return Target(BlobMutator(seeds, rng), decode, cap=32 * MIB)


class Stream:
    """Draws chunks of a few blobs, mutated or not, in random order."""

    def __init__(self, rng: random.Random) -> None:
        blobs = [pack(HEADERS[0], {"t": np.full(size, size, np.float32)}) for size in (3, 70, CHUNK_BYTES // 3)]
        self.chunks = [chunk for blob in blobs for chunk in chunks(blob)]
        self._mutator = Mutator(self.chunks, rng)

    def __call__(self) -> bytes:
        return self._mutator() if self._mutator.random.random() < 0.7 else self._mutator.random.choice(self.chunks)


def assembler(rng: random.Random, cap_bytes: int) -> Target:
    made = Assembler(cap_bytes)
    stream = Stream(rng)

    def check(blob: bytes | None) -> bool:
        return blob is None or len(blob) <= cap_bytes

    return Target(stream, accepts(made.add, MessageError, check), cap=4 * cap_bytes + MIB)


def uploads(rng: random.Random, cap_bytes: int, folder: Path) -> Target:
    made = Uploads(folder, cap_bytes)

    def add(data: bytes) -> bytes | None:
        upload = made.add(rng.choice("abc"), rng.randrange(2), data)
        if upload is None:
            return None
        assert blob_hash(upload.blob) == upload.sha256
        assert len([*folder.iterdir()]) <= 7
        return upload.blob

    def check(blob: bytes | None) -> bool:
        return blob is None or len(blob) <= cap_bytes

    return Target(Stream(rng), accepts(add, MessageError, check), cap=4 * cap_bytes + MIB)


def topics(rng: random.Random) -> Target:
    of_run = Topics("r")
    seeds = [of_run.update_chunk("d", 7, 0), of_run.status("pi.kitchen"), of_run.globals_chunk(SHA, 3), of_run.round]

    def decode(data: bytes) -> bool:
        topic = data.decode(errors="replace")
        device, update, sha256 = of_run.device_of(topic), of_run.update_of(topic), of_run.globals_of(topic)
        assert device is None or re.fullmatch(NAME, device)
        assert sha256 is None or re.fullmatch("[0-9a-f]{64}", sha256)
        if update is not None:
            assert update[0] == device
            assert 0 <= update[1] <= MAX_NUMBER
            assert topic.startswith(of_run.update_chunk(device, update[1], ""))
        return bool(device or sha256)

    return Target(Mutator([seed.encode() for seed in seeds], rng), decode, cap=8 * MIB)


def layout(encoding: Encoding, rng: random.Random) -> Target:
    """Vectors in blobs that `unpack` accepts."""
    made = Layout.build([("head", "a", (2, 3)), ("head", "b", (2,)), ("0", "c", (1, 1))])
    ends = {0, *(slot.end for slot in made.slots)}
    seeds = [pack(HEADERS[1], encode_vector(made, np.arange(end, dtype=np.float32), encoding)) for end in ends]

    def join(data: bytes) -> np.ndarray[Any, Any]:
        _, tensors = unpack(data, Globals)
        return decode_vector(made, tensors, encoding)

    def check(vector: np.ndarray[Any, Any]) -> bool:
        return vector.size in ends and vector.dtype == np.float32 and bool(np.isfinite(vector).all())

    return Target(BlobMutator(seeds, rng), accepts(join, MessageError, check), cap=32 * MIB)


def manifest(rng: random.Random, folder: Path, built: Built) -> Target:
    """Of a bundle that was fetched, and of its files' names, which are asked for next."""

    def read(data: bytes) -> list[Path]:
        (folder / MANIFEST).write_bytes(data)
        bundle = Bundle.load(folder)
        expert = with_numbered_classes(bundle, 2).expert
        assert expert.total >= expert.size(bundle.manifest.levels) >= 0
        return [bundle.path(name) for name in bundle.manifest.files]

    def check(paths: list[Path]) -> bool:
        return all(path.parent == folder for path in paths)

    seed = Bundle.load(built.bundle.root).manifest.model_dump_json().encode()
    return Target(Mutator([seed], rng), accepts(read, BundleError, check), cap=96 * MIB)


def identity(rng: random.Random, folder: Path) -> Target:
    def read(data: bytes) -> str:
        (folder / "identity").write_bytes(data)
        return DeviceStore(folder).ensure_name(None)

    def check(name: str) -> bool:
        return re.fullmatch(NAME, name) is not None

    return Target(Mutator([b"pi.kitchen", b"device-0"], rng), accepts(read, ConfigError, check), cap=8 * MIB)


def session(rng: random.Random, folder: Path) -> Target:
    def decode(data: bytes) -> bool:
        (folder / "session").write_bytes(data)
        store = DeviceStore(folder)
        assert re.fullmatch("[0-9A-Za-z-]{0,64}", store.outbox.session)
        assert 0 <= store.outbox.acknowledged < 10**10
        return bool(store.outbox.session)

    return Target(Mutator([b"5e55 7", b"0123456789abcdef"], rng), decode, cap=8 * MIB)


def outbox(rng: random.Random, folder: Path) -> Target:
    """An unreadable update, or one of another session or round, is removed."""
    store = DeviceStore(folder)
    (folder / "outbox").mkdir()

    def decode(data: bytes) -> bool:
        (folder / "outbox" / "7").write_bytes(data)
        rounds = store.outbox.unacknowledged("5e55")
        assert rounds <= {7}
        assert (store.outbox.read(7) == data) == (7 in rounds)
        return bool(rounds)

    return Target(BlobMutator([pack(HEADERS[0], TENSORS)], rng), decode, cap=32 * MIB)


def kept_global(rng: random.Random, folder: Path) -> Target:
    store = DeviceStore(folder)
    blob = pack(HEADERS[1], TENSORS)
    store.globals.write(blob)

    def decode(data: bytes) -> bool:
        (folder / "globals" / blob_hash(blob)).write_bytes(data)
        found = store.globals.read(blob_hash(blob))
        assert found is None or found == blob
        return found is not None

    return Target(Mutator([blob], rng), decode, cap=4 * MIB)


def cached(rng: random.Random, folder: Path) -> Target:
    cache = DiskCache(folder, budget=MIB)
    states = rng.randbytes(300)
    cache.put("states", "a", states)
    stored = (folder / "states" / "a").read_bytes()

    def decode(data: bytes) -> bool:
        cache.put("states", "a", states)
        (folder / "states" / "a").write_bytes(data)
        found = cache.get("states", "a")
        assert found is None or found == states
        return found is not None

    return Target(Mutator([stored], rng), decode, cap=4 * MIB)


Make = Callable[[random.Random, Path, Built], Target]
DECODERS: dict[str, tuple[int, Make]] = {  # number of inputs in the long form
    **{
        f"parse {kind.__name__}": (60_000, lambda rng, folder, built, kind=kind: messages(kind, rng))
        for kind in map(type, MESSAGES)
    },
    **{
        f"unpack {header.__class__.__module__}.{type(header).__name__}": (
            50_000,
            lambda rng, folder, built, header=header: blobs(header, rng),
        )
        for header in HEADERS
    },
    "Assembler": (120_000, lambda rng, folder, built: assembler(rng, 3 * CHUNK_BYTES)),
    "Uploads": (80_000, lambda rng, folder, built: uploads(rng, 3 * CHUNK_BYTES, folder)),
    "Topics": (150_000, lambda rng, folder, built: topics(rng)),
    **{
        f"Layout {encoding.value}": (40_000, lambda rng, folder, built, encoding=encoding: layout(encoding, rng))
        for encoding in Encoding
    },
    "Bundle": (20_000, manifest),
    "identity": (20_000, lambda rng, folder, built: identity(rng, folder)),
    "session": (20_000, lambda rng, folder, built: session(rng, folder)),
    "outbox": (20_000, lambda rng, folder, built: outbox(rng, folder)),
    "global blob": (20_000, lambda rng, folder, built: kept_global(rng, folder)),
    "cache": (20_000, lambda rng, folder, built: cached(rng, folder)),
}


def memory_now_and_at_most() -> tuple[int, int]:
    """Resident bytes of this process: now, and the peak since the last call."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "VmHWM"):
            found[key] = int(value.split()[0]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return found["VmRSS"], found["VmHWM"]


@pytest.mark.parametrize("name", DECODERS)
def test_mutated_inputs_give_only_the_documented_error_and_take_no_more_memory_than_the_cap(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    vit: Built,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs, make = DECODERS[name]
    full = request.config.getoption("--full")
    count = inputs if full else inputs // SHORT
    target = make(random.Random(name), tmp_path, vit)
    before, _ = memory_now_and_at_most()
    accepted = highest = 0
    for number in range(count):
        data = target.draw()
        sampled = number % SAMPLED == 0 or len(data) >= LONG
        if sampled:
            tracemalloc.start()
        try:
            accepted += target.decode(data)
        except BaseException as error:
            error.add_note(f"input {number} of {name}: {data[:2000]!r}")
            raise
        finally:
            if sampled:
                highest = max(highest, tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
    resident = memory_now_and_at_most()[1] - before
    text = (
        f"{name}: {count} inputs, {accepted} accepted, "
        f"at most {highest / MIB:.1f} MiB allocated, {resident / MIB:.1f} MiB resident"
    )
    record_property("inputs", count)
    record_property("accepted", accepted)
    if full:
        with capsys.disabled():
            print(f"\n{text}", end="")
    else:
        print(text)
    assert highest <= target.cap
    assert resident <= target.cap + INPUTS


def test_the_long_form_tries_a_million_inputs() -> None:
    assert sum(inputs for inputs, _ in DECODERS.values()) >= 1_000_000
