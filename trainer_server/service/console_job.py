"""Starts the console of a run in another process (`trainer_server.console.process`)."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from fedfmsl.transport.address import is_loopback
from trainer_server.service.child_process import ChildProcess

logger = logging.getLogger(__name__)

TOKEN_FILE = "console.token"


@dataclass(frozen=True)
class ConsoleJob:
    """`address`: HOST:PORT. `folder`: of a run, or of several. `token`: the file with the token; None: on a loopback
    address there is none, on others it is TOKEN_FILE in the folder."""

    address: str
    folder: str
    identity: str | None = None
    insecure: bool = False
    token: str | None = None

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def token_file(self) -> Path | None:
        if self.token or is_loopback(self.host):
            return Path(self.token) if self.token else None
        return Path(self.folder) / TOKEN_FILE

    @property
    def where(self) -> str:
        """For the log: how a browser opens it."""
        is_plain = is_loopback(self.host) or self.identity is None
        token = f", with the token in {self.token_file}" if self.token_file else ""
        return f"console at {'http' if is_plain else 'https'}://{self.address}/{token}"


def console_job(address: str, folder: Path, identity: Path | None, insecure: bool, token: Path | None) -> ConsoleJob:
    return ConsoleJob(
        address,
        str(folder.absolute()),
        str(identity.absolute()) if identity else None,
        insecure,
        str(token.absolute()) if token else None,
    )


def start_console(job: ConsoleJob) -> ChildProcess:
    """Raises RunError if it cannot be served."""
    started = ChildProcess("trainer_server.console.process", json.dumps(asdict(job)), "the console", "{}")
    logger.info("%s", job.where)
    return started
