"""Removes what a run has left on its broker: retained messages of server and devices, and their announcements."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from fedfmsl.errors import BrokerError, MessageError, RunError
from fedfmsl.protocol.messages import ServerStatus, encode, parse
from fedfmsl.protocol.topics import Topics, discovery_topic
from fedfmsl.transport.link import Disconnected, Link, LinkEvent, Received

PASSES = 10  # a broker may deliver only some of the messages at once, mosquitto 1,000 by default
ECHO_SECONDS = 20.0  # for the broker to return a message
QUIET_SECONDS = 0.5  # a broker may return it before the last retained messages
SERVER_SECONDS = 6.0  # for a server to come back whose connection this client has ended
BUSY_SECONDS = 60.0  # for one that is online to answer: one that closes a round of many updates does nothing else


def purge(
    link: Link,
    topics: Topics,
    home_assistant: str,
    echo_seconds: float = ECHO_SECONDS,
    server_seconds: float = SERVER_SECONDS,
    busy_seconds: float = BUSY_SECONDS,
) -> int:
    """Deletes the run's retained messages, on topics of the protocol only, and those that announce its devices below
    the prefix `home_assistant` ("": none). Returns their number. The broker has `echo_seconds` to deliver them.

    The broker may say that the server is online although both have lost power, or that it is offline: with one
    connection per identity it ends the server's connection for this client, if both have the server's identity. So a
    server that has been there has `server_seconds` to say that it is online, or `busy_seconds` if the broker says so.

    Raises BrokerError if the broker cannot be reached or does not allow it. Raises RunError if the run's server is
    online, or another process publishes the messages again.
    """
    # the server's status first, because a broker may deliver only the first messages
    filters = [topics.server_status, f"{topics.root}/#"]
    filters += [discovery_topic(home_assistant, topics.run, "+")] if home_assistant else []
    link.connect()
    removed: set[str] = set()
    try:
        for _ in range(PASSES):
            found, status = _retained(link, topics, filters, echo_seconds)
            if not found:
                return len(removed)
            if not removed and status is not None:
                _wait_for_server(link, topics, status, busy_seconds if status.online else server_seconds)
            for topic in found:
                link.publish(topic, b"", retain=True)
            removed |= found
    finally:
        link.close(link.publish(_echo_topic(topics, "end"), b""))  # delivered after all deletions
    raise RunError(
        f"{sorted(found)[0]} is published again after its removal; stop the process that does it, then repeat the "
        "command"
    )


def _echo_topic(topics: Topics, token: str) -> str:
    return f"{topics.root}/purge/{token}"


def _retained(
    link: Link, topics: Topics, filters: Sequence[str], echo_seconds: float
) -> tuple[set[str], ServerStatus | None]:
    """The topics with a retained message, and the server's status. Raises BrokerError as `purge` does."""
    for each in filters:
        link.subscribe(each)
    echo = _echo_topic(topics, secrets.token_hex(8))
    link.publish(echo, b"echo")
    found: set[str] = set()
    status: ServerStatus | None = None
    returned, deadline = False, time.monotonic() + echo_seconds
    while (event := _next_event(link, QUIET_SECONDS)) is not None or not returned:
        if time.monotonic() > deadline:
            break
        if event is None:  # a full queue of the broker drops the first one
            link.publish(echo, b"echo")
        if not isinstance(event, Received) or not event.payload:
            continue
        if event.topic == echo:
            returned = True
            continue
        if event.topic == topics.server_status:
            status = _server_status(event.payload)
        if topics.has(event.topic) or not event.topic.startswith(f"{topics.root}/"):
            found.add(event.topic)
    if not returned:
        raise BrokerError(
            f"the broker does not deliver {topics.root}/# to this client; use the operator's --identity or user, and a "
            "broker that allows wildcards"
        )
    for each in filters:
        link.unsubscribe(each)
    return found, status


def _wait_for_server(link: Link, topics: Topics, status: ServerStatus, seconds: float) -> None:
    """Raises RunError if the server is online, BrokerError if its connection ends this client's. A server answers the
    message that it is offline."""
    link.publish(topics.server_status, encode(status.model_copy(update={"online": False})), retain=True)
    link.subscribe(topics.server_status)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        event = _next_event(link, left)
        if isinstance(event, Received) and event.topic == topics.server_status:
            now = _server_status(event.payload)
            if now is not None and now.online:
                raise RunError(f"the server of run {topics.run!r} is online; stop it, then repeat the command")


def _next_event(link: Link, timeout: float) -> LinkEvent | None:
    event = link.next_event(timeout)
    if isinstance(event, Disconnected):
        raise BrokerError(
            f"the connection to the broker ended ({event.reason}); stop the run's server if it runs, then repeat the "
            "command"
        )
    return event


def _server_status(payload: bytes) -> ServerStatus | None:
    """None if it is not a server's."""
    try:
        return parse(ServerStatus, payload)
    except MessageError:
        return None
