"""Where the label of a file goes: into the folder of its class, or into a line of the labels file.

A file in a class folder has that class. With a labels file, a file below the sample folder has the class of its line,
so that it only moves if it is elsewhere, or if its name cannot be written in UTF-8.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.data.labels import labelled_names, line_of, read_labels
from edge_runtime.data.proposals import name_fault
from edge_runtime.labelling.queue import Queue
from fedfmsl.common.class_folders import class_folder, folder_classes, normal_name
from fedfmsl.common.files import shortened
from fedfmsl.errors import InputError, one_line, shown
from fedfmsl.protocol.messages import MAX_PROPOSED


@dataclass(frozen=True)
class Destination:
    """The sample folder and the labels file of a device. Its classes are those of its newest model; `new_classes` are
    not in the run's task yet."""

    images: Path
    labels: Path | None
    queue: Queue

    @property
    def classes(self) -> tuple[str, ...]:
        return self.queue.classes

    @property
    def new_classes(self) -> tuple[str, ...]:
        """At most MAX_PROPOSED classes that have a folder or a line, without those of the model. Raises InputError as
        `folder_classes` and `read_labels` do."""
        classes = self.classes
        if self.labels is None:
            found = folder_classes(self.images, self.queue.noun, [], classes)
        else:
            found = sorted({label for lines in read_labels(self.labels)[0].values() for label in lines})
        new = [name for name in found if name not in classes and not name_fault(name, classes)]
        return tuple(new[:MAX_PROPOSED])

    def check_label(self, label: str, is_new: bool) -> None:
        """Raises InputError unless a file may have this class. `is_new`: it need not be known."""
        classes = self.classes
        if label in classes:
            return
        if is_new:
            known = self.new_classes
            if reason := "" if label in known else name_fault(label, (*classes, *known)):
                raise InputError(f"the name {one_line(repr(label))} {reason}")
        elif label not in self.new_classes:
            raise InputError(f"{one_line(repr(label))} is not a class of the list; choose one of it")

    def reserve(self, source: Path, label: str) -> tuple[Path, str | None]:
        """Where a file with this class belongs, as an empty file until it is moved there, and its line in the labels
        file. Without a move it is `source` itself.

        Raises InputError if the class cannot be a folder or the name is not UTF-8, OSError if nothing can be written.
        """
        if self.labels is None:
            return reserved(class_folder(self.images, self.queue.noun, self.classes, label), source.name), None
        inside = source.is_relative_to(self.images)
        folder, name = (source.parent if inside else self.images), shown(source.name)
        if shown(folder) != str(folder):
            raise InputError(f"a labels file cannot have the name of folder {shown(folder)}; rename it in UTF-8")
        target = source if inside and name == source.name else reserved(folder, name)
        return target, line_of(self.labels, target.relative_to(self.images).as_posix(), label)

    def has_label(self) -> HasLabel:
        """A test for files that have a class already, with the labels file read once."""
        names = labelled_names(self.labels) if self.labels else None
        return HasLabel(self.images, names)


@dataclass(frozen=True)
class HasLabel:
    """`names`: those of the labels file; None: files are in class folders."""

    images: Path
    names: frozenset[str] | None

    def __call__(self, path: Path) -> bool:
        if not path.is_relative_to(self.images):
            return False
        name = path.relative_to(self.images)
        return len(name.parts) > 1 if self.names is None else normal_name(name.as_posix()) in self.names


def reserved(folder: Path, name: str) -> Path:
    """An empty file in `folder`, with this name or, if it is taken, a similar one. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            stem = os.fsencode(shortened(Path(name).stem)).decode(errors="ignore")
            path = folder / f"{stem}-{secrets.token_hex(4)}{Path(name).suffix[:16]}"
        else:
            return path
