"""Finds the training and test files of each class in a user's folder of images or texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_runtime.data.inputs import IMAGES, TEXTS, Kind
from edge_runtime.data.unreadable import UnreadableError, read_file
from fedfmsl.common.class_folders import ClassFile, check_folder, normal_name, walk_classes
from fedfmsl.common.cli import console
from fedfmsl.common.folder_walk import SkippedFile, summarize
from fedfmsl.errors import ConfigError, InputError
from fedfmsl.protocol.class_names import fault

NOT_TRAINED = "test sample of a class without training samples; add some, or remove it"
Files = dict[str, list[Path]]  # class → its files


def kind_of(folder: Path) -> Kind:
    """The kind of most files below `folder`. Raises InputError if it is no folder or has neither images nor texts."""
    check_folder(folder, "--images")
    counts = [(len(kind.files(folder, [])), kind) for kind in (IMAGES, TEXTS)]
    most, kind = max(counts, key=lambda pair: pair[0])
    if not most:
        raise InputError(f"folder {folder} holds no images and no texts (.txt); put them into one subfolder per class")
    return kind


def find_files(
    folder: Path,
    kind: Kind,
    classes: Sequence[str] = (),
    test_share: float = 0.2,
    skipped: list[SkippedFile] | None = None,
) -> tuple[Files, Files]:
    """Training and test files by class. Prints how many files are not used, by reason, and adds them to `skipped`.

    Without a test folder, the last files of each class in the order of their names are the test files: neighbours in
    name are often near-duplicates, which must not be in both splits. Raises InputError if a class of `classes` has no
    files, or no class has any; ConfigError if the name of a class is not valid. Without `classes`, every class is used.
    """
    listing = walk_classes(folder, kind.suffixes, kind.noun)
    classes = [*map(normal_name, classes)]
    files = [file for file in listing.files if not classes or file.label in classes]
    unreadable = {file.path: reason for file in files if (reason := _unreadable(file, kind))}
    files = [file for file in files if file.path not in unreadable]
    trained = {file.label for file in files if not file.is_test}
    untrained = [SkippedFile(file.path, NOT_TRAINED) for file in files if file.label not in trained]
    unused = [*listing.skipped, *unreadable.values(), *untrained]
    for line in summarize(unused, folder):
        console.print(f"skipped: {line}")
    if skipped is not None:
        skipped += unused
    train = _by_class([file for file in files if not file.is_test], classes)
    for name in train:
        if problem := fault(name):
            raise ConfigError(f"{folder}: class {name!r} {problem}")
    empty = [name for name in classes if name not in train]
    if empty:
        raise InputError(f"class {empty[0]!r} has no {kind.noun}s in {folder}; add some, or omit it from --classes")
    if not train:
        raise InputError(f"folder {folder} holds no {kind.noun}s to train on; put them into one subfolder per class")
    if listing.test is not None:
        return train, _by_class([file for file in files if file.is_test and file.label in trained], [*train])
    test = {}
    for name, paths in train.items():
        kept = max(2, len(paths) - round(test_share * len(paths)))
        train[name], test[name] = paths[:kept], paths[kept:]
    return train, test


def _unreadable(file: ClassFile, kind: Kind) -> SkippedFile | None:
    try:
        kind.check(read_file(file.path))
    except UnreadableError as error:
        return SkippedFile(file.path, kind.not_readable(error.reason))
    return None


def _by_class(files: list[ClassFile], classes: Sequence[str]) -> Files:
    """In the order of `classes`, or of the files."""
    found: Files = {name: [] for name in classes}
    for file in files:
        found.setdefault(file.label, []).append(file.path)
    return {name: paths for name, paths in found.items() if paths}
