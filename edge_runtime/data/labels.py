"""A CSV file of labels, for folders that are not sorted by class."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.data.inputs import Kind
from edge_runtime.data.proposals import remedy_of_unknown
from fedfmsl.common.class_folders import ClassFile, Listing, check_folder, normal_name, similar, unknown_class
from fedfmsl.common.files import why_no_file, write_atomically
from fedfmsl.common.folder_walk import SkippedFile, files_below, wrong_suffix
from fedfmsl.errors import InputError

Labels = dict[str, dict[str, int]]  # file → class → line number


def walk_labelled(folder: Path, kind: Kind, source: Path, classes: Sequence[str]) -> Listing:
    """The files at any depth below `folder` that the CSV file `source` labels, sorted by class.

    Raises InputError if `folder` does not exist, or as `read_labels` does.
    """
    check_folder(folder, kind.noun)
    labels, skipped = read_labels(source)
    known = {normal_name(name): name for name in classes}
    files: list[ClassFile] = []
    unknown: Counter[str] = Counter()
    unknown_lines: list[tuple[int, str]] = []
    unlabelled = 0
    for name, version in files_below(folder, "", skipped):
        lines = labels.pop(normal_name(name), None)
        if lines is None:
            unlabelled += kind.has_name(name)
        elif not kind.has_name(name):
            skipped.append(wrong_suffix(folder / name, kind.noun))
        elif len(lines) > 1:
            each = " and ".join(f"{label!r} in line {line}" for label, line in lines.items())
            skipped.append(SkippedFile(folder / name, f"several classes in {source.name}", each))
        else:
            ((label, line),) = lines.items()
            if label in known:
                files.append(ClassFile(folder / name, name, known[label], version))
            else:
                unknown[label] += 1
                unknown_lines.append((line, label))
    for line, label in unknown_lines:
        detail = " ".join(filter(None, (f"line {line}: {label!r}", similar(label, classes))))
        remedy = remedy_of_unknown(classes, "or correct the line", label, unknown[label])
        skipped.append(SkippedFile(source, f"{unknown_class(classes)}; {remedy}", detail))
    for name, lines in labels.items():
        detail = f"line {min(lines.values())}: {name}"
        skipped.append(SkippedFile(source, f"names a file that is not below {folder}", detail))
    if unlabelled:
        skipped.append(SkippedFile(folder, f"no label in {source.name}", files=unlabelled))
    return Listing(sorted(files, key=lambda file: file.label), skipped, unknown=unknown)


def read_labels(path: Path) -> tuple[Labels, list[SkippedFile]]:
    """The labels of a CSV file with the columns `file` (a path below the samples' folder) and `class`, and its
    incomplete lines.

    Raises InputError if the file does not exist, is not CSV in UTF-8, or lacks a column.
    """
    labels: Labels = {}
    skipped = []
    if reason := why_no_file(path):  # opening a pipe would wait for its writer
        raise InputError(f"labels {path}: it {reason}; pass a CSV file, or use one subfolder per class")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)
            if not {"file", "class"} <= {*(reader.fieldnames or ())}:
                raise InputError(f"labels {path} lack the columns file and class; name them in the first line")
            for row in reader:
                name, label = (normal_name(row[column] or "") for column in ("file", "class"))
                if name and label:
                    labels.setdefault(posixpath.normpath(name), {}).setdefault(label, reader.line_num)
                else:
                    skipped.append(SkippedFile(path, "without a file or a class", f"line {reader.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"labels {path} cannot be read ({error}); it must be a CSV file in UTF-8") from error
    return labels, skipped


def labelled_names(path: Path) -> frozenset[str]:
    """The files with a class, by their paths below the samples' folder. Raises InputError as `read_labels` does."""
    return frozenset(read_labels(path)[0])


def line_of(path: Path, name: str, label: str) -> str:
    """The line that gives the file `name` a class, in the columns of this labels file. Raises InputError as
    `read_labels` does."""
    read_labels(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        columns = next(csv.reader(file, strict=True, skipinitialspace=True))
    line = io.StringIO()
    values = {"file": name, "class": label}
    csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="").writerow([values.get(each, "") for each in columns])
    return line.getvalue()


def add_lines(path: Path, lines: Sequence[str]) -> None:
    """Adds those lines that a labels file does not have. Other bytes stay as they are. Durable. Raises OSError."""
    before = path.read_bytes()
    end = b"\r\n" if b"\r\n" in before else b"\n"
    present = {*before.splitlines()}
    new = [line.encode() for line in dict.fromkeys(lines) if line.encode() not in present]
    joint = b"" if not before or before.endswith((b"\n", b"\r")) else end
    _rewrite(path, before, before + joint + b"".join(line + end for line in new) if new else before)


def remove_lines(path: Path, lines: Sequence[str]) -> None:
    """Removes lines that `add_lines` has added; a file that is gone has none. Other bytes stay as they are. Durable.
    Raises OSError."""
    if not path.exists():
        return
    before, removed = path.read_bytes(), {line.encode() for line in lines}
    kept = (line for line in before.splitlines(keepends=True) if line.rstrip(b"\r\n") not in removed)
    _rewrite(path, before, b"".join(kept))


def _rewrite(path: Path, before: bytes, after: bytes) -> None:
    """Keeps mode and group, so that others can still read it, and a link as a link."""
    if after != before:
        path = path.resolve()
        found = path.stat()
        write_atomically(path, after, durable=True)
        with contextlib.suppress(PermissionError):  # this process is not in the group
            os.chown(path, -1, found.st_gid)
        path.chmod(found.st_mode)
