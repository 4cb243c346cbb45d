"""The fields of log lines."""

from __future__ import annotations

import json
import logging

import pytest

from fedfmsl.common.logs import fields, set_up_logging


def test_a_json_line_has_the_severity_and_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        set_up_logging("json")
        logging.getLogger("fedfmsl.test").info("round 3 closed", **fields(round=3, sal_level=1))
    finally:
        root.handlers, root.level = handlers, level
    line = json.loads(capsys.readouterr().out)
    assert (line["level"], line["message"], line["round"], line["sal_level"]) == ("info", "round 3 closed", 3, 1)


@pytest.mark.parametrize("name", ["time", "level", "message"])
def test_a_field_cannot_replace_a_key_of_every_line(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: every log line has it; choose another name"):
        fields(**{name: 1})
