"""The fields of log lines."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedfmsl.common.exit_codes import INTERRUPTED, TERMINATED
from fedfmsl.common.logs import BoundedLines, fields, set_up_logging, signals_logged


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


PROGRAM = r"""
import logging, sys
from pathlib import Path
from rich.table import Table
from fedfmsl.common.cli import application, console, notice, print_json
from fedfmsl.common.logs import set_up_logging
from fedfmsl.errors import ConfigError

TEXT = "gr\u00f6\u00dfe \u2603 \udcfc"  # the last one is of a file name that is not UTF-8
app = application()

@app.command()
def show(file: Path, form: str) -> None:
    set_up_logging(form, file)
    logging.getLogger("fedfmsl").warning("log %s", TEXT)
    table = Table("name", box=None)
    table.add_row(TEXT)
    console.print(table)
    print_json({"file": TEXT})
    notice(TEXT)
    raise ConfigError(f"{TEXT} is wrong")

app()
"""
ENVIRONMENTS = {
    "UTF-8": {"PYTHONUTF8": "1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
}


@pytest.mark.parametrize(("locale", "form"), [("UTF-8", "text"), ("C", "text"), ("ascii", "json")])
def test_no_text_is_lost_or_ends_a_process_in_any_locale(tmp_path: Path, locale: str, form: str) -> None:
    environment = {**os.environ, **ENVIRONMENTS[locale]}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "log"), form]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (2, False), done.stderr.decode()
    logged, *shown, printed = done.stdout.splitlines()
    assert b"log gr" in logged and b"udcfc" in logged
    assert b"udcfc" in b"".join(shown)
    assert json.loads(printed) == {"file": "größe \u2603 \udcfc"}
    notice, error = done.stderr.splitlines()
    assert b"udcfc" in notice and error.startswith(b"error: gr") and error.endswith(b"udcfc is wrong")
    if form == "json":
        assert json.loads(logged)["message"] == "log größe \u2603 \udcfc"
    assert "log größe" in (tmp_path / "log").read_text("utf-8") or form == "json"


@pytest.mark.parametrize("name", ["time", "level", "message"])
def test_a_field_cannot_replace_a_key_of_every_line(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: every log line has it; choose another name"):
        fields(**{name: 1})


def test_a_place_that_logs_too_often_is_cut_off_for_a_minute_and_says_so() -> None:
    now = [0.0]
    bounded = BoundedLines(lambda: now[0])

    def record(line: int, level: int = logging.WARNING) -> logging.LogRecord:
        return logging.LogRecord("fedfmsl", level, "module.py", line, "refused from %s", ("mallory",), None)

    first = [record(1) for _ in range(200)]
    assert [bounded.filter(each) for each in first].count(True) == 60
    assert bounded.filter(first[0])  # the second handler asks again
    assert "more such lines" in first[59].getMessage() and "mallory" in first[59].getMessage()
    assert bounded.filter(record(2))  # another place
    assert sum(bounded.filter(record(3, logging.INFO)) for _ in range(200)) == 200
    now[0] = 61.0
    assert bounded.filter(record(1))


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (KeyboardInterrupt(), INTERRUPTED, "stopped by Ctrl-C; the run goes on"),
        (SystemExit(TERMINATED), TERMINATED, "stopped by SIGTERM; the run goes on"),
        (SystemExit(0), 0, None),
    ],
)
def test_a_signal_that_ends_a_process_is_logged(
    caplog: pytest.LogCaptureFixture, end: BaseException, code: int, line: str | None
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(SystemExit) as ended, signals_logged(logging.getLogger("fedfmsl.test"), "the run goes on"):
        raise end
    assert ended.value.code == code
    assert caplog.messages == ([line] if line else [])
