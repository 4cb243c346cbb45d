"""One way to end: a command either succeeds, or says in a line what is wrong and exits with the error's code."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from fedfmsl.common.files import FULL
from fedfmsl.errors import ConfigError, FedFMSLError

# A log line stays one line, however narrow the terminal; what a stranger has put into it is not read as rich's markup.
console = Console(soft_wrap=True, markup=False, emoji=False)


def notice(text: str) -> None:
    """A line for people, beside an output that may be for programs."""
    print(text, file=sys.stderr, flush=True)


class _Application(typer.Typer):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().__call__(*args, **kwargs)
        except FedFMSLError as error:
            for line in error.lines:
                print(f"error: {line}", file=sys.stderr)
            sys.exit(error.exit_code)
        except OSError as error:
            if error.errno not in FULL:
                raise
            print(f"error: no room on the disk ({error}); free some and start again", file=sys.stderr)
            sys.exit(os.EX_IOERR)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Being told to end is an exit like any other: what was opened is closed, what was started is ended."""
    sys.exit(128 + number)


def application(help_text: str) -> typer.Typer:
    """A typer application whose FedFMSLErrors end in one line on stderr and their exit code."""
    return _Application(help=help_text, add_completion=False, pretty_exceptions_enable=False)


def byte_size(option: str, text: str | None) -> int | None:
    """Bytes that a size such as 512MB or 2GiB means. Raises ConfigError, naming the option, if it means none."""
    if text is None:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise ConfigError(f"{option} {text!r} is not a size; write it like 512MB or 2GB") from error
