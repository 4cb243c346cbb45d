"""The table of the training step: its ratios, and that the documentation has the committed one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.compare import slower
from benchmarks.step_table import PAGE, RESULTS, best_torch, marks, rows_of, table


def turns(*seconds: float) -> list[dict[str, float]]:
    return [{"seconds": each, "peak_rss_mb": 100.0} for each in seconds]


def test_ratios_are_those_of_the_same_round_so_that_a_slow_phase_changes_none() -> None:
    measured = {
        "product": turns(1, 1, 10),
        "torch-whole": turns(8, 8, 80),
        "torch-whole-bf16": turns(4, 4, 40),
        "step-graph-fp32-1": turns(2, 2, 20),
    }
    rows = rows_of(measured, dict.fromkeys(measured, 10), dict.fromkeys(measured, "fp32"), {"torch-whole-bf16": 0.9})
    row = rows["step-graph-fp32-1"]
    assert (row["of_product"], row["times_faster"], row["times_best_torch"]) == (2, 4, 2)
    assert row["share_of_product_rate"] == 0.5
    assert (row["gradient_cosine"], rows["torch-whole-bf16"]["gradient_cosine"]) == (None, 0.9)
    assert best_torch({"torch-whole": 8, "torch-whole-bf16": 4, "step-graph-fp32-1": 2}) == "torch-whole-bf16"
    engines = {name: measured[name] for name in ("product", "step-graph-fp32-1")}
    assert (
        rows_of(engines, dict.fromkeys(engines, 10), dict.fromkeys(engines, "fp32"), {})["product"]["times_faster"]
        is None
    )


def test_a_row_is_slower_from_one_and_a_half_times_the_committed_ratio_on() -> None:
    assert slower({"a": 2.0, "b": 2.0, "c": 2.0}, {"a": 2.9, "b": 3.1, "c": 1.0}) == ["b"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("step-*.json")), ids=lambda path: path.stem)
def test_the_documentation_has_the_committed_table(path: Path) -> None:
    page, (begin, end) = PAGE.read_text(encoding="utf-8"), marks(path)
    results = json.loads(path.read_text(encoding="utf-8"))
    assert page.partition(begin)[2].partition(end)[0].strip() == table(results)
    assert table({**results, "missing": {"torch-whole-compile": "no compiler"}}).count("is missing: no compiler.") == 1
