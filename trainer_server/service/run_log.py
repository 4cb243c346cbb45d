"""Log lines about rounds, and the run's log file beside the server's standard output.

RUN/notes.log, notes.log.1      log lines with time, rotated at LOG_BYTES
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from fedfmsl.common.logs import BOUNDED, UNENCODABLE
from fedfmsl.protocol.messages import Round
from trainer_server.config import RunConfig
from trainer_server.coordinator.records import ClosedRound, listed, rare_devices

logger = logging.getLogger(__name__)

FILE = "notes.log"
PACKAGES = ("trainer_server", "fedfmsl")  # whose lines go to the file
PAUSED = "by the operator; resume it on the console (--console)"
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


def log_round(announced: Round, selected: int) -> None:
    """`selected`: the number of devices that it asks."""
    number, of = announced.ordinal
    where = f"{announced.stage.value} {number}/{of}"
    asked = f", selected devices: {selected}" if announced.selects else ""
    logger.info("round %d: %s, level %d%s", announced.round, where, announced.level, asked)


def log_operator_state(paused: bool, excluded: Collection[str]) -> None:
    """When a server starts: what the operator has done to the run before."""
    if paused:
        logger.warning("the run is paused %s", PAUSED)
    if excluded:
        logger.warning("excluded by the operator: %s; include them on the console", listed(sorted(excluded)))


def log_participation(config: RunConfig, known: Collection[str], counts: Mapping[str, int], rounds: int) -> None:
    """At the end of a run: which devices it has hardly learned from. `counts`: by device, of the training `rounds`."""
    rare = rare_devices(counts, rounds, known, config.fraction)
    if rare:
        names = listed([f"{name} in {count}" for name, count in rare.items()])
        logger.warning(
            "the model has learned little from %d of %d devices: of %d training rounds they took part: %s",
            *(len(rare), max(config.devices, len(known)), rounds, names),
        )
    if len(known) < config.devices:
        logger.warning("only %d of %d devices have joined the run", len(known), config.devices)


def log_stragglers(closed: ClosedRound) -> None:
    if closed.missing:
        logger.warning("round %d closed without %s", closed.round.round, listed(closed.missing))
