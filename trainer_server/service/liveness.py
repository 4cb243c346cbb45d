"""Which devices are alive, by what the server hears from them (ours).

A retained status is no sign of life: if a device and the broker lose power together, the broker never publishes the
last will, and the retained status stays `online`. So a device counts as online only once a message of it arrives live.
Devices publish their status again when a server comes online, and a heartbeat every minute. Only the time during which
the server is connected and looks at its messages counts, and a new connection does not start it anew: otherwise a
server whose connection is lost every minute would count every dead device as alive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedfmsl.protocol.messages import MAX_HEARTBEAT_AGE, DeviceStatus
from trainer_server.coordinator.events import StatusSeen

ANSWER_SECONDS = 90.0  # for the answer to this server's status; a device may have to reconnect first
LOOK_SECONDS = 1.0  # between two looks for lost devices, of which there may be ten thousands
BUSY_SECONDS = 10.0  # between two looks at the messages, above which this server was busy
SILENT = "no heartbeat; is it running?"


class Liveness:
    def __init__(self, devices: int, silence: float = MAX_HEARTBEAT_AGE, answer: float = ANSWER_SECONDS) -> None:
        """`devices`: how many are remembered at most. A device is lost `silence` seconds after its last message, or if
        it does not answer this server's status within `answer` seconds."""
        self._devices = devices
        self._silence = silence
        self._answer = answer
        self._due: dict[str, float] = {}  # by device: when it is lost, in seconds of listening
        self._statuses: dict[str, DeviceStatus] = {}  # by device: its latest status
        self._at_work: dict[str, float] = {}  # by device: until when its last sign of work counts
        self._deaf = 0.0  # seconds without a connection, or without a look at the messages
        self._since = math.inf  # when the connection was lost
        self._looked = math.inf  # when `lost` was called last
        self._next_look = self._next_forget = 0.0

    def connected(self, online: Iterable[str], now: float) -> None:
        """This server has connected and publishes its status, which the `online` devices answer."""
        self._deaf += max(now - self._since, 0.0)
        self._since, self._looked = math.inf, now
        due = self._heard(now) + self._answer
        self._due |= {device: min(self._due.get(device, due), due) for device in online}
        self._next_look = 0.0

    def disconnected(self, now: float) -> None:
        """This server has lost its connection, so it hears from no device, and loses none."""
        self._since = min(self._since, now)

    def status(self, status: DeviceStatus, retained: bool, now: float) -> StatusSeen | None:
        """The event of a received status; None if it does not show that its device is alive."""
        device, heard = status.device, self._heard(now)
        if device not in self._statuses and len(self._statuses) >= self._devices:
            self._forget_silent(now)
        if device in self._statuses or len(self._statuses) < self._devices:
            self._statuses[device] = status
            self._due.setdefault(device, heard + self._answer)
        if retained and status.online:
            return None
        if device in self._due:
            self._due[device] = heard + self._silence
        return StatusSeen(status)

    def message(self, device: str, online: bool, now: float) -> StatusSeen | None:
        """Any other live message of a device. An event if the device was not `online` until now."""
        status = self._statuses.get(device)
        if online or status is not None:
            self._due[device] = self._heard(now) + self._silence
        return StatusSeen(status) if status is not None and status.online and not online else None

    def work(self, device: str, at_work: bool, now: float) -> None:
        """A live heartbeat says whether the device is at work; so does a chunk of its update."""
        if at_work:
            self._at_work[device] = now + self._silence
        else:
            self._at_work.pop(device, None)

    def working(self, now: float) -> frozenset[str]:
        """The devices that are at work, as far as their latest heartbeats say."""
        return frozenset(device for device, until in self._at_work.items() if now < until)

    def lost(self, online: Iterable[DeviceStatus], now: float) -> list[StatusSeen]:
        """The events of `online` devices that have become silent."""
        if now - self._looked > BUSY_SECONDS and self._since > now:  # their messages may still wait
            self._deaf += now - self._looked
        self._looked = now
        if now < self._next_look:
            return []
        heard, first = self._heard(now), math.inf
        silent: list[StatusSeen] = []
        for status in online:
            due = self._due.setdefault(status.device, heard + self._silence)
            if heard < due:
                first = min(first, due)
            else:
                silent.append(StatusSeen(status.model_copy(update={"online": False, "error": SILENT})))
        # none is lost before: what a device sends only defers it, and one that comes online has all of `silence`
        self._next_look = now + max(min(first - heard, self._silence), LOOK_SECONDS)
        return silent

    def _forget_silent(self, now: float) -> None:
        """Makes space for other names: devices are replaced over the years."""
        if now < self._next_forget:
            return
        self._next_forget, heard = now + LOOK_SECONDS, self._heard(now)
        for device in [device for device, due in self._due.items() if due < heard]:
            del self._due[device]
            self._statuses.pop(device, None)
            self._at_work.pop(device, None)

    def _heard(self, now: float) -> float:
        """The seconds of listening until now."""
        return min(now, self._since) - self._deaf
