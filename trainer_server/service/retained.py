"""What the broker has retained of a run, read at the start of a server."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator, Sequence

from paho.mqtt.client import topic_matches_sub

from fedfmsl.errors import MessageError
from fedfmsl.protocol.chunks import CHUNK_BYTES, chunk_count
from fedfmsl.protocol.messages import Round, ServerStatus, parse
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 3.0  # for the broker to deliver what it keeps


def retained(link: Link, topics: Topics, filters: Sequence[str], seconds: float = ANSWER_SECONDS) -> Iterator[Received]:
    """The retained messages on topics of these filters, up to a message of this process that is delivered after them.
    Drops all other events of the link."""
    token = secrets.token_bytes(16)
    link.publish(topics.server_check, token, retain=True, qos=0)
    subscribed = [*filters, topics.server_check]
    for each in subscribed:
        link.subscribe(each)
    deadline = time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            event = link.next_event(left)
            if not isinstance(event, Received):
                continue
            if event.topic == topics.server_check and event.payload == token:
                return
            # amqtt also delivers what other clients have subscribed to
            if event.payload and any(topic_matches_sub(each, event.topic) for each in filters):
                yield event
        unknown = "what it keeps of an earlier run of this name is not known"
        logger.warning("the broker has not answered within %.0f s; %s", seconds, unknown)
    finally:
        for each in subscribed:
            link.unsubscribe(each)
        link.publish(topics.server_check, b"", retain=True, qos=0)


def remove_unneeded_globals(link: Link, topics: Topics, needed: frozenset[str], longest: int) -> None:
    """Deletes the globals of the last announced round and its task, but not the `needed` ones (SHA-256): those of an
    earlier run of this name, or of a server that was killed before it has deleted them. `longest`: bytes of a blob."""
    found: set[str] = set()
    size = CHUNK_BYTES
    for message in retained(link, topics, [topics.round, topics.server_status]):
        with contextlib.suppress(MessageError):  # not a server's
            if message.topic == topics.round:
                found |= parse(Round, message.payload).blobs
            else:
                status = parse(ServerStatus, message.payload)
                found, size = found | {status.task} - {""}, status.chunk_bytes
    for sha256 in sorted(found - needed):
        for index in range(chunk_count(longest, size)):
            link.publish(topics.globals_chunk(sha256, index), b"", retain=True)
