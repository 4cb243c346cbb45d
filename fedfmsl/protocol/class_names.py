"""Names of classes: which are valid, and how lists of them are read (ours).

Spaces belong to a name. Names are in Unicode's normal form NFC, so that a folder copied from macOS has the same name.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fedfmsl.errors import ConfigError, InputError, one_line

UNKNOWN = "unknown"  # the answer when the confidence is below the threshold
MAX_BYTES = 255  # of a folder name
MAX_CLASSES = 4096  # messages have a number for each class
LISTED = 5  # names in a list for people
SHOWN = 60  # characters of a name in an error
BREAKS = ("Cc", "Zl", "Zp")  # Unicode categories: control characters, line and paragraph separators
# Unicode's bidirectional types of embeddings, overrides and isolates: a log line or a table would not be as it reads
TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def check_names(names: Sequence[str], source: str) -> tuple[str, ...]:
    """The names in NFC. `source`: where they are from, for errors.

    Raises ConfigError if there are fewer than two or more than MAX_CLASSES, two are equal, or one is not valid.
    """
    if len(names) > MAX_CLASSES:
        raise ConfigError(f"{source}: {len(names)} classes are more than {MAX_CLASSES}; name fewer")
    normal = tuple(map(normal_form, names))
    for name in normal:
        if problem := fault(name):
            raise ConfigError(f"{source}: class {_quoted(name)} {problem}")
    if len({*normal}) < len(normal):
        repeated = next(name for index, name in enumerate(normal) if name in normal[:index])
        raise ConfigError(f"{source}: class {_quoted(repeated)} is named twice; name each class once")
    if len(normal) < 2:
        raise ConfigError(f"{source} needs at least two classes, got {len(normal)}; name more of them")
    return normal


def normal_form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def fault(name: str) -> str:
    """What is wrong with a name, and the remedy. "": it is valid."""
    if not name.strip():
        return "has no letters; give it a name"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "is not UTF-8; rename it"
    if size > MAX_BYTES:
        return f"has {size} bytes; use at most {MAX_BYTES}"
    if any(unicodedata.category(character) in BREAKS for character in name):
        return "has a control character; rename it"
    if any(unicodedata.bidirectional(character) in TURNS for character in name):
        return "has a character that turns the direction of the text around it; rename it"
    if ".." in name.split("/"):
        return "has the path .. in it; rename it"
    if name.casefold() == UNKNOWN:
        return f"has the name that predictions use for samples of no class; rename it, like {name}-class"
    return ""


def valid_name(name: str) -> str:
    """The name as it is if it can be one of a class or UNKNOWN, otherwise as a text for people."""
    return name if name == UNKNOWN or not fault(name) else one_line(name)


def proposable(name: str) -> str:
    """The name as it is. Raises ValueError if it is not valid or not in NFC."""
    problem = fault(name) or ("" if unicodedata.is_normalized("NFC", name) else "is not in Unicode's normal form NFC")
    if problem:
        raise ValueError(f"class {one_line(repr(name))} {problem}")
    return name


def split_names(text: str) -> list[str]:
    """The names in one line of CSV: separated by commas, with quotes around a name that has a comma or outer spaces.

    Raises ConfigError if a quote is not closed.
    """
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{_quoted(text)} is not a list of names ({error}); write it like apple,pear") from error
    return rows[0] if rows else []


def describe_classes(names: Sequence[str]) -> str:
    """A list of names for people, shortened."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} classes: {', '.join(_quoted(name) for name in names[:LISTED])}{more}"


def joined_names(names: Sequence[str]) -> str:
    """The line that `split_names` reads as these names."""
    return ",".join(_field(name) for name in names)


def read_names(path: Path, noun: str) -> list[str]:
    """The names in a text file, one per line. `noun`: the flag that names the file.

    Raises InputError if the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{noun} {path} cannot be read ({reason}); pass a UTF-8 text, one name per line") from error
    return [name for name in text.split("\n") if name]


def write_names(path: Path, names: Sequence[str]) -> None:
    """Writes a file for `read_names`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{name}\n" for name in names).encode())


def _field(name: str) -> str:
    needs_quotes = name != name.strip() or any(character in name for character in ',"\n')
    return '"' + name.replace('"', '""') + '"' if needs_quotes else name


def _quoted(name: str) -> str:
    return repr(name if len(name) <= SHOWN else f"{name[:SHOWN]}…")
