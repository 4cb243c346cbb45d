"""The process of the console: python -m trainer_server.console.process, started by `service.console_job`."""

from __future__ import annotations

import json
import logging
import os
import signal
import ssl
import sys
from contextlib import suppress
from pathlib import Path

from fedfmsl.common.token_file import stored_token
from fedfmsl.errors import FedFMSLError
from fedfmsl.transport.listening import listen, parse_listen
from fedfmsl.web.access import Access
from fedfmsl.web.serve import WebServer, page_context
from trainer_server.console.pages import console
from trainer_server.service.child_process import LISTENING
from trainer_server.service.console_job import ConsoleJob

FLAG = "--console"
NICE = 5  # the coordinator comes first


def serve(job: ConsoleJob) -> WebServer:
    """Serves until `close`. Raises ConfigError or RunError."""
    host, port = parse_listen(job.address)
    identity, revoked = (Path(path) if path else None for path in (job.identity, job.revoked))
    context = page_context(host, identity, revoked, ssl.CERT_OPTIONAL)  # operators have certificates
    token = stored_token(job.token_file) if job.token_file else None
    access = Access(host, port, token, encrypted=context is not None)
    return WebServer(console(Path(job.folder), access), listen(FLAG, host, port), context)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # for the server, whose end closes standard input
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(NICE)
    job = ConsoleJob(**json.loads(sys.stdin.readline()))
    try:
        server = serve(job)
    except FedFMSLError as error:
        print(" ".join(error.lines), flush=True)
        return 1
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)  # for the server's log
    print(LISTENING, flush=True)
    with server, suppress(OSError):
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
