"""Exit codes, and untrusted text in the output."""

from __future__ import annotations

import pytest

from fedfmsl.common.cli import console
from fedfmsl.errors import FedFMSLError


def test_untrusted_text_is_printed_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print("dropped [/x] [red]of[/red] :smile:")
    assert capsys.readouterr().out == "dropped [/x] [red]of[/red] :smile:\n"


def test_every_error_has_its_own_exit_code() -> None:
    kinds: list[type[FedFMSLError]] = [FedFMSLError, *FedFMSLError.__subclasses__()]
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
