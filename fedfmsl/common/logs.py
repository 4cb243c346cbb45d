"""Logging of a long-running process: one line per event, as text, for journald, or as JSON.

Modules log with `logging.getLogger(__name__)`; `fields` adds values for programs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fedfmsl.common.exit_codes import INTERRUPTED, TERMINATED
from fedfmsl.common.settings import File, SettingsModel, panel
from fedfmsl.errors import ConfigError

LogFormat = Literal["text", "json"]
FILE_BYTES, OLD_FILES = 2 * 1024 * 1024, 2  # size of a log file; number of rotated files to keep
PACKAGES = ("fedfmsl", "edge_runtime", "trainer_server")  # whose INFO lines are logged; of others only warnings
LINES, WARNINGS = 6000, 60  # of one place in the source, in a minute
RESERVED = frozenset({"time", "level", "message"})  # keys of every JSON line
UNENCODABLE = "backslashreplace"  # of file names that are not UTF-8
_PRIORITIES = {logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}  # sd-daemon(3)


class LogSettings(SettingsModel):
    """Where a process logs to."""

    log: LogFormat = Field(
        "text", description="Log format. json: one object per line.", json_schema_extra=panel("Logs")
    )
    log_file: File | None = Field(
        None, description="Also log to this file, rotated at 2 MB.", json_schema_extra=panel("Logs")
    )


def fields(**values: Any) -> dict[str, Any]:
    """Values of a log line, for programs: `logger.info("round 3 closed", **fields(round=3))`.

    Raises ValueError for a name of RESERVED.
    """
    if RESERVED & values.keys():
        raise ValueError(f"{', '.join(sorted(RESERVED & values.keys()))}: every log line has it; choose another name")
    return {"extra": {"fields": values}}


@contextmanager
def signals_logged(logger: logging.Logger, then: str) -> Iterator[None]:
    """Logs that SIGINT or SIGTERM has ended this process (`fedfmsl.common.cli`). `then`: what the next start does."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        code = INTERRUPTED if isinstance(end, KeyboardInterrupt) else end.code
        if code in (INTERRUPTED, TERMINATED):
            logger.info(f"stopped by {'Ctrl-C' if code == INTERRUPTED else 'SIGTERM'}; {then}")
        sys.exit(code)


def set_up_logging(form: LogFormat = "text", file: Path | None = None) -> None:
    """Logs to stdout, and to `file`. Raises ConfigError if the file cannot be written."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    handlers[0].setFormatter(_Json() if form == "json" else _Journal() if "JOURNAL_STREAM" in os.environ else _TEXT)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(
                RotatingFileHandler(
                    file, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8", errors=UNENCODABLE
                )
            )
        except OSError as error:
            raise ConfigError(f"--log-file {file} cannot be written ({error.strerror}); choose another") from error
        handlers[1].setFormatter(_Json() if form == "json" else _DATED)
    for handler in handlers:
        handler.addFilter(BOUNDED)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk must not end the process, nor fill the journal


class BoundedLines(logging.Filter):
    """Drops lines of a place in the source that logs too often, so that no fault and no client fills a disk (ours)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._since = clock()
        self._counts: Counter[tuple[str, int]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Every handler asks about the same record, which keeps the first answer."""
        passes: bool | None = getattr(record, "passes", None)
        if passes is None:
            now = self._clock()
            if now >= self._since + 60:
                self._since = now
                self._counts.clear()
            place = (record.pathname, record.lineno)
            self._counts[place] += 1
            most = WARNINGS if record.levelno >= logging.WARNING else LINES
            record.passes = passes = self._counts[place] <= most
            if self._counts[place] == most:
                record.msg, record.args = f"{record.getMessage()} (more such lines are left out for a minute)", ()
        return passes


BOUNDED = BoundedLines()


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": moment, "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps({**line, **getattr(record, "fields", {})}, default=str)  # in ASCII, for any encoding


class _Journal(logging.Formatter):
    """journald adds the time, and takes the priority from the start of a line."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{_PRIORITIES.get(record.levelno, '<6>')}{record.getMessage()}"


_TEXT = logging.Formatter("%(message)s")
_DATED = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
