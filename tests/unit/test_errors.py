"""Exit codes, and untrusted text in the output."""

from __future__ import annotations

import errno
import os

import pytest

from fedfmsl.common.cli import application, console
from fedfmsl.common.exit_codes import DISK
from fedfmsl.errors import FedFMSLError, InputError


def test_untrusted_text_is_printed_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print("dropped [/x] [red]of[/red] :smile:")
    assert capsys.readouterr().out == "dropped [/x] [red]of[/red] :smile:\n"


def test_every_error_has_its_own_exit_code() -> None:
    kinds: list[type[FedFMSLError]] = [FedFMSLError, *FedFMSLError.__subclasses__()]
    assert len({kind.exit_code for kind in kinds}) == len(kinds)


def test_a_file_of_another_user_ends_a_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    app = application()

    @app.command()
    def read() -> None:
        raise PermissionError(13, "Permission denied", "photos/labels.csv")

    with pytest.raises(SystemExit) as ended:
        app([])
    assert ended.value.code == InputError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: photos/labels.csv: no permission to use it as user ")


@pytest.mark.parametrize(("number", "what"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "the disk fails")])
def test_a_disk_that_is_full_or_fails_ends_a_command_with_one_line(
    capsys: pytest.CaptureFixture[str], number: int, what: str
) -> None:
    app = application()

    @app.command()
    def read() -> None:
        raise OSError(number, os.strerror(number), "state/session")

    with pytest.raises(SystemExit) as ended:
        app([])
    assert ended.value.code == DISK
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {what} (") and "state/session" in line
