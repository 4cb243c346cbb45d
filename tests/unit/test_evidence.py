"""The results that the report of the evidence is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.evidence import results_of
from fedfmsl.errors import InputError
from simulation.results import Cell, write_result


def test_two_results_of_one_cell_are_refused(tmp_path: Path) -> None:
    cells = [Cell("fedit", 0.1, 0.002, seed) for seed in (0, 1)]
    for cell in cells:
        write_result(cell.path(tmp_path, "aaaaaaaa"), cell, {})
    assert [result["seed"] for result in results_of(tmp_path)] == [0, 1]
    write_result(cells[0].path(tmp_path, "bbbbbbbb"), cells[0], {})
    with pytest.raises(InputError, match=r"seed-0-aaaaaaaa\.json and .*seed-0-bbbbbbbb\.json"):
        results_of(tmp_path)
