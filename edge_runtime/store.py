"""What a device keeps on its disk, so that a restart is the same device with the same local expert.

STATE/identity           the device's name, made once
STATE/globals/SHA256     global blobs it has received
STATE/outbox/ROUND       updates the server has not acknowledged yet
STATE/personal           the local expert (never leaves the device)
STATE/residual           what encoding has lost of the last update
STATE/baseline           the expert trained alone, where a run asks for it
STATE/cache/             the feature cache
STATE/results.json       the last evaluation
STATE/mixture            what the personalized model is made of
STATE/personalized.onnx  the personalized model
STATE/plan.json          what fits into its memory, as measured
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from protocol.errors import ConfigError, MessageError
from protocol.messages import Update
from protocol.tensors import blob_hash, unpack
from protocol.topics import check_name
from shell.files import write_atomically


class DeviceStore:
    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def personal(self) -> Path:
        return self.root / "personal"

    @property
    def residual(self) -> Path:
        return self.root / "residual"

    @property
    def baseline(self) -> Path:
        return self.root / "baseline"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def mixture(self) -> Path:
        return self.root / "mixture"

    @property
    def personalized(self) -> Path:
        return self.root / "personalized.onnx"

    def identity(self, wanted: str | None) -> str:
        """This device's name: made at the first start (`wanted`, or from the host's name), kept for ever after.

        Raises ConfigError if the state folder belongs to another device than `wanted`.
        """
        path = self.root / "identity"
        if path.is_file():
            try:
                name = check_name("device", path.read_text().strip())
            except (UnicodeDecodeError, ConfigError) as error:
                raise ConfigError(f"{path} holds no device's name; restore it, or use another folder") from error
            if wanted and wanted != name:
                raise ConfigError(f"--state {self.root} belongs to device {name!r}, not {wanted!r}; use another folder")
            return name
        host = "".join(c for c in socket.gethostname() if c.isalnum() or c in "-_") or "device"
        name = check_name("device", wanted or f"{host[:40]}-{secrets.token_hex(4)}")
        write_atomically(path, name.encode(), durable=True)
        return name

    @property
    def session(self) -> str:
        """The session of a run this device last worked in."""
        path = self.root / "session"
        return path.read_text().strip() if path.is_file() else ""

    def enter(self, session: str) -> None:
        if session != self.session:
            write_atomically(self.root / "session", session.encode(), durable=True)

    def global_blob(self, sha256: str) -> bytes | None:
        """A received blob, if it is here and whole."""
        path = self.root / "globals" / sha256
        if not path.is_file():
            return None
        blob = path.read_bytes()
        return blob if blob_hash(blob) == sha256 else None

    def keep_global(self, blob: bytes) -> None:
        write_atomically(self.root / "globals" / blob_hash(blob), blob)

    def drop_globals(self, keep: set[str]) -> None:
        folder = self.root / "globals"
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name not in keep:
                    path.unlink(missing_ok=True)

    def put_outbox(self, round_: int, blob: bytes) -> None:
        write_atomically(self.root / "outbox" / str(round_), blob, durable=True)

    def outbox(self, session: str) -> dict[int, bytes]:
        """Unacknowledged updates of a session by round; those of other sessions are removed."""
        found = {}
        folder = self.root / "outbox"
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            blob = path.read_bytes()
            try:
                update, _ = unpack(blob, Update)
            except MessageError:
                update = None
            if update is not None and update.session == session:
                found[update.round] = blob
            else:
                path.unlink(missing_ok=True)
        return found

    def drop_outbox(self, round_: int) -> None:
        (self.root / "outbox" / str(round_)).unlink(missing_ok=True)
