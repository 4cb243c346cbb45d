"""Measures which messages a broker takes, by sending some there and back (ours).

Brokers drop a message that is too large, or that their access rules forbid, and acknowledge it all the same; others end
the connection. So only a message that comes back shows what the broker takes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from fedfmsl.errors import BrokerError
from fedfmsl.transport.link import Disconnected, Link, Received, SubscriptionRefused

ANSWER_SECONDS = 6.0  # for a message to come back
RESEND_SECONDS = 2.0  # amqtt can lose a message during a subscription


def largest_message(link: Link, topic: str, sizes: Sequence[int], seconds: float = ANSWER_SECONDS) -> int:
    """The first of `sizes` (bytes, largest first) of which the broker retains a message on `topic` and returns it.

    Drops all other events of the link. Raises BrokerError if it returns none.
    """
    live = False
    try:
        for size in sizes:
            payload = secrets.token_bytes(size)  # no one else's
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                # QoS 0: paho would repeat a message that ends the connection at every reconnection
                link.publish(topic, payload, retain=True, qos=0)
                link.subscribe(topic)
                outcome = _wait(link, topic, payload, RESEND_SECONDS)
                if outcome == "live":  # the subscription was faster than the message
                    live = True
                    link.subscribe(topic)
                    outcome = _wait(link, topic, payload, RESEND_SECONDS, again=True)
                if outcome == "retained":
                    return size
                if outcome == "ended":
                    break
    finally:
        link.unsubscribe(topic)
        link.publish(topic, b"", retain=True)
    if live:
        raise BrokerError("the broker keeps no retained messages, which a run needs; allow them in its configuration")
    raise BrokerError(
        f"the broker accepts this client but returns none of its messages on {topic}; check its access rules (may this "
        "client write and read that topic?) and its limits on the size of messages"
    )


def _wait(link: Link, topic: str, payload: bytes, seconds: float, again: bool = False) -> str:
    """What has become of a message: retained, live, ended (the connection), or lost. `again`: a live one has been
    received before."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        event = link.next_event(left)
        if isinstance(event, Received) and event.topic == topic and event.payload == payload:
            if event.retained:
                return "retained"
            if not again:
                return "live"
        elif isinstance(event, SubscriptionRefused):
            raise BrokerError(event.error)
        elif isinstance(event, Disconnected):
            return "ended"
    return "lost"
