"""Results of a simulation: a JSON file per cell of the grid, and tables of all of them.

A file is written when its cell is done. So a simulation can be killed at any time, and continues with the next cell.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedfmsl.common.files import write_atomically

Result = dict[str, Any]
STREAM = "stream "  # in the name of a column, before the share of novel samples
COLUMNS = ("own", "novel", "fleet", f"{STREAM}0.1", "harmonic", "worst_decile", "unseen", "unseen_adapted")
COSTS = ("kilobytes_up", "kilobytes_down", "device_seconds")  # of a device in a round


@dataclass(frozen=True)
class Cell:
    """One combination of the grid. `alpha` is None if the partition has none."""

    method: str
    alpha: float | None
    learning_rate: float
    seed: int

    def path(self, folder: Path, key: str) -> Path:
        """`key`: digest of everything else that the result depends on."""
        alpha = "" if self.alpha is None else f"-alpha-{self.alpha:g}"
        return folder / f"{self.method}{alpha}-rate-{self.learning_rate:g}-seed-{self.seed}-{key}.json"


def key_of(values: Mapping[str, Any]) -> str:
    """A short digest of settings, for file names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def write_result(path: Path, cell: Cell, result: Result) -> None:
    write_atomically(path, json.dumps({**asdict(cell), **result}, indent=1).encode(), durable=True)


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Those of the files that exist."""
    return [json.loads(path.read_text("utf-8")) for path in paths if path.is_file()]


def value_of(result: Result, row: str, column: str) -> float | None:
    """The value of a column in the row of a model. None if it was not measured. Columns: those of COLUMNS and COSTS,
    and STREAM with another measured share."""
    if column in COSTS:
        return float(result[column])
    measured = result[column if column.startswith("unseen") else "rows"].get(row, {})
    if column.startswith(STREAM):
        measured, column = measured.get("stream", {}), column.removeprefix(STREAM)
    value: float | None = measured.get("own" if column.startswith("unseen") else column)
    return value


def as_csv(results: Sequence[Result]) -> str:
    """A line for each model of each cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "model", "alpha", "learning_rate", "seed", "held_out", *COLUMNS, *COSTS])
    for result in results:
        for row in result["rows"]:
            cell = [result["method"], row, result["alpha"], result["learning_rate"], result["seed"]]
            values = [value_of(result, row, column) for column in (*COLUMNS, *COSTS)]
            writer.writerow([*cell, result["held_out"][row], *("" if value is None else value for value in values)])
    return text.getvalue()


def as_markdown(results: Sequence[Result]) -> str:
    head, *rows = rows_of(results)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def rows_of(results: Sequence[Result], columns: Sequence[str] = (*COLUMNS, *COSTS)) -> list[list[str]]:
    """A head, and a row for each model with one α and learning rate: mean ± standard deviation over the seeds."""
    rows = [["method", "model", "α", "learning rate", "seeds", *(column.replace("_", " ") for column in columns)]]
    for (method, row, alpha, rate), same in grouped(results).items():
        cells = [method, row, "" if alpha is None else f"{alpha:g}", f"{rate:g}", str(len(same))]
        for column in columns:
            form = ".3g" if column in COSTS else ".3f"
            cells.append(spread([value_of(result, row, column) for result in same], form))
        rows.append(cells)
    return rows


def grouped(results: Sequence[Result]) -> dict[tuple[str, str, float | None, float], list[Result]]:
    """Results by method, model, α and learning rate: one for each seed."""
    groups: dict[tuple[str, str, float | None, float], list[Result]] = {}
    for result in results:
        for row in result["rows"]:
            key = (result["method"], row, result["alpha"], result["learning_rate"])
            groups.setdefault(key, []).append(result)
    return groups


def spread(values: Iterable[float | None], form: str) -> str:
    """Mean ± standard deviation; "" without values."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = format(statistics.mean(known), form)
    return f"{mean} ± {format(statistics.stdev(known), form)}" if len(known) > 1 else mean
