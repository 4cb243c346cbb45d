"""A CSV file that says which class each sample is of, for folders that are not sorted by class."""

from __future__ import annotations

import csv
import posixpath
from pathlib import Path

from edge_runtime.data.samples import SkippedFile
from fedfmsl.errors import InputError

Labels = dict[str, dict[str, int]]  # file → class → the line that says so


def read_labels(path: Path) -> tuple[Labels, list[SkippedFile]]:
    """What a CSV file with the columns `file` (its path below the samples' folder) and `class` says, and the lines that
    say nothing.

    Raises InputError if it is missing, or not such a file.
    """
    labels: Labels = {}
    skipped = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # as some editors of some systems save it
            reader = csv.DictReader(file, strict=True)
            if not {"file", "class"} <= {*(reader.fieldnames or ())}:
                raise InputError(f"labels {path} lack the columns file and class; its first line must name them")
            for row in reader:
                name, label = ((row[column] or "").strip() for column in ("file", "class"))
                if name and label:
                    labels.setdefault(posixpath.normpath(name), {}).setdefault(label, reader.line_num)
                else:
                    skipped.append(SkippedFile(path, f"line {reader.line_num} lacks its file or its class"))
    except FileNotFoundError as error:
        raise InputError(f"labels {path} do not exist") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"labels {path} cannot be read ({error}); it must be a CSV file in UTF-8") from error
    return labels, skipped
