"""The updates that the server has not acknowledged, and the device's position in the run.

STATE/session         the session, and the last round of it whose update was acknowledged
STATE/outbox/ROUND    the unacknowledged update of a round
"""

from __future__ import annotations

import re
from pathlib import Path

from fedfmsl.common.files import write_atomically
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import Update
from fedfmsl.protocol.tensors import unpack


class Outbox:
    def __init__(self, state: Path) -> None:
        self._folder = state / "outbox"
        self._session = state / "session"

    @property
    def session(self) -> str:
        """The session that this device last worked in; "" before the first."""
        return self._position()[0]

    @property
    def acknowledged(self) -> int:
        """The last round of the session whose update was acknowledged, or 0."""
        return self._position()[1]

    def _position(self) -> tuple[str, int]:
        text = self._session.read_text("utf-8", errors="replace").strip() if self._session.is_file() else ""
        found = re.fullmatch(r"([0-9A-Za-z-]{1,64})(?: ([0-9]{1,10}))?", text)
        return (found[1], int(found[2] or 0)) if found else ("", 0)

    def enter(self, session: str) -> bool:
        """Starts a session and removes the updates of others. Returns whether it is a new one."""
        if session == self.session:
            return False
        write_atomically(self._session, session.encode(), durable=True)
        self.unacknowledged(session)
        return True

    def write(self, round_: int, update: bytes) -> None:
        write_atomically(self._folder / str(round_), update, durable=True)

    def read(self, round_: int) -> bytes | None:
        """The unacknowledged update of a round, if there is one."""
        path = self._folder / str(round_)
        return path.read_bytes() if path.is_file() else None

    def unacknowledged(self, session: str) -> frozenset[int]:
        """The rounds of a session with unacknowledged updates. Removes unreadable files and those of other sessions."""
        rounds = set()
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else []:
            try:
                update, _ = unpack(path.read_bytes(), Update)
            except MessageError:
                update = None
            if update is not None and update.session == session and path.name == str(update.round):
                rounds.add(update.round)
            else:
                path.unlink(missing_ok=True)
        return frozenset(rounds)

    def acknowledge(self, round_: int) -> None:
        """Removes the update of a round, and remembers that the round is done."""
        session, acknowledged = self._position()
        write_atomically(self._session, f"{session} {max(acknowledged, round_)}".encode(), durable=True)
        (self._folder / str(round_)).unlink(missing_ok=True)
