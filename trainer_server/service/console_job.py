"""Starts the console of a run in another process (`trainer_server.console.process`)."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from fedfmsl.transport.address import is_loopback, netloc
from fedfmsl.transport.listening import openable, parse_listen
from trainer_server.service.child_process import ChildProcess

logger = logging.getLogger(__name__)

TOKEN_FILE = "console.token"


@dataclass(frozen=True)
class ConsoleJob:
    """`address`: HOST:PORT. `folder`: of a run, or of several. `token`: the file with the token; None: on a loopback
    address there is none, on others it is TOKEN_FILE in the folder. `revoked`: the revocation list; None: the one
    beside `identity`, if it is there."""

    address: str
    folder: str
    identity: str | None = None
    revoked: str | None = None
    token: str | None = None

    @property
    def host(self) -> str:
        return parse_listen(self.address)[0]

    @property
    def token_file(self) -> Path | None:
        if self.token or is_loopback(self.host):
            return Path(self.token) if self.token else None
        return Path(self.folder) / TOKEN_FILE

    @property
    def where(self) -> str:
        """For the log: how a browser opens it."""
        host, port = parse_listen(self.address)
        is_plain = is_loopback(host) or self.identity is None
        certificate = "" if is_plain else " or an operator's certificate"
        token = f", with the token in {self.token_file}{certificate}" if self.token_file else ""
        return f"console at {'http' if is_plain else 'https'}://{netloc(openable(host))}:{port}/{token}"


def console_job(
    address: str, folder: Path, identity: Path | None, revoked: Path | None, token: Path | None
) -> ConsoleJob:
    files = (str(path.absolute()) if path else None for path in (identity, revoked, token))
    return ConsoleJob(address, str(folder.absolute()), *files)


def start_console(job: ConsoleJob) -> ChildProcess:
    """Raises RunError if it cannot be served."""
    started = ChildProcess("trainer_server.console.process", json.dumps(asdict(job)), "the console")
    logger.info("%s", job.where)
    return started
