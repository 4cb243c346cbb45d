"""The cache on disk: undamaged files only, within its budget, and on a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tools import not_tested

from edge_runtime.data.cache import BLOCK, SHARE_OF_FREE_DISK, DiskCache, Priority


def kept(root: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in root.glob("*/*")}


def filled(root: Path, budget: int, **folders: Priority) -> DiskCache:
    """A cache whose folders are used in this order and hold one file of a block each."""
    cache = DiskCache(root, budget)
    for folder, priority in folders.items():
        cache.use(folder, priority)
        assert cache.put(folder, "a", b"x")
    return cache


def test_files_of_the_lowest_priority_are_deleted_first(tmp_path: Path) -> None:
    cache = filled(
        tmp_path, 4 * BLOCK, gone=Priority.SMALL, ahead=Priority.AHEAD, derived=Priority.DERIVED, small=Priority.SMALL
    )
    cache.drop_unused()
    for folder, priority in (("ahead", Priority.AHEAD), ("derived", Priority.DERIVED), ("small", Priority.SMALL)):
        cache.use(folder, priority)
    cache.use("present", Priority.PRESENT)
    assert cache.put("present", "a", b"x")
    assert kept(tmp_path) == {"ahead/a", "derived/a", "small/a", "present/a"}  # "gone" is not used any more
    assert cache.put("present", "b", b"x")
    assert kept(tmp_path) == {"derived/a", "small/a", "present/a", "present/b"}
    assert cache.put("present", "c", b"x")
    assert kept(tmp_path) == {"small/a", "present/a", "present/b", "present/c"}
    assert not cache.put("present", "d", b"x")
    assert not cache.put("derived", "d", b"x")
    assert kept(tmp_path) == {"small/a", "present/a", "present/b", "present/c"}


def test_nothing_is_deleted_for_a_file_that_would_not_fit_anyway(tmp_path: Path) -> None:
    cache = filled(tmp_path, 3 * BLOCK, small=Priority.SMALL, ahead=Priority.AHEAD)
    cache.use("present", Priority.PRESENT)
    assert cache.capacity("present", BLOCK) == 1
    assert not cache.put("present", "large", bytes(3 * BLOCK))
    assert kept(tmp_path) == {"small/a", "ahead/a"}


def test_under_a_smaller_budget_used_folders_are_deleted_last(tmp_path: Path) -> None:
    filled(tmp_path, 5 * BLOCK, one=Priority.PRESENT, two=Priority.PRESENT, three=Priority.AHEAD, four=Priority.DERIVED)
    cache = DiskCache(tmp_path, 2 * BLOCK)
    cache.use("two", Priority.PRESENT)
    cache.use("three", Priority.AHEAD)
    cache.use("four", Priority.DERIVED)
    cache.drop_unused()
    assert kept(tmp_path) == {"two/a", "four/a"}
    assert cache.used == 2 * BLOCK


def test_a_temporary_file_of_a_killed_process_is_deleted(tmp_path: Path) -> None:
    filled(tmp_path, BLOCK, folder=Priority.PRESENT)
    (tmp_path / "folder" / ".b.4711").write_bytes(b"half of")
    cache = DiskCache(tmp_path, BLOCK)
    assert kept(tmp_path) == {"folder/a"}
    assert cache.used == BLOCK


def test_a_deleted_file_is_missing(tmp_path: Path) -> None:
    cache = filled(tmp_path, BLOCK, folder=Priority.PRESENT)
    shutil.rmtree(tmp_path / "folder")
    assert cache.get("folder", "a") is None
    assert cache.used == 0
    assert cache.put("folder", "a", b"again")
    assert cache.get("folder", "a") == b"again"


def test_the_default_budget_is_a_share_of_the_free_disk(tmp_path: Path) -> None:
    capacity = DiskCache(tmp_path).capacity("any", 100) * BLOCK
    assert capacity == pytest.approx(SHARE_OF_FREE_DISK * shutil.disk_usage(tmp_path).free, rel=0.1)


def test_files_with_other_names_are_deleted_in_every_folder(tmp_path: Path) -> None:
    cache = filled(tmp_path, 4 * BLOCK, one=Priority.SMALL, two=Priority.PRESENT)
    for folder in ("one", "two"):
        assert cache.put(folder, "b", b"x")
    cache.drop_others({"b", "c"})
    assert kept(tmp_path) == {"one/b", "two/b"}
    assert cache.used == 2 * BLOCK


Operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "get", "use", "drop", "again"]),
        st.integers(0, 3),  # folder
        st.integers(0, 4),  # file
        st.integers(0, 2 * BLOCK),  # length
        st.sampled_from(Priority),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(operations=Operations, blocks=st.integers(0, 6))
def test_it_never_exceeds_its_budget_or_returns_what_was_not_stored(
    operations: list[tuple[str, int, int, int, Priority]], blocks: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, put = Path(folder), {}
        cache = DiskCache(root, blocks * BLOCK)
        for kind, where, what, length, priority in operations:
            key = str(where), str(what)
            if kind == "put" and cache.put(*key, data := os.urandom(length)):
                put[key] = data
                assert cache.get(*key) == data
            elif kind == "get":
                assert cache.get(*key) in (None, put.get(key))
            elif kind == "use":
                cache.use(key[0], priority)
            elif kind == "drop":
                cache.drop_unused()
            elif kind == "again":
                cache = DiskCache(root, blocks * BLOCK)
            taken = sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in root.glob("*/*"))
            assert taken == cache.used <= blocks * BLOCK


FULL_DISK = """
import sys
from pathlib import Path
from edge_runtime.data.cache import BLOCK, DiskCache, Priority
root = Path(sys.argv[1])
cache = DiskCache(root, 1000 * BLOCK)
cache.use("ahead", Priority.AHEAD)
cache.use("present", Priority.PRESENT)
ahead = [cache.put("ahead", str(n), bytes([n]) * (BLOCK - 4)) for n in range(40)]
present = [cache.put("present", str(n), bytes([n]) * (BLOCK - 4)) for n in range(40)]
assert ahead.count(True) > 5 and not all(ahead), ahead  # as many as fit
assert present.count(True) > 5 and not all(present), present  # in place of the others
assert not any(cache.get("ahead", str(n)) for n in range(40))
assert [cache.get("present", str(n)) is not None for n in range(40)] == present
assert not [path for path in root.glob("*/.*")]
"""


def run_on_a_small_disk(program: str, folder: Path) -> None:
    """Runs it with a folder on a disk of 25 blocks."""
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size=100k tmpfs {folder}"
    spaces = [str(unshare), "--user", "--map-root-user", "--mount", "sh", "-c"]
    if unshare is None or subprocess.run([*spaces, mount], capture_output=True, check=False).returncode:
        not_tested("no small file system can be mounted here")
    command = f'{mount} && exec "$0" -c "$1" {folder}/cache'
    done = subprocess.run(
        [*spaces, command, sys.executable, program], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr


def test_a_full_disk_is_a_smaller_budget(tmp_path: Path) -> None:
    run_on_a_small_disk(FULL_DISK, tmp_path)


KEPT_FREE = """
import shutil, sys
from pathlib import Path
from edge_runtime.data.cache import BLOCK, DiskCache, Priority
root = Path(sys.argv[1])
cache = DiskCache(root, 1000 * BLOCK, keep_free=10 * BLOCK)
data = bytes(BLOCK - 4)

def free():
    return shutil.disk_usage(root).free // BLOCK

cache.use("ahead", Priority.AHEAD)
cache.use("present", Priority.PRESENT)
fits = cache.capacity("ahead", BLOCK - 4)
assert fits == free() - 10 > 5, fits
assert [cache.put("ahead", str(n), data) for n in range(fits + 3)] == [True] * fits + [False] * 3
assert cache.capacity("present", BLOCK - 4) == fits and cache.capacity("ahead", BLOCK - 4) == 0
assert all(cache.put("present", str(n), data) for n in range(fits - 2))  # in place of the others
cache.keep_free()
assert free() == 10 and cache.used == fits * BLOCK
(root.parent / "another's").write_bytes(bytes(4 * BLOCK))
assert cache.capacity("present", BLOCK - 4) == cache.capacity("ahead", BLOCK - 4) == 0
cache.keep_free()
assert free() == 10 and not list((root / "ahead").iterdir()), free()
assert not cache.put("ahead", "new", data)
assert cache.get("present", str(fits - 3)) == data
for size in (9, 5):
    (root.parent / str(size)).write_bytes(bytes(size * BLOCK))
    cache.keep_free()
assert cache.used == 0 and not cache.put("present", "0", data)  # nothing is left to delete
(root.parent / "9").unlink()
assert cache.put("present", "0", data)
"""


def test_some_of_the_disk_stays_free(tmp_path: Path) -> None:
    run_on_a_small_disk(KEPT_FREE, tmp_path)
