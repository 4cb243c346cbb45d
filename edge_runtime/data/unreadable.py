"""Sample files that cannot be read: whatever is wrong with one, it is one error with a reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedfmsl.common.sample_formats import unread_format
from fedfmsl.errors import InputError, one_line

MAX_FILE_BYTES = 2**28  # a larger file is not read


class UnreadableError(InputError):
    """`reason`: why a file is not readable, without its name. `lasting` is False if it may be read at another time."""

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


class UnreadableFileError(InputError):
    """The same with the name of the file in its text."""

    def __init__(self, text: str, lasting: bool) -> None:
        super().__init__(text)
        self.lasting = lasting


@contextmanager
def decoding() -> Iterator[None]:
    """Raises UnreadableError for anything that a decoder raises.

    Decoders have no common exception for damaged files: Pillow's raise nearly every kind, and a panic of the tokenizers
    package is not even an Exception.
    """
    try:
        yield
    except (UnreadableError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError as error:
        raise UnreadableError("there is not enough memory for it", lasting=False) from error
    except BaseException as error:
        raise UnreadableError(f"it is damaged ({one_line(error) or type(error).__name__})") from error


def check_name(name: str) -> None:
    """Raises UnreadableError for the name of a file in a format that is never read."""
    unread = unread_format(name)
    if unread:
        raise UnreadableError(f"{unread} is not read; convert it to JPEG or PNG")


def check_size(size: int) -> None:
    """Raises UnreadableError for a file of more than MAX_FILE_BYTES."""
    if size > MAX_FILE_BYTES:
        raise UnreadableError(f"it has more than {MAX_FILE_BYTES // 10**6} MB")


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises UnreadableError if it cannot be opened, or as the checks above do."""
    check_name(path.name)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            check_size(size)
            return file.read(size + 1)  # read() without a size could allocate any amount
    except OSError as error:
        raise UnreadableError(f"it cannot be opened ({error.strerror})", lasting=False) from error
