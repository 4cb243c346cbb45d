"""Log lines about rounds, and the run's log file beside the server's standard output.

RUN/notes.log, notes.log.1      log lines with time, rotated at LOG_BYTES
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from fedfmsl.common.logs import BOUNDED, UNENCODABLE
from fedfmsl.protocol.messages import Round
from trainer_server.coordinator.records import ClosedRound

logger = logging.getLogger(__name__)

FILE = "notes.log"
PACKAGES = ("trainer_server", "fedfmsl")  # whose lines go to the file
NAMES = 10  # devices named in a line
LOG_BYTES = 8 * 1024 * 1024  # of each of the two files


@contextmanager
def log_to_folder(folder: Path, max_bytes: int = LOG_BYTES) -> Iterator[None]:
    """Within this context log lines also go to the file in `folder`."""
    # delay: the file is opened at the first line, so a full disk does not prevent the start
    handler = RotatingFileHandler(
        folder / FILE, maxBytes=max_bytes, backupCount=1, encoding="utf-8", delay=True, errors=UNENCODABLE
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    handler.addFilter(BOUNDED)
    packages = [logging.getLogger(name) for name in PACKAGES]
    for package in packages:
        package.setLevel(logging.INFO)
        package.addHandler(handler)
    try:
        yield
    finally:
        for package in packages:
            package.removeHandler(handler)
        handler.close()


def log_round(announced: Round) -> None:
    where = f"{announced.stage.value} {announced.index + 1}/{announced.of}"
    selected = f", selected devices: {len(announced.chosen)}" if announced.chosen else ""
    logger.info("round %d: %s, level %d%s", announced.round, where, announced.level, selected)


def log_stragglers(closed: ClosedRound) -> None:
    if closed.missing:
        names, more = ", ".join(closed.missing[:NAMES]), len(closed.missing) - NAMES
        logger.warning(
            "round %d closed without %s", closed.round.round, f"{names} and {more} more" if more > 0 else names
        )
