"""The stores of a simulation: real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.data.cache import Priority
from simulation.store import ArrayStore, FileStore

NAMES = ("a", "b", "c")


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return opened(tmp_path)


def opened(root: Path, derived_bytes: int = 100) -> FileStore:
    store = FileStore(root, NAMES, derived_bytes)
    for folder, priority in (
        ("states", Priority.PRESENT),
        ("lifted", Priority.DERIVED),
        ("later", Priority.AHEAD),
    ):
        store.use(folder, priority)
    return store


def test_rows_are_read_by_later_processes(store: FileStore, tmp_path: Path) -> None:
    assert not store.has("states", "b")
    assert store.get("states", "b") is None
    assert store.put("states", "b", b"1234")
    assert store.get("states", "b") == b"1234"
    again = opened(tmp_path)
    assert again.get("states", "b") == b"1234"
    assert not again.has("states", "a")


def test_two_open_stores_see_each_others_rows(store: FileStore, tmp_path: Path) -> None:
    store.put("states", "a", b"1234")
    other = opened(tmp_path)
    other.put("states", "c", b"5678")
    assert store.get("states", "c") == b"5678"


def test_a_half_written_row_is_not_returned_and_can_be_written_again(store: FileStore, tmp_path: Path) -> None:
    store.put("states", "b", b"1234")
    (path,) = tmp_path.rglob("states")
    damaged = bytearray(path.read_bytes())
    damaged[5] = 0
    path.write_bytes(damaged)
    again = opened(tmp_path)
    assert again.get("states", "b") is None
    again.put("states", "b", b"1234")
    assert again.get("states", "b") == b"1234"


def test_unknown_names_and_states_ahead_are_not_stored(store: FileStore, tmp_path: Path) -> None:
    assert not store.put("states", "z", b"1234")
    assert not store.put("later", "a", b"1234")
    assert not list(tmp_path.rglob("later*"))


def test_derived_states_are_the_most_recently_used_ones_in_memory(tmp_path: Path) -> None:
    store = opened(tmp_path, derived_bytes=8)
    assert store.capacity("lifted", 4) == 2
    for name in "ab":
        store.put("lifted", name, name.encode() * 4)
    store.get("lifted", "a")
    store.put("lifted", "c", b"cccc")
    assert [store.get("lifted", name) for name in NAMES] == [b"aaaa", None, b"cccc"]
    assert not list(tmp_path.rglob("lifted*"))


def test_other_names_have_other_files(store: FileStore, tmp_path: Path) -> None:
    store.put("states", "a", b"1234")
    other = FileStore(tmp_path, ("b", "a"))
    other.use("states", Priority.PRESENT)
    assert not other.has("states", "a")


def test_another_machine_reads_the_stored_rows_and_adds_none(store: FileStore) -> None:
    store.put("states", "b", b"1234")
    remote = ArrayStore(store.arrays())
    for folder in ("states", "unknown"):
        remote.use(folder, Priority.PRESENT)
    assert remote.get("states", "b") == b"1234"
    assert remote.get("states", "a") is None
    assert remote.get("unknown", "a") is None
    assert not remote.put("states", "a", b"5678")
    remote.use("lifted", Priority.DERIVED)
    assert remote.put("lifted", "a", b"5678")
    assert remote.get("lifted", "a") == b"5678"
