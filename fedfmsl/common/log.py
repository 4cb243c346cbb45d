"""What a process that runs for months has to say: one line at a time, for people, for journald or for programs."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timezone
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Literal

from fedfmsl.errors import ConfigError

LogForm = Literal["text", "json"]
FILE_BYTES, FILES = 2 * 1024 * 1024, 2  # of a log file, and older ones beside it
_PRIORITIES = {logging.INFO: "<6>", logging.WARNING: "<4>", logging.ERROR: "<3>"}  # as journald reads them

log = logging.getLogger("fedfmsl")
log.setLevel(logging.INFO)


def fields(**values: Any) -> dict[str, Any]:
    """What a line is about, for programs: `log.info("round 3 done", **fields(round=3))`."""
    return {"extra": {"fields": values}}


def set_up_log(form: LogForm = "text", file: Path | None = None) -> None:
    """Raises ConfigError if the file cannot be written."""
    log.propagate = False
    log.handlers.clear()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    handlers[0].setFormatter(_Json() if form == "json" else _Journal() if "JOURNAL_STREAM" in os.environ else _TEXT)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=FILES, encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--log-file {file} cannot be written to ({error.strerror}); give another") from error
        handlers[1].setFormatter(_Json() if form == "json" else _DATED)
    for handler in handlers:
        log.addHandler(handler)
    logging.raiseExceptions = False  # a full disk must not end what logs to it, nor fill the journal


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": moment, "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps({**line, **getattr(record, "fields", {})}, ensure_ascii=False, default=str)


class _Journal(logging.Formatter):
    """journald has the time already, and takes the priority from the front of a line."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{_PRIORITIES.get(record.levelno, '<6>')}{record.getMessage()}"


_TEXT = logging.Formatter("%(message)s")
_DATED = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
