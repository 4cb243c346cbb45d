"""The fault table of docs/reliability.md."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

from support.fault_records import COUNTS, Record, Records

BEGIN, END = "<!-- the fault table: begin -->", "<!-- the fault table: end -->"
PATHS = ["tests/faults"]
NO_FAULT = "no fault"
HEAD = (
    "| fault | times | failed | lost updates | counted twice | repeated rounds | recomputed rounds | equal to a run "
    "without faults | seconds to recover, median | longest |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def markdown(records: Records, versions: str) -> str:
    rows: dict[str, list[Record]] = {}
    for record in records:
        if record.row.name:
            rows.setdefault(record.row.name, []).append(record)
    names = sorted(rows, key=lambda name: (name != NO_FAULT, name))
    lines = [_heading(records, versions), "", HEAD, *(_line(name, rows[name]) for name in names)]
    failed = [f"- {record.test}: {record.failure} Logs: `{record.logs}`" for record in records if record.failure]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])])


def _heading(records: Records, versions: str) -> str:
    loads = [record.load for record in records]
    load, cores = statistics.median(loads) if loads else 0.0, os.cpu_count() or 1
    loaded = (
        f", on a loaded machine ({load:.0f} processes at work at the same time, median)" if load > 2 * cores else ""
    )
    where = f"{cores} cores{loaded}, Python {platform.python_version()}, {versions}"
    return f"`make faults` at commit {records.commit}, {where}."


def _line(name: str, records: Sequence[Record]) -> str:
    seconds = sorted(each for record in records for each in record.row.seconds)
    failed = sum(bool(record.failure) for record in records)
    counted = [record.row.counts for record in records if record.row.counts]
    counts = [str(sum(each[count] for each in counted)) if counted else "–" for count in COUNTS]
    spread = [f"{statistics.median(seconds):.1f}", f"{seconds[-1]:.1f}"] if seconds else ["–", "–"]
    return f"| {name} | {' | '.join([str(len(seconds) + failed), str(failed), *counts, *spread])} |"


def write(path: Path, table: str) -> None:
    """Replaces the text between the markers. A file without markers gets them at its end."""
    text = path.read_text() if path.is_file() else "# What happens when something fails\n\n"
    if BEGIN not in text:
        text += f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")
