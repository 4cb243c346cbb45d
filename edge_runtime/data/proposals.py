"""New classes that a device proposes for the run, because it has labelled samples of them (ours).

Only the names and the numbers of files leave the device. The server's operator, or a rule, adds them to the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_runtime.data.samples import LEAST
from fedfmsl.common.class_folders import similar
from fedfmsl.common.folder_walk import THUMBNAIL_FOLDERS
from fedfmsl.common.split_names import role_of
from fedfmsl.errors import InputError
from fedfmsl.protocol.class_names import fault
from fedfmsl.protocol.messages import MAX_PROPOSED


class NothingToTrainError(InputError):
    """The samples' folder has nothing to train on. `proposed`: as in `Splits`."""

    def __init__(self, text: str, proposed: Mapping[str, int]) -> None:
        super().__init__(text)
        self.proposed = proposed


def proposed_classes(unknown: Mapping[str, int], classes: Sequence[str]) -> dict[str, int]:
    """Those of the `unknown` classes, each with its number of files, that can be trained once they are in the task.

    They have LEAST files at least, and a name that can be one of a class. A name that says a split, or that differs
    from one of `classes` in case only, is more likely a mistake. Of more than MAX_PROPOSED those with most files.
    """
    possible = [name for name, files in unknown.items() if files >= LEAST and not name_fault(name, classes)]
    chosen = sorted(possible, key=lambda name: (-unknown[name], name))[:MAX_PROPOSED]
    return {name: unknown[name] for name in sorted(chosen)}


def name_fault(name: str, classes: Sequence[str]) -> str:
    """Why a name cannot be that of a new class beside `classes`, and the remedy. "": it can."""
    if hint := similar(name, classes):
        return f"is like that of a known class; {hint}"
    if role_of(name) or name.casefold() in THUMBNAIL_FOLDERS:
        return "is that of a folder of a split or of thumbnails; choose another one"
    return fault(name)


def remedy_of_unknown(classes: Sequence[str], others: str, name: str, files: int) -> str:
    """What to do about a class that is not among `classes` and has `files` files to train on. `others`: the remedies
    besides adding it to the run."""
    if not similar(name, classes) and (problem := name_fault(name, classes)):
        return f"its name {problem}"
    if files < LEAST:
        return f"a new class needs {LEAST} files to train on, and to be proposed; add files, {others}"
    return f"add it to the run, {others}"


def describe_proposed(proposed: Mapping[str, int]) -> str:
    """For people, like "fig (5), lime (12)"."""
    return ", ".join(f"{name} ({files})" for name, files in proposed.items())
