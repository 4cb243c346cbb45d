"""The intervals of a daemon, in seconds. Tests pass shorter ones."""

from __future__ import annotations

from dataclasses import dataclass

from fedfmsl.common.backoff import Backoff
from fedfmsl.protocol.messages import HEALTH_SECONDS

DISK_RETRY = Backoff(first=1.0, longest=60.0)
ACK_TIMEOUT = Backoff(first=30.0, longest=300.0, jitter=0.5)


@dataclass(frozen=True)
class Timing:
    """`tick`: between two ticks of the loop. `sensors`: between two readings of the sensors. `resubscribe`: between two
    subscriptions while the server is offline. `disk_retry`: before each retry of a failed write, except the first.
    `scan`: between two scans of the sample folder. Scans take at most `scan_share` of the time. `ack`: until an
    unacknowledged update is sent again. `health`: between two health messages."""

    tick: float = 1.0
    sensors: float = 2.0
    resubscribe: float = 30.0
    disk_retry: Backoff = DISK_RETRY
    scan: float = 60.0
    scan_share: float = 0.01
    ack: Backoff = ACK_TIMEOUT
    health: float = HEALTH_SECONDS


DEFAULT_TIMING = Timing()
