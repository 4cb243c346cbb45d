"""Protects the devices of a run from a second run of the same name, which someone starts by mistake.

The broker keeps the status of a run's server. A device follows the newest status, so a second server would take the
devices over.
"""

from __future__ import annotations

import contextlib

from fedfmsl.errors import MessageError, RunError
from fedfmsl.protocol.messages import ServerStatus, parse
from fedfmsl.protocol.topics import ROOT, Topics
from fedfmsl.transport.link import Link
from trainer_server.service.retained import ANSWER_SECONDS, retained


def require_own_run(link: Link, topics: Topics, first_session: str, seconds: float = ANSWER_SECONDS) -> None:
    """Raises RunError if the broker has the status of another run with this name that has not ended. A run is known by
    its `first_session`. Raises BrokerError if the broker cannot be reached.

    `link` has no last will: on a broker with one connection per identity the other server would take it for the status
    of a newer server, and leave.
    """
    status = _kept_status(link, topics, seconds)
    if status is None or status.ended or status.first_session in (None, first_session):
        return
    # The connection of this look may itself have ended that of a running server with the same identity.
    server, stop = ("online", "stop that server") if status.online else ("offline", "stop that server if it runs")
    prefix = "" if topics.prefix == ROOT else f" --topic-prefix {topics.prefix}"
    raise RunError(
        f"run {topics.run!r} exists already, with another folder: its server is {server} and its devices wait for it; "
        "start this run with another --run, or go on with that folder. To give its devices to this run, "
        f"{stop}, then run python -m trainer_server purge --run {topics.run}{prefix} "
        "with the same --broker and --identity"
    )


def _kept_status(link: Link, topics: Topics, seconds: float) -> ServerStatus | None:
    """The retained status of the run's server, if there is one."""
    link.connect()
    try:
        for message in retained(link, topics, [topics.server_status], seconds):
            with contextlib.suppress(MessageError):  # not a server's
                return parse(ServerStatus, message.payload)
    finally:
        link.close(link.publish(topics.server_check, b"", retain=True))
    return None
