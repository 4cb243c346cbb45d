"""A client that publishes any bytes on any topic of the broker."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from fedfmsl.transport.link import Link


def publish(url: str, messages: Iterable[tuple[str, bytes]], seconds: float = 60.0, retain: bool = False) -> bool:
    """Connects, publishes and disconnects. False if a message was not acknowledged within `seconds`: a broker closes
    the connection if a message is too large."""
    link = Link(url, f"hostile-{secrets.token_hex(4)}")
    link.connect()
    try:
        sent = [link.publish(topic, payload, retain) for topic, payload in messages]
        for message in sent:
            message.wait_for_publish(seconds)
        return all(message.is_published() for message in sent)
    finally:
        link.close()
