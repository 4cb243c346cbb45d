"""Reassembly of updates on the server's disk: exact, bounded, robust against a full disk."""

from __future__ import annotations

import hashlib
import subprocess
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tools import not_tested

from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import MessageError
from fedfmsl.protocol.chunks import CHUNK_BYTES, CHUNK_SIZES, chunks
from trainer_server.storage.uploads import PARTIALS, Gap, Upload, Uploads

CAP = 1 << 20


def random_blob(seed: int, length: int) -> bytes:
    return np.random.default_rng(seed).bytes(length)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "uploads"


@pytest.fixture
def uploads(folder: Path) -> Uploads:
    return Uploads(folder, CAP)


def test_missing_chunks_of_a_stalled_update_are_known(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", CAP, gap=Backoff(0.0, 0.0))
    blob = random_blob(0, 3 * CHUNK_SIZES[-1] + 5)
    pieces = list(chunks(blob, CHUNK_SIZES[-1]))
    assert uploads.add("d", 7, pieces[2]) is None
    assert uploads.gaps() == [Gap("d", 7, (0, 1, 3))]
    for piece in (pieces[0], pieces[3]):
        uploads.add("d", 7, piece)
    upload = uploads.add("d", 7, pieces[1])
    assert upload is not None and upload.blob == blob
    assert uploads.gaps() == []


def send(uploads: Uploads, device: str, round_: int, blob: bytes) -> Upload:
    *before, last = chunks(blob)
    assert all(uploads.add(device, round_, chunk) is None for chunk in before)
    upload = uploads.add(device, round_, last)
    assert upload is not None
    return upload


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4 * CHUNK_BYTES)), min_size=1, max_size=4).filter(
        lambda sizes: max(Counter(device for device, _ in sizes).values()) <= PARTIALS
    ),
    data=st.data(),
)
def test_chunks_of_several_devices_add_up_in_any_order_and_with_repeats(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[str, int]], data: st.DataObject
) -> None:
    uploads = Uploads(tmp_path_factory.mktemp("uploads"), CAP)
    blobs = {(device, round_): random_blob(round_, size) for round_, (device, size) in enumerate(sizes)}
    pieces = [(key, chunk) for key, blob in blobs.items() for chunk in chunks(blob)]
    repeated = pieces + data.draw(st.lists(st.sampled_from(pieces), max_size=6))
    order = data.draw(st.permutations(repeated))
    received: dict[tuple[str, int], int] = dict.fromkeys(blobs, 0)
    whole: dict[tuple[str, int], Upload] = {}
    for key, chunk in order:
        if key in whole:  # a later chunk would begin a new upload
            continue
        received[key] += len(chunk)
        upload = uploads.add(*key, chunk)
        if upload is not None:
            whole[key] = upload
    assert whole.keys() == blobs.keys()
    for key, upload in whole.items():
        assert upload.blob == blobs[key]
        assert upload.sha256 == hashlib.sha256(blobs[key]).hexdigest()
        assert upload.size == received[key]


def test_a_late_update_and_one_of_the_next_round_are_both_completed(uploads: Uploads) -> None:
    late, new = random_blob(0, 3 * CHUNK_BYTES), random_blob(1, 3 * CHUNK_BYTES)
    found = [
        uploads.add("d", round_, chunk)
        for pair in zip(chunks(late), chunks(new), strict=True)
        for round_, chunk in enumerate(pair)
    ]
    assert [upload.blob for upload in found if upload] == [late, new]


def test_a_third_unfinished_blob_replaces_the_least_recently_used_one(uploads: Uploads, folder: Path) -> None:
    first, second, third = ([*chunks(random_blob(seed, 2 * CHUNK_BYTES))] for seed in range(3))
    for round_, blob in ((1, first), (2, second), (1, first), (3, third)):
        assert uploads.add("d", round_, blob[0]) is None
        assert uploads.add("another", round_, blob[0]) is None
    assert len([*folder.iterdir()]) == 5  # of which one is not in use
    assert uploads.add("d", 1, first[1]) is not None
    assert uploads.add("d", 3, third[1]) is not None
    assert uploads.add("d", 2, second[1]) is None  # was replaced, and begins again
    assert uploads.add("d", 2, second[0]) is not None


def test_a_complete_blob_can_be_sent_again(uploads: Uploads, folder: Path) -> None:
    blob = random_blob(0, 3 * CHUNK_BYTES + 5)
    first, again = send(uploads, "d", 1, blob), send(uploads, "d", 1, blob)
    assert first == again
    shorter = random_blob(1, 2 * CHUNK_BYTES - 5)  # in the file that the longer one has left
    assert send(uploads, "d", 2, shorter).blob == shorter
    assert len([*folder.iterdir()]) == 1


def test_an_update_of_one_chunk_needs_no_file(uploads: Uploads, folder: Path) -> None:
    (chunk,) = chunks(blob := random_blob(0, 9))
    assert uploads.add("d", 1, chunk) == Upload(blob, hashlib.sha256(blob).hexdigest(), len(chunk))
    with pytest.raises(MessageError, match="SHA-256"):
        uploads.add("d", 1, chunk[:-1] + b"x")
    assert not [*folder.iterdir()]


def test_the_same_blob_of_two_devices_is_two_uploads(uploads: Uploads) -> None:
    first, last = chunks(random_blob(0, 2 * CHUNK_BYTES))
    assert uploads.add("a", 1, first) is None
    assert uploads.add("b", 1, last) is None
    assert uploads.add("a", 1, last) is not None


def test_a_blob_with_a_wrong_hash_is_refused_and_can_be_sent_again(uploads: Uploads, folder: Path) -> None:
    blob = random_blob(0, 2 * CHUNK_BYTES)
    first, last = chunks(blob)
    uploads.add("d", 1, first)
    with pytest.raises(MessageError, match="SHA-256"):
        uploads.add("d", 1, last[:-1] + bytes([last[-1] ^ 1]))
    assert len([*folder.iterdir()]) == 1
    assert send(uploads, "d", 1, blob).blob == blob


def test_a_blob_above_the_cap_is_refused_at_its_first_chunk(folder: Path) -> None:
    uploads = Uploads(folder, CHUNK_BYTES + 1)
    assert send(uploads, "d", 1, random_blob(0, 2 * CHUNK_BYTES))  # has as many chunks as the cap
    with pytest.raises(MessageError, match="not expected"):
        uploads.add("d", 1, next(chunks(random_blob(0, 2 * CHUNK_BYTES + 1))))


def test_unfinished_blobs_are_deleted_at_the_next_start(uploads: Uploads, folder: Path) -> None:
    uploads.add("d", 2, next(chunks(random_blob(1, 2 * CHUNK_BYTES))))
    assert len([*folder.iterdir()]) == 1
    Uploads(folder, CAP)
    assert not [*folder.iterdir()]


def test_memory_stays_small_while_300_devices_send(folder: Path) -> None:
    """Every device sends a chunk of its update (1 MB) in turn."""
    uploads = Uploads(folder, CAP)
    pieces = [*chunks(random_blob(0, CAP))]
    devices = [f"device-{number}" for number in range(300)]
    tracemalloc.start()
    try:
        for chunk in pieces[:-1]:
            for device in devices:
                assert uploads.add(device, 1, chunk) is None
        unfinished, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for device in devices:
            upload = uploads.add(device, 1, pieces[-1])
            assert upload is not None
            del upload
        finished, peak_of_finishing = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert unfinished < len(devices) * 1500
    assert peak < unfinished + 4 * CHUNK_BYTES
    assert peak_of_finishing < unfinished + 3 * CAP
    assert finished < unfinished


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        not_tested(f"this process may not mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_refuses_chunks_until_there_is_space_again(small_disk: Path) -> None:
    uploads = Uploads(small_disk / "uploads", CAP)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(CAP - 4 * CHUNK_BYTES))
    blobs = {device: random_blob(seed, 3 * CHUNK_BYTES) for seed, device in enumerate("ab")}
    refused = 0
    done: dict[str, bytes] = {}
    for pair in zip_longest(*(chunks(blob) for blob in blobs.values())):
        for device, chunk in zip(blobs, pair, strict=True):
            try:
                upload = uploads.add(device, 1, chunk)
            except OSError:
                refused += 1
            else:
                assert upload is None or done.setdefault(device, upload.blob) == blobs[device]
    assert refused
    ballast.unlink()
    for device, blob in blobs.items():
        for chunk in chunks(blob):
            upload = uploads.add(device, 1, chunk)
            if upload is not None:
                done[device] = upload.blob
    assert done == blobs
