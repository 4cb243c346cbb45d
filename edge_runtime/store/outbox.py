"""The updates that the server has not acknowledged, and the device's position in the run.

STATE/session         the session, the last round of it whose update was acknowledged, and its run
STATE/outbox/ROUND    the unacknowledged update of a round, of the latest UNACKNOWLEDGED rounds
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from fedfmsl.common.files import write_atomically
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import Update
from fedfmsl.protocol.tensors import unpack

# A server that acknowledges no update, as one that the broker's rules keep from it, must not fill the disk.
UNACKNOWLEDGED = 32


class _Position(NamedTuple):
    session: str = ""
    acknowledged: int = 0
    run: str = ""


class Outbox:
    def __init__(self, state: Path) -> None:
        self.folder = state / "outbox"
        self._session = state / "session"

    @property
    def session(self) -> str:
        """The session that this device last worked in; "" before the first."""
        return self._position().session

    @property
    def acknowledged(self) -> int:
        """The last round of the session whose update was acknowledged, or 0."""
        return self._position().acknowledged

    @property
    def run(self) -> str:
        """The run of the session."""
        return self._position().run

    def _position(self) -> _Position:
        text = self._session.read_text("utf-8", errors="replace").strip() if self._session.is_file() else ""
        found = re.fullmatch(r"([0-9A-Za-z-]{1,64})(?: ([0-9]{1,10}))?(?: (\S{1,64}))?", text)
        return _Position(found[1], int(found[2] or 0), found[3] or "") if found else _Position()

    def _store(self, position: _Position) -> None:
        write_atomically(self._session, " ".join(map(str, position)).encode(), durable=True)

    def enter(self, session: str, run: str) -> bool:
        """Starts a session and removes the updates of others. Returns whether it is a new one."""
        if session == self.session:
            return False
        self._store(_Position(session, 0, run))
        self.unacknowledged(session)
        return True

    def write(self, round_: int, update: bytes) -> None:
        """Removes the updates of all but the latest UNACKNOWLEDGED rounds."""
        write_atomically(self.folder / str(round_), update, durable=True)
        rounds = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())
        for earlier in rounds[:-UNACKNOWLEDGED]:
            (self.folder / str(earlier)).unlink(missing_ok=True)

    def read(self, round_: int) -> bytes | None:
        """The unacknowledged update of a round, if there is one."""
        path = self.folder / str(round_)
        return path.read_bytes() if path.is_file() else None

    def unacknowledged(self, session: str) -> frozenset[int]:
        """The rounds of a session with unacknowledged updates. Removes unreadable files and those of other sessions."""
        rounds = set()
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
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
        before = self._position()
        self._store(before._replace(acknowledged=max(before.acknowledged, round_)))
        (self.folder / str(round_)).unlink(missing_ok=True)
