"""What a device keeps on its disk, so that a restart is the same device with the same local expert.

STATE/identity           the device's name, made once
STATE/session            the session it last worked in, and the last round of it whose update was acknowledged
STATE/globals/SHA256     global blobs it has received
STATE/bundles/SHA256/    bundles it has fetched
STATE/outbox/ROUND       updates the server has not acknowledged yet
STATE/personal           the local expert (never leaves the device)
STATE/residual           what encoding has lost of the last update
STATE/baseline           the expert trained alone, where a run asks for it
STATE/cache/             the feature cache
STATE/results.json       the last evaluation
STATE/mixture            the personalized model of the last round: what is its own of it
STATE/personalized.onnx  the personalized model as one file, as it was evaluated
STATE/lock               held by the process that works on this folder
STATE/plan.json          what fits into its memory, as measured
STATE/health.json        how it is, as it last said
STATE/skipped.txt      the files of its folder that it does not use, and why
STATE/samples.sqlite     what it has read of its samples, and which slice each is of (see edge_runtime.data.ledger)
"""

from __future__ import annotations

import re
import secrets
import socket
import tempfile
from pathlib import Path

from fedfmsl.common.files import FULL, write_atomically
from fedfmsl.errors import ConfigError, MessageError
from fedfmsl.protocol.messages import Update
from fedfmsl.protocol.tensors import blob_hash, unpack
from fedfmsl.protocol.topics import check_name


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
    def samples(self) -> Path:
        return self.root / "samples.sqlite"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def mixture(self) -> Path:
        return self.root / "mixture"

    @property
    def personalized(self) -> Path:
        return self.root / "personalized.onnx"

    @property
    def health(self) -> Path:
        return self.root / "health.json"

    @property
    def bundles(self) -> Path:
        """What has been fetched, each in a folder named by its SHA-256."""
        return self.root / "bundles"

    @property
    def skipped(self) -> Path:
        return self.root / "skipped.txt"

    @property
    def is_model_newer(self) -> bool:
        """Than the file that was made of it."""
        made = self.personalized.stat().st_mtime if self.personalized.is_file() else 0.0
        return self.mixture.is_file() and self.mixture.stat().st_mtime > made

    def identity(self, wanted: str | None) -> str:
        """This device's name: made at the first start (`wanted`, or from the host's name), kept for ever after.

        Raises ConfigError if the state folder belongs to another device than `wanted`, or cannot be written to.
        """
        path = self.root / "identity"
        name = check_name("device", wanted) if wanted else ""
        self._check_writable()
        if path.is_file():
            try:
                name = check_name("device", path.read_text().strip())
            except (UnicodeDecodeError, ConfigError) as error:
                raise ConfigError(f"{path} holds no device's name; restore it, or use another folder") from error
            if wanted and wanted != name:
                raise ConfigError(f"--state {self.root} belongs to device {name!r}, not {wanted!r}; use another folder")
            return name
        host = "".join(c for c in socket.gethostname() if c.isalnum() or c in "-_") or "device"
        name = wanted or check_name("device", f"{host[:40]}-{secrets.token_hex(4)}")
        write_atomically(path, name.encode(), durable=True)
        return name

    def _check_writable(self) -> None:
        """A full disk is no reason: it is waited for."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            if error.errno not in FULL:
                raise ConfigError(
                    f"--state {self.root} cannot be written to ({error.strerror}); give a folder that this user may "
                    "write to, on a disk that is not read-only"
                ) from error

    def remove_temporary_files(self) -> None:
        """What a process left behind that was ended while it wrote. To be called before anything is written."""
        files = [self.personal, self.baseline, self.residual, self.results, self.mixture, self.personalized]
        files += [self.health, self.skipped]
        scraps = [scrap for folder in ("globals", "outbox") for scrap in (self.root / folder).glob(".*")]
        scraps += [scrap for path in files for scrap in path.parent.glob(f".{path.name}.*")]
        for scrap in scraps:
            scrap.unlink(missing_ok=True)

    @property
    def session(self) -> str:
        """The session of a run this device last worked in."""
        return self._position()[0]

    @property
    def acknowledged(self) -> int:
        """The last round of that session whose update was acknowledged, or 0."""
        return self._position()[1]

    def _position(self) -> tuple[str, int]:
        path = self.root / "session"
        text = path.read_text(errors="replace").strip() if path.is_file() else ""
        found = re.fullmatch(r"([0-9A-Za-z-]{1,64})(?: ([0-9]{1,10}))?", text)
        return (found[1], int(found[2] or 0)) if found else ("", 0)

    def enter(self, session: str) -> bool:
        """Whether it is a new one: what lies in the outbox of another is of no use then."""
        if session == self.session:
            return False
        write_atomically(self.root / "session", session.encode(), durable=True)
        self.unacknowledged(session)
        return True

    def global_blob(self, sha256: str) -> bytes | None:
        """A received blob, if it is here and whole."""
        path = self.root / "globals" / sha256
        if not path.is_file():
            return None
        blob = path.read_bytes()
        return blob if blob_hash(blob) == sha256 else None

    def keep_global(self, blob: bytes) -> None:
        write_atomically(self.root / "globals" / blob_hash(blob), blob)  # if it is lost, it is fetched again

    def drop_globals(self, keep: set[str]) -> None:
        folder = self.root / "globals"
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name not in keep:
                    path.unlink(missing_ok=True)

    def put_outbox(self, round_: int, blob: bytes) -> None:
        write_atomically(self.root / "outbox" / str(round_), blob, durable=True)

    def update(self, round_: int) -> bytes | None:
        """The unacknowledged update of a round, if there is one."""
        path = self.root / "outbox" / str(round_)
        return path.read_bytes() if path.is_file() else None

    def unacknowledged(self, session: str) -> frozenset[int]:
        """The rounds of a session whose updates have not been acknowledged. What else lies in the outbox, of another
        session or unreadable, is removed."""
        found = set()
        folder = self.root / "outbox"
        for path in list(folder.iterdir()) if folder.is_dir() else []:
            try:
                update, _ = unpack(path.read_bytes(), Update)
            except MessageError:
                update = None
            if update is not None and update.session == session and path.name == str(update.round):
                found.add(update.round)
            else:
                path.unlink(missing_ok=True)
        return frozenset(found)

    def acknowledge(self, round_: int) -> None:
        """The update of this round need not be kept, nor made again after a restart."""
        session, acknowledged = self._position()
        write_atomically(self.root / "session", f"{session} {max(acknowledged, round_)}".encode(), durable=True)
        (self.root / "outbox" / str(round_)).unlink(missing_ok=True)
