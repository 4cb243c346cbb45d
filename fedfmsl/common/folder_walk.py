"""Which files of a folder are used: one walk for the daemon, build, trial, simulation and predictions (ours).

Hidden entries, leftovers of systems and programs, folders of thumbnails, links to folders, and what cannot be read are
skipped. Each has a reason, and `summarize` counts them for people. Entries are in the order of their names.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedfmsl.errors import shown

# Compared without regard to case.
_FILES = ("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r")
_FOLDERS = (
    *("@eadir", "#recycle", "@recycle", "@recently-snapshot", "#snapshot", "$recycle.bin", "recycler", "lost+found"),
    *("system volume information", "network trash folder", "temporary items", "__macosx", "__pycache__"),
)
LEFT_BEHIND = frozenset(_FILES + _FOLDERS)
THUMBNAIL_FOLDERS = frozenset({"thumbnails", "thumbnail", "thumbs", "_thumbnails", "_thumbs"})
HIDDEN = "hidden"
LEFTOVER = "left by a system or a program"
THUMBNAILS = "folder of thumbnails"
LINK = "link to a folder, which is not followed"
DANGLING = "link to nothing"
REMOVED = "removed while the folder was read"
NO_FILE = "neither a file nor a folder"
EXAMPLES = 3  # paths that a line of a summary names


@dataclass(frozen=True, slots=True)
class FileVersion:
    """Changes when the file is written."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileVersion:
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file or folder that is not used, and why. Equal reasons are counted together; `detail` is about this one only.
    `files`: the number of files in a folder that would be used; 0 for a folder without any."""

    path: Path
    reason: str
    detail: str = ""
    files: int = 1

    @property
    def is_leftover(self) -> bool:
        """Whether it is nothing that anybody would miss."""
        return self.reason in (HIDDEN, LEFTOVER, THUMBNAILS)

    def __str__(self) -> str:
        return shown(f"{self.path}: {self.reason}{f' ({self.detail})' if self.detail else ''}")


def summarize(skipped: Iterable[SkippedFile], folder: Path) -> list[str]:
    """A line for each reason, with the number of files and some of their paths below `folder`."""
    groups: dict[str, list[SkippedFile]] = {}
    for each in skipped:
        groups.setdefault(each.reason, []).append(each)
    return [_line(reason, group, folder) for reason, group in groups.items()]


def count_files(skipped: Iterable[SkippedFile]) -> int:
    """The number of skipped files that somebody might miss."""
    return sum(each.files for each in skipped if not each.is_leftover)


def files_below(folder: Path, name: str, skipped: list[SkippedFile]) -> Iterator[tuple[str, FileVersion]]:
    """The files at any depth below `folder`/`name`, with their paths below `folder`. What is not used is added to
    `skipped`. Links to folders are not followed, because they can form a loop."""
    levels = [_entries_of(folder, name, skipped)]
    while levels:
        path, entry = next(levels[-1], ("", None))
        if entry is None:
            levels.pop()
        elif is_folder(entry, follow=False):
            levels.append(_entries_of(folder, path, skipped))
        elif (version := _version(entry, folder / path, skipped)) is not None:
            yield path, version


def visible_entries(folder: Path, skipped: list[SkippedFile], kept: Collection[str] = ()) -> list[os.DirEntry[str]]:
    """The entries of `folder` that the rules leave; the others are added to `skipped`. The names in `kept` are no
    folders of thumbnails. Raises OSError if the folder cannot be read."""
    visible = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            reason = _unused(entry, kept)
            if reason:
                skipped.append(SkippedFile(folder / entry.name, reason))
            else:
                visible.append(entry)
    return visible


def is_folder(entry: os.DirEntry[str], follow: bool) -> bool:
    """False also for a link that leads nowhere or in a circle."""
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:
        return False


def is_unused(name: str) -> bool:
    """Whether a file or folder with this name is hidden or a leftover."""
    return name.startswith(".") or name.casefold() in LEFT_BEHIND


def unreadable(path: Path, error: OSError) -> SkippedFile:
    return SkippedFile(path, REMOVED if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})")


def has_suffix(name: str, suffixes: Collection[str]) -> bool:
    """Whether the name ends in one of `suffixes`, which are in lower case."""
    return suffix_of(name) in suffixes


def suffix_of(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def wrong_suffix(path: Path, noun: str) -> SkippedFile:
    suffix = suffix_of(path.name)
    return SkippedFile(path, f"{suffix} is not a suffix of {noun}s" if suffix else "name without a suffix")


def _entries_of(folder: Path, name: str, skipped: list[SkippedFile]) -> Iterator[tuple[str, os.DirEntry[str] | None]]:
    try:
        entries = visible_entries(folder / name, skipped)
    except OSError as error:
        skipped.append(unreadable(folder / name, error))
        return
    for entry in entries:
        yield f"{name}/{entry.name}" if name else entry.name, entry


def _version(entry: os.DirEntry[str], path: Path, skipped: list[SkippedFile]) -> FileVersion | None:
    """The version of a file. None if the entry is something else, or has been deleted."""
    try:
        if entry.is_file():
            return FileVersion.of(entry.stat())
        other = DANGLING if entry.is_symlink() and not path.exists() else NO_FILE
        skipped.append(SkippedFile(path, LINK if entry.is_dir() else other))
    except FileNotFoundError:  # deleted during the walk
        pass
    except OSError as error:
        skipped.append(unreadable(path, error))
    return None


def _unused(entry: os.DirEntry[str], kept: Collection[str]) -> str:
    """The reason why an entry is not used, by its name. "": it is used."""
    if entry.name.startswith("."):
        return HIDDEN
    if is_unused(entry.name):
        return LEFTOVER
    if entry.name.casefold() in THUMBNAIL_FOLDERS and entry.name not in kept and is_folder(entry, follow=True):
        return THUMBNAILS
    return ""


def _line(reason: str, group: list[SkippedFile], folder: Path) -> str:
    files = sum(each.files for each in group)
    if len(group) == 1 and files <= 1:
        return str(group[0])
    what = "files or folders" if group[0].is_leftover else "files" if files else "folders"
    counted = f"{files or len(group)} {what}: {shown(reason)}"
    named = [_example(each, folder) for each in group[:EXAMPLES] if each.path != folder]
    named += ["…"] if len(group) > EXAMPLES else []
    return f"{counted} ({', '.join(named)})" if named else counted


def _example(skipped: SkippedFile, folder: Path) -> str:
    path = skipped.path
    name = path.relative_to(folder) if path.is_relative_to(folder) else path
    return shown(f"{name} ({skipped.detail})" if skipped.detail else name)
