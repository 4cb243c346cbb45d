"""Loads the data of a simulation: folders, parquet files, and Hugging Face datasets, saved or from the hub."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from devices.trial.dataset import find_files
from edge_runtime.data.features import Inputs
from edge_runtime.data.inputs import Kind, Reader, reader_of
from edge_runtime.data.sample_reader import SampleReader
from edge_runtime.data.samples import Sample
from edge_runtime.data.unreadable import UnreadableError, decoding
from fedfmsl.common.class_folders import check_folder, has_splits, normal_name, subfolders
from fedfmsl.common.cli import console
from fedfmsl.common.folder_walk import SkippedFile, count_files, files_below, has_suffix
from fedfmsl.common.split_names import Role, role_of
from fedfmsl.errors import ConfigError, InputError
from fedfmsl.protocol.class_names import joined_names
from fedfmsl.protocol.task_bundle import TaskBundle

LABEL_COLUMNS = ("label", "labels", "class", "category")
TRAIN, TEST = "train", "test"
LISTED_CLASSES = 50  # that an error lists


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table. "": the first that fits; without `group`, samples have no groups."""

    sample: str = ""
    label: str = ""
    group: str = ""


@dataclass(frozen=True)
class Dataset:
    """Each content occurs once. `train_groups` and `test_groups`: the natural group of each sample, "" without one.
    `inputs` decodes samples. `skipped`: the number of files or rows that are not used."""

    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    train_groups: tuple[str, ...]
    test_groups: tuple[str, ...]
    inputs: Inputs
    skipped: int

    @property
    def coverage(self) -> str:
        """How many samples are used. "": all of them."""
        used = len(self.train) + len(self.test)
        return f"{used} of {used + self.skipped} samples were used, {self.skipped} were skipped" if self.skipped else ""


@dataclass(frozen=True)
class Item:
    """A labelled sample before its class is looked up. `read` gives its bytes."""

    name: str
    label: str
    group: str
    split: str
    read: Callable[[], bytes]


def load_folder(folder: Path, bundle: TaskBundle, grouped: bool, test_share: float) -> Dataset:
    """DIR/<class>/… or DIR/{train,test}/<class>/…; with `grouped`, DIR/<group>/ holds one of these for each group.

    Raises InputError if there is nothing to train on, or a class is not in the bundle.
    """
    reader = reader_of(bundle)
    check_folder(folder, "--images")
    if grouped and has_splits(folder, "--images"):
        raise InputError(f"{folder} has a training folder where --partition natural expects one folder per group")
    groups = subfolders(folder, "--images", []) if grouped else [""]
    skipped: list[SkippedFile] = []
    items = [
        Item(str(path), label, group, split, path.read_bytes)
        for group in groups
        for split, files in zip(
            (TRAIN, TEST), find_files(folder / group, reader.kind, (), test_share, skipped), strict=True
        )
        for label, paths in files.items()
        for path in paths
    ]
    return _dataset(items, bundle, str(folder), SampleReader(reader), count_files(skipped))


def load_table(source: str, bundle: TaskBundle, columns: Columns, test_share: float) -> Dataset:
    """A parquet file, a folder of parquet files, a saved Hugging Face dataset, or the id of one on the hub.

    Without a test split, the last `test_share` of each class is one. Raises InputError if there is nothing to train on
    or a class is not in the bundle, ConfigError if a column or the package `datasets` is missing.
    """
    reader = reader_of(bundle)
    rows: list[Item] = []
    for split, table in _tables(source):
        first = sum(item.split == split for item in rows)  # rows of several files are counted on
        rows += _items(table, split, first, source, reader, columns)
    items = _readable(rows, reader.kind, source)
    if not any(item.split == TEST for item in items):
        items = _hold_out(items, test_share)
    inputs = TableInputs(reader, {item.name: item.read for item in items})
    return _dataset(items, bundle, source, inputs, len(rows) - len(items))


@dataclass(frozen=True)
class TableInputs:
    """Decodes the rows of tables. `rows`: how to read a row, by the path of its sample."""

    reader: Reader
    rows: Mapping[str, Callable[[], bytes]]

    def batch(self, samples: Sequence[Sample]) -> dict[str, NDArray[Any]]:
        return {self.reader.input: np.stack([self._decode(sample) for sample in samples])}

    def _decode(self, sample: Sample) -> NDArray[Any]:
        return self.reader.decode(self.rows[str(sample.path)]())


def _readable(items: Sequence[Item], kind: Kind, source: str) -> list[Item]:
    """Prints how many are not readable, and why the first of them is not."""
    readable, first = [], ""
    for item in items:
        try:
            with decoding():
                kind.check(item.read())
        except UnreadableError as error:
            first = first or f"{item.name}: {kind.not_readable(error.reason)}"
        else:
            readable.append(item)
    if first:
        console.print(
            f"skipped: {len(items) - len(readable)} of {len(items)} samples of {source}, the first is {first}"
        )
    return readable


def _dataset(items: Sequence[Item], bundle: TaskBundle, source: str, inputs: Inputs, skipped: int) -> Dataset:
    """`skipped`: those that are not among `items`. Uses each content once. A content with two classes is skipped; a
    test sample that is also trained on, too."""
    classes = {normal_name(name): label for label, name in enumerate(bundle.classes)}
    found = sorted({item.label for item in items})
    unknown = [label for label in found if label not in classes]
    if unknown:
        raise InputError(
            f"{source} has the class {unknown[0]!r}, which the task does not have; name the classes with "
            f"{_classes_option(found)}"
        )
    contents: dict[str, list[Item]] = {}
    for item in items:
        contents.setdefault(hashlib.sha256(item.read()).hexdigest(), []).append(item)
    parts: dict[str, list[tuple[Sample, str]]] = {TRAIN: [], TEST: []}
    for sha256, same in contents.items():
        if len({item.label for item in same}) == 1:
            item = next((item for item in same if item.split == TRAIN), same[0])
            parts[item.split].append((Sample(Path(item.name), sha256, classes[item.label]), item.group))
    used = len(parts[TRAIN]) + len(parts[TEST])
    if used < len(items):
        console.print(f"skipped: {len(items) - used} of {len(items)} samples of {source} occur more than once")
    _check_classes([sample.label for sample, _ in parts[TRAIN]], bundle, source)
    train, test = (tuple(sample for sample, _ in part) for part in parts.values())
    train_groups, test_groups = (tuple(group for _, group in part) for part in parts.values())
    return Dataset(train, test, train_groups, test_groups, inputs, skipped + len(items) - used)


def _classes_option(classes: Sequence[str]) -> str:
    """The option that names these classes."""
    if len(classes) > LISTED_CLASSES:
        return f"--classes-file FILE, a text with the {len(classes)} names, one per line"
    return f"--classes {shlex.quote(joined_names(classes))}"


def _check_classes(labels: Sequence[int], bundle: TaskBundle, source: str) -> None:
    counts = np.bincount(labels, minlength=len(bundle.classes)) if labels else np.zeros(1, np.int64)
    if counts.min() < 2:
        name, count = bundle.classes[int(counts.argmin())], int(counts.min())
        raise InputError(f"{source} has {count} training sample(s) of class {name!r}; at least two are needed")


def _tables(source: str) -> Iterator[tuple[str, pyarrow.Table]]:
    """Each split and its table."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = {name: path / name for name, _ in files_below(path, "", []) if has_suffix(name, {".parquet"})}
    else:
        files = {path.name: path} if path.suffix == ".parquet" else {}
    if [*files.values()] == [path] and not path.exists():
        raise InputError(f"--dataset {source} does not exist; check the path")
    if not files:
        yield from _hugging_face(source, path)
    for name, split in _used_splits(files, source, Role.TRAIN).items():
        file = files[name]
        try:
            yield split, pyarrow.parquet.read_table(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"--dataset {file} cannot be read ({error}); pass a parquet file") from error


def _hugging_face(source: str, path: Path) -> Iterator[tuple[str, pyarrow.Table]]:
    try:
        import datasets  # an optional dependency
    except ImportError as error:
        raise ConfigError(
            f"--dataset {source} is not a parquet file or a folder of them, and other datasets need the package "
            "datasets: pip install datasets"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(source)
    except Exception as error:  # the package has no common base class
        raise InputError(
            f"--dataset {source} is neither a saved dataset nor one on the Hugging Face hub "
            f"({str(error).splitlines()[0]}); check the name"
        ) from error
    splits = loaded if isinstance(loaded, dict) else {TRAIN: loaded}
    for name, role in _used_splits(splits, source, None).items():
        yield role, splits[name].flatten_indices().with_format("arrow")[:]


def _used_splits(names: Iterable[str], source: str, other: Role | None) -> dict[str, str]:
    """TRAIN or TEST for each table that is used, by the first words in its path: `test/0.parquet`, `test-0.parquet`.

    A validation split is the test split if there is no other. `other`: the role of a table whose name says none.
    """
    roles = {}
    for name in names:
        words = (re.split(r"[-_.\d]", part)[0] for part in name.split("/"))
        roles[name] = next(filter(None, map(role_of, words)), other)
    if len(roles) == 1:
        return dict.fromkeys(roles, TRAIN)
    test = Role.TEST if Role.TEST in roles.values() else Role.VALIDATION
    used = {name: TEST if role is test else TRAIN for name, role in roles.items() if role in (Role.TRAIN, test)}
    if unused := [name for name in roles if name not in used]:
        console.print(f"skipped: {', '.join(unused)} of {source}: neither a training nor a test split")
    return used


def _items(table: pyarrow.Table, split: str, first: int, source: str, reader: Reader, columns: Columns) -> list[Item]:
    sample, label = _sample_column(table, reader, columns.sample), _label_column(table, columns.label)
    groups = table.column(_named(table, columns.group, "--group-column")).to_pylist() if columns.group else None
    names = _label_names(table, label)
    column = table.column(sample)
    return [
        Item(
            f"{source}/{split}/{first + row}",
            normal_name(names[value] if names and isinstance(value, int) else str(value)),
            str(groups[row]) if groups else "",
            split,
            lambda row=row: _bytes(column[row].as_py()),  # type: ignore[misc]
        )
        for row, value in enumerate(table.column(label).to_pylist())
    ]


def _bytes(value: Any) -> bytes:
    """The bytes of a text, of an image, or of Hugging Face's struct of bytes and path."""
    if isinstance(value, dict):
        return _bytes(value["bytes"]) if value.get("bytes") else Path(str(value.get("path"))).read_bytes()
    return value.encode() if isinstance(value, str) else bytes(value or b"")


def _sample_column(table: pyarrow.Table, reader: Reader, wanted: str) -> str:
    if wanted:
        return _named(table, wanted, "--sample-column")
    is_text = reader.kind.noun == "text"
    for field in table.schema:
        is_string = pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)
        if is_string if is_text else pyarrow.types.is_struct(field.type) or pyarrow.types.is_binary(field.type):
            return str(field.name)
    raise ConfigError(
        f"no column with {reader.kind.noun}s among {', '.join(table.column_names)}; name it with --sample-column"
    )


def _label_column(table: pyarrow.Table, wanted: str) -> str:
    if wanted:
        return _named(table, wanted, "--label-column")
    for name in LABEL_COLUMNS:
        if name in table.column_names:
            return name
    raise ConfigError(
        f"no column {LABEL_COLUMNS[0]!r} among {', '.join(table.column_names)}; name it with --label-column"
    )


def _named(table: pyarrow.Table, name: str, flag: str) -> str:
    if name not in table.column_names:
        raise ConfigError(f"{flag} {name}: no such column; choose from {', '.join(table.column_names)}")
    return name


def _label_names(table: pyarrow.Table, label: str) -> list[str] | None:
    """The class names that a Hugging Face dataset has for the integers of its labels."""
    try:
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _hold_out(items: Sequence[Item], share: float) -> list[Item]:
    """The last `share` of each class becomes the test split, as in `devices.trial`."""
    by_label: dict[str, list[Item]] = {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    kept = []
    for same in by_label.values():
        first = max(2, len(same) - round(share * len(same)))
        kept += same[:first]
        kept += [Item(item.name, item.label, item.group, TEST, item.read) for item in same[first:]]
    return kept
