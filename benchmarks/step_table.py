"""The table of `benchmarks.step`, from its measurements or from the file that they are kept in.

A ratio is the median of the ratios within a round, so that a change of the machine's speed cancels out.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.step_worker import Turns
from benchmarks.tables import line

RESULTS = Path(__file__).parent / "results"  # a file for each model
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
PRODUCT = "product"
REFERENCE = "torch-whole"  # in fp32
COLUMNS = (
    *("variant", "precision", "ms per step", "lowest–highest", "× torch fp32", "× best torch", "peak MB"),
    *("of torch's", "GFLOP", "of rate", "cosine"),
)

Row = dict[str, Any]


def rows_of(
    turns: Turns, flops: Mapping[str, int], precisions: Mapping[str, str], cosines: Mapping[str, float]
) -> dict[str, Row]:
    """A row for each variant. `cosines`: of its gradient to that of torch in fp32, where it was compared."""
    seconds = {name: [turn["seconds"] for turn in each] for name, each in turns.items()}
    best = best_torch({name: statistics.median(each) for name, each in seconds.items()})
    rows: dict[str, Row] = {}
    for name, spent in seconds.items():
        rows[name] = {
            "precision": precisions[name],
            "seconds": statistics.median(spent),
            "seconds_min": min(spent),
            "seconds_max": max(spent),
            "of_product": ratio(spent, seconds[PRODUCT]),
            "times_faster": ratio(seconds[REFERENCE], spent) if REFERENCE in seconds else None,
            "times_best_torch": ratio(seconds[best], spent) if best else None,
            "peak_rss_mb": max(turn["peak_rss_mb"] for turn in turns[name]),
            "gflop": flops[name] / 1e9,
            "share_of_product_rate": flops[name] / flops[PRODUCT] / ratio(spent, seconds[PRODUCT]),
            "gradient_cosine": cosines.get(name),
        }
    return rows


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def best_torch(seconds: Mapping[str, float]) -> str:
    """The quickest variant of the whole model in torch; "" if there is none."""
    return min((name for name in seconds if name.startswith(REFERENCE)), key=lambda name: seconds[name], default="")


def results_of(model: str) -> Path:
    """The committed measurements of this model."""
    return RESULTS / f"step-{model}.json"


def marks(path: Path) -> tuple[str, str]:
    """The lines of the documentation around the table of these measurements."""
    return f"<!-- {path.stem}: begin -->", f"<!-- {path.stem}: end -->"


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Writes the file, and the table of the documentation if it is a file in the repository."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if path.resolve().parent == RESULTS.resolve():
        text, (begin, end) = PAGE.read_text(encoding="utf-8"), marks(path)
        before, after = text.partition(begin)[0], text.partition(end)[2]
        PAGE.write_text(f"{before}{begin}\n{table(results)}\n{end}{after}", encoding="utf-8")


def table(results: Mapping[str, Any]) -> str:
    """Markdown: the rows, the variants that are missing, and the machine."""
    rows: Mapping[str, Row] = results["rows"]
    lines = [line(COLUMNS), line(["---"] * len(COLUMNS))]
    lines += [line(_cells(name, row, rows.get(REFERENCE))) for name, row in rows.items()]
    lines += [f"\n`{name}` is missing: {reason}." for name, reason in results["missing"].items()]
    machine = results["machine"]
    packages = "".join(f", {name} {number}" for name, number in machine["packages"].items())
    lacks = f", without {', '.join(machine['missing_features'])}" if machine["missing_features"] else ""
    lines += [
        f"\nMeasured on {results['date']}, {machine['threads']} threads of {machine['processor']}, with "
        f"{', '.join(machine['features'])}{lacks}{packages}."
    ]
    return "\n".join(lines)


def _cells(name: str, row: Row, reference: Row | None) -> list[str]:
    lowest, highest = 1e3 * row["seconds_min"], 1e3 * row["seconds_max"]
    return [
        name,
        row["precision"],
        f"{1e3 * row['seconds']:.1f}",
        f"{lowest:.1f}–{highest:.1f}",
        _optional(row["times_faster"], ".1f"),
        _optional(row["times_best_torch"], ".1f"),
        f"{row['peak_rss_mb']:.0f}",
        f"{row['peak_rss_mb'] / reference['peak_rss_mb']:.2f}" if reference else "",
        f"{row['gflop']:.1f}",
        f"{row['share_of_product_rate']:.0%}",
        _optional(row["gradient_cosine"], ".5f"),
    ]


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
