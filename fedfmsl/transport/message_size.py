"""Measures which messages a broker takes, by sending some there and back (ours).

Brokers drop a message that is too large, or that their access rules forbid, and acknowledge it all the same; others end
the connection. So only a message that comes back shows what the broker takes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from fedfmsl.errors import BrokerError
from fedfmsl.transport.link import Connected, Disconnected, Link, Received, SubscriptionRefused

ANSWER_SECONDS = 6.0  # for a message to come back
RECONNECT_SECONDS = 10.0
RESEND_SECONDS = 2.0  # amqtt can lose a message during a subscription


def largest_message(link: Link, topic: str, sizes: Sequence[int], seconds: float = ANSWER_SECONDS) -> int:
    """The first of `sizes` (bytes, largest first) of which the broker retains a message on `topic` and returns it.

    Drops all other events of the link. Raises BrokerError if it returns none.
    """
    try:
        if _sent_and_returned(link, topic, sizes[0], seconds) == "retained":
            return sizes[0]
        # next the smallest, so that a broker that returns nothing costs little time
        outcome = _sent_and_returned(link, topic, sizes[-1], seconds)
        if outcome == "retained":
            between = sizes[1:-1]
            return next((n for n in between if _sent_and_returned(link, topic, n, seconds) == outcome), sizes[-1])
        if outcome == "ended":
            outcome = _sent_and_returned(link, topic, sizes[-1], seconds, retain=False)
    finally:
        link.unsubscribe(topic)
        link.publish(topic, b"", retain=True, qos=0)
    if outcome == "live":
        raise BrokerError("the broker keeps no retained messages, which a run needs; allow them in its configuration")
    raise BrokerError(
        f"the broker accepts this client but returns none of its messages on {topic}; check its access rules (may this "
        "client write and read that topic?) and its limits on the size of messages"
    )


def _sent_and_returned(link: Link, topic: str, size: int, seconds: float, retain: bool = True) -> str:
    """What becomes of a message of `size` bytes within `seconds`: retained, live, ended (the connection), or lost."""
    payload = secrets.token_bytes(size)  # no one else's
    deadline, live = time.monotonic() + seconds, False
    while time.monotonic() < deadline:
        # QoS 0: paho would repeat a message that ends the connection at every reconnection
        if retain:
            link.publish(topic, payload, retain=True, qos=0)
            link.subscribe(topic)
        else:
            link.subscribe(topic)
            link.publish(topic, payload, qos=0)
        outcome = _wait(link, topic, payload, RESEND_SECONDS)
        if outcome == "live" and retain:  # the subscription was faster than the message
            live = True
            link.subscribe(topic)
            outcome = _wait(link, topic, payload, RESEND_SECONDS, again=True)
        if outcome == "ended":
            _wait_for_connection(link)
        if outcome != "lost":
            return outcome
    return "live" if live else "lost"


def _wait_for_connection(link: Link) -> None:
    deadline = time.monotonic() + RECONNECT_SECONDS
    while (left := deadline - time.monotonic()) > 0 and not isinstance(link.next_event(left), Connected):
        pass


def _wait(link: Link, topic: str, payload: bytes, seconds: float, again: bool = False) -> str:
    """What has become of a message, as above. `again`: a live one has been received before."""
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
