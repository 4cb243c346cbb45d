"""Messages that the server stores in one commit."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedfmsl.protocol.messages import DeviceStatus
from trainer_server.coordinator.events import Command, StatusSeen
from trainer_server.coordinator.state import State
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.update_files import Place

# By device: its latest status that changed the state. An offline status follows the latest online one, because only the
# instance in that one shows whether the offline status belongs to the same process. Before it comes an earlier one with
# fewer new samples: the device has used the others in between (`trainer_server.coordinator.standing`).
Statuses = dict[str, list[LoggedEvent]]


@dataclass
class Batch:
    """Events of messages that arrived together, and their commands. They take effect when the batch is on disk.

    `state` is the state after its events, `blobs` is where those of the accepted updates are, by SHA-256.
    `statuses` are kept in memory until the next commit: the broker retains them as well, and a device that
    reconnects repeatedly must not fill the event log.
    """

    state: State
    now: float
    statuses: Statuses
    updates: list[LoggedEvent] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    blobs: dict[str, Place] = field(default_factory=dict)

    def add_status(self, event: StatusSeen) -> None:
        status = event.status
        kept = [one for one in self.statuses.get(status.device, []) if _status(one).online]
        if status.online:
            kept = [one for one in kept if _status(one).new_samples < status.new_samples][:1]
        self.statuses[status.device] = [*kept, LoggedEvent(self.now, event)]

    @property
    def events(self) -> list[LoggedEvent]:
        return [*flatten(self.statuses), *self.updates]


def _status(logged: LoggedEvent) -> DeviceStatus:
    assert isinstance(logged.event, StatusSeen)
    return logged.event.status


def flatten(statuses: Statuses) -> list[LoggedEvent]:
    return [logged for of_device in statuses.values() for logged in of_device]
