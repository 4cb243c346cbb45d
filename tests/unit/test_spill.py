"""What a simulation keeps on disk for all of its devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simulation.spill import StoredArrays


def test_a_mapping_on_disk_never_changes_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = StoredArrays([("a", np.zeros(3, np.float32)), ("b", np.ones((2, 2), np.float32))])
    after = before.updated([("a", np.full(3, 7, np.float32)), ("c", np.zeros(1, np.float32))])
    assert [*before] == ["a", "b"] and [*after] == ["a", "b", "c"]
    assert (before["a"].tolist(), after["a"].tolist()) == ([0, 0, 0], [7, 7, 7])
    assert np.array_equal(after["b"], np.ones((2, 2), np.float32)) and after.get("d") is None
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
    del before
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3  # no other version uses the first "a"
    del after
    assert not list(tmp_path.iterdir())
