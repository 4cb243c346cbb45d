"""A stranger on the broker, who may say whatever it likes wherever it likes."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from fedfmsl.transport.link import Link


def publish(url: str, messages: Iterable[tuple[str, bytes]], seconds: float = 10.0, retain: bool = False) -> bool:
    """Connects, publishes, leaves. False if the broker did not take every message within `seconds` each: it closes the
    connection on what it finds too long."""
    link = Link(url, f"stranger-{secrets.token_hex(4)}")
    link.connect()
    try:
        taken = [link.publish(topic, payload, retain) for topic, payload in messages]
        for message in taken:
            message.wait_for_publish(seconds)
        return all(message.is_published() for message in taken)
    finally:
        link.close()
