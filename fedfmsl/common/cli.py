"""Commands: typer applications that end with one line per error and the error's exit code.

`console` prints with rich, which is imported when `console` is: daemon and server start without it.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from fedfmsl.common.exit_codes import DISK, INTERRUPTED
from fedfmsl.common.files import FAILING, FULL
from fedfmsl.errors import FedFMSLError, InputError, no_permission

if TYPE_CHECKING:
    from rich.console import Console

    console: Console


def __getattr__(name: str) -> Any:
    if name != "console":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rich.console import Console

    # No wrapping at the terminal's width. No markup, because the text may come from other machines.
    globals()[name] = Console(soft_wrap=True, markup=False, emoji=False)
    return globals()[name]


def notice(text: str) -> None:
    """Prints a line to stderr: stdout may be read by a program."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Prints one line of JSON in ASCII: escapes of another kind, for a terminal without UTF-8, would not be JSON."""
    print(json.dumps(value), flush=True)


def show_unencodable() -> None:
    """From now on both output streams escape what their encoding lacks: ☃ without UTF-8, or a file name that is not
    UTF-8. By default printing it is an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Application(typer.Typer):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        show_unencodable()
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().__call__(*args, **kwargs)
        except FedFMSLError as error:
            for line in error.lines:
                print(f"error: {line}", file=sys.stderr)
            sys.exit(error.exit_code)
        except PermissionError as error:
            if error.filename is None:
                raise
            print(f"error: {no_permission(error.filename, 'use')}", file=sys.stderr)
            sys.exit(InputError.exit_code)
        except OSError as error:
            if error.errno not in FULL | FAILING:
                raise
            full = "the disk is full", "free some space"
            what, remedy = full if error.errno in FULL else ("the disk fails", "check it, its cable and its mount")
            print(f"error: {what} ({error}); {remedy}, and start again", file=sys.stderr)
            sys.exit(DISK)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Exits through `finally` blocks, so that files are closed and child processes end. A second signal would interrupt
    them: `timeout` sends it to the process, and to its group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def application(help_text: str = "", **options: Any) -> typer.Typer:
    """A typer application. A FedFMSLError ends it with one line per error on stderr and the error's exit code.

    `help_text` describes a group of commands. The help of an application with one command is the command's docstring.
    """
    return _Application(help=help_text, pretty_exceptions_enable=False, **{"add_completion": False, **options})
