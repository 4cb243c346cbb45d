"""Global blobs on their way to the disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.daemon.globals import GlobalsReceiver
from edge_runtime.store import DeviceStore
from fedfmsl.common.backoff import Backoff
from fedfmsl.protocol.chunks import CHUNK_SIZES, chunks
from fedfmsl.protocol.tensors import blob_hash
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received

TOPICS = Topics("r")
BLOBS = {blob_hash(blob): blob for blob in (b"one", b"two")}


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[GlobalsReceiver]:
    yield GlobalsReceiver(Link("mqtt://127.0.0.1:9", "device"), TOPICS, DeviceStore(tmp_path).globals, max_bytes=1000)


def receive_all(receiver: GlobalsReceiver) -> None:
    for sha256, blob in BLOBS.items():
        assert not receiver.fetch(sha256)
        for index, chunk in enumerate(chunks(blob)):
            receiver.receive(Received(TOPICS.globals_chunk(sha256, index), chunk))


def test_a_blob_that_the_disk_refuses_is_stored_later(
    receiver: GlobalsReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive_all(receiver)
    replace, failures = Path.replace, iter([False, True, False])

    def full_once(source: Path, target: Path) -> None:
        if next(failures):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(Path, "replace", full_once)
    first = receiver.store_next()
    with pytest.raises(OSError, match="No space left"):
        receiver.store_next()
    second = receiver.store_next()
    assert {first, second} == set(BLOBS)
    assert receiver.store_next() is None
    assert all(receiver.fetch(sha256) for sha256 in BLOBS)


def test_blobs_of_an_earlier_round_are_given_up(receiver: GlobalsReceiver) -> None:
    receive_all(receiver)
    wanted = next(iter(BLOBS))
    receiver.keep_only({wanted})
    assert receiver.store_next() == wanted
    assert receiver.store_next() is None


def test_chunks_that_do_not_arrive_are_asked_for_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blob = np.random.default_rng(0).bytes(4 * CHUNK_SIZES[-1])
    sha256, pieces = blob_hash(blob), list(chunks(blob, CHUNK_SIZES[-1]))
    link = Link("mqtt://127.0.0.1:9", "device")
    receiver = GlobalsReceiver(link, TOPICS, DeviceStore(tmp_path).globals, max_bytes=10**6, gap=Backoff(0.0, 0.0))
    receiver.chunk_bytes = CHUNK_SIZES[-1]
    topics = {index: TOPICS.globals_chunk(sha256, index) for index in range(4)}
    everything = TOPICS.globals_chunk(sha256, "+")
    receiver.fetch(sha256)
    receiver.fetch_missing()  # nothing has arrived
    assert link.subscriptions == {everything}
    receiver.receive(Received(topics[1], pieces[1]))
    receiver.fetch_missing()
    assert link.subscriptions == {everything, topics[0]}
    receiver.receive(Received(topics[0], pieces[0]))
    assert link.subscriptions == {everything, topics[2]}
    for index in (2, 3):
        receiver.receive(Received(topics[index], pieces[index]))
    assert link.subscriptions == set()
    assert receiver.store_next() == sha256
    assert len(caplog.messages) == 1 and "no chunks of the globals" in caplog.messages[0]


def test_missing_chunks_are_asked_for_less_and_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, asked = time.monotonic(), list[float]()
    now = start
    link = Link("mqtt://127.0.0.1:9", "device")
    monkeypatch.setattr(time, "monotonic", lambda: now)
    receiver = GlobalsReceiver(link, TOPICS, DeviceStore(tmp_path).globals, max_bytes=10**6, gap=Backoff(10.0, 40.0))
    receiver.fetch(next(iter(BLOBS)))
    monkeypatch.setattr(link, "subscribe", lambda topic: asked.append(now - start))
    for second in range(160):
        now = start + second
        receiver.fetch_missing()
    assert [round(each) for each in asked] == [11, 31, 71, 111, 151]


def test_chunks_of_another_size_that_an_earlier_server_has_left_are_ignored(tmp_path: Path) -> None:
    blob = np.random.default_rng(0).bytes(4 * CHUNK_SIZES[-1])
    sha256, link = blob_hash(blob), Link("mqtt://127.0.0.1:9", "device")
    receiver = GlobalsReceiver(link, TOPICS, DeviceStore(tmp_path).globals, max_bytes=10**6)
    receiver.chunk_bytes = CHUNK_SIZES[-2]
    receiver.fetch(sha256)
    new, old = (list(chunks(blob, size)) for size in CHUNK_SIZES[-2:])
    for index in (0, 3, 1, 2):
        receiver.receive(Received(TOPICS.globals_chunk(sha256, index), (new + old[2:])[index]))
    assert receiver.store_next() == sha256


def test_chunks_that_were_not_asked_for_are_ignored(receiver: GlobalsReceiver) -> None:
    sha256, blob = next(iter(BLOBS.items()))
    receiver.receive(Received(TOPICS.globals_chunk(sha256, 0), next(chunks(blob))))
    assert receiver.bytes_down == 0
    assert receiver.store_next() is None
