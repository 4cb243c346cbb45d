"""The run's log file, beside the server's standard output.

RUN/notes.log, notes.log.1      log lines with time; the file is rotated, so both together have a limit
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

FILE = "notes.log"
LOG_BYTES = 8 * 1024 * 1024  # of each of the two files


@contextmanager
def log_to_folder(folder: Path, max_bytes: int = LOG_BYTES) -> Iterator[None]:
    """Log lines also go to the file in `folder` while this lasts."""
    # delay: a full disk at the start is not an error, the file is opened with the first line that can be written
    handler = RotatingFileHandler(folder / FILE, maxBytes=max_bytes, backupCount=1, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    logger = logging.getLogger("trainer_server")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
