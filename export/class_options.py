"""The options of an export that name classes."""

from __future__ import annotations

from pathlib import Path

from fedfmsl.common.class_folders import folder_classes
from fedfmsl.common.cli import console
from fedfmsl.common.folder_walk import SkippedFile, summarize
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.class_names import MAX_CLASSES, check_names, read_names, split_names

CLASSES_HELP = "Number of classes, or their names, separated by commas. Quote a name with a comma: '\"a, b\",c'."


def class_names(classes: str | None, folder: Path | None, file: Path | None) -> tuple[str, ...]:
    """The names of `classes`, `folder` or `file`; none if none of them is given. Prints what is not used of the folder.

    Raises ConfigError as `check_names` does, if there are too many, or if several are given. Raises InputError if one
    cannot be read.
    """
    options = {"--classes": classes, "--classes-from": folder, "--classes-file": file}
    given = [flag for flag, value in options.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other; keep one of them")
    if folder is not None:
        skipped: list[SkippedFile] = []
        names = folder_classes(folder, "--classes-from", skipped)
        for line in summarize(skipped, folder):
            console.print(f"skipped: {line}")
        return check_names(names, f"--classes-from {folder}")
    if file is not None:
        return check_names(read_names(file, "--classes-file"), f"--classes-file {file}")
    if classes is None:
        return ()
    if classes.isascii() and classes.isdigit():
        if len(classes) > len(str(MAX_CLASSES)):
            raise ConfigError(f"--classes {classes[:12]}… is more than {MAX_CLASSES} classes; lower it")
        return check_names([f"class-{index}" for index in range(int(classes))], f"--classes {classes}")
    return check_names(split_names(classes), "--classes")
