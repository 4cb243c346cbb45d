"""The state directory: the files that a device needs after a restart.

STATE/identity           the device's name, created at the first start
STATE/identity.pem, next.key   see `edge_runtime.store.identity_store`
STATE/session            see `edge_runtime.store.outbox`
STATE/outbox/ROUND       updates that the server has not acknowledged
STATE/globals/SHA256     global blobs that the device has received
STATE/bundles/SHA256/    downloaded bundles: the present and the previous one, and that of STATE/mixture
STATE/bundles/used       SHA-256 of the present and of the previous one, in lines
STATE/tasks/SHA256       the task that the device last started with, and those of STATE/mixture and STATE/former
STATE/task               SHA-256 of the former
STATE/personal           the local expert; it never leaves the device
STATE/residual           the encoding error of the last update (error feedback)
STATE/secure             see `edge_runtime.store.secure_store`
STATE/privacy            see `edge_runtime.store.budget_store`
STATE/baseline           the expert trained alone, in a run with a baseline
STATE/cache/             the feature cache
STATE/results.json       the last evaluation
STATE/mixture            the device's own part of the personalized model, as of the last round
STATE/former             that of the model which predictions used before
STATE/mixture.lock       held while one of the two is replaced
STATE/personalized.onnx  the personalized model in one file
STATE/exported           session and round of that file
STATE/lock               held by the process that uses this directory
STATE/plan.json          the measured memory plan
STATE/provider.json      the execution provider in use, and what the trials found
STATE/unfinished.json    see `edge_runtime.resources.unfinished`
STATE/verified.json      see `edge_runtime.store.verified_bundle`
STATE/health.json        the last health message
STATE/skipped.txt        files that are not used, and why
STATE/questions.sqlite   files of the watched folder that wait for an answer, and the last answers
STATE/trash/             files that were deleted on the device's page (see `edge_runtime.labelling.answers`)
STATE/page-token         the token of the device's page
STATE/samples.sqlite     the device's files and the splits of its samples (see `edge_runtime.data.ledger`)
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import socket
import tempfile
import unicodedata
from pathlib import Path

from edge_runtime.store.budget_store import BudgetStore
from edge_runtime.store.global_store import GlobalStore
from edge_runtime.store.identity_store import IdentityStore
from edge_runtime.store.outbox import Outbox
from edge_runtime.store.secure_store import SecureStore
from edge_runtime.store.task_store import TaskStore
from fedfmsl.common.files import FULL, write_atomically
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.topics import check_name

PROBE = ".probe-"  # start of the name of a temporary folder


class DeviceStore:
    """Paths in the state directory `root`, and the stores in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outbox = Outbox(root)
        self.globals = GlobalStore(root / "globals")
        self.tasks = TaskStore(root)
        self.secure = SecureStore(root)
        self.budget = BudgetStore(root)
        self.renewed = IdentityStore(root)

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
    def questions(self) -> Path:
        return self.root / "questions.sqlite"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    @property
    def page_token(self) -> Path:
        return self.root / "page-token"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def mixture(self) -> Path:
        return self.root / "mixture"

    @property
    def former(self) -> Path:
        return self.root / "former"

    @property
    def mixture_lock(self) -> Path:
        return self.root / "mixture.lock"

    @property
    def personalized(self) -> Path:
        return self.root / "personalized.onnx"

    @property
    def verified(self) -> Path:
        return self.root / "verified.json"

    @property
    def health(self) -> Path:
        return self.root / "health.json"

    @property
    def bundles(self) -> Path:
        """Downloaded bundles, each in a folder named by its SHA-256."""
        return self.root / "bundles"

    @property
    def present_bundle(self) -> str:
        """SHA-256 of the downloaded bundle that the device uses. "": there is none yet."""
        try:
            return (self.bundles / "used").read_text("ascii", errors="replace").split()[0]
        except (OSError, IndexError):
            return ""

    def keep_bundles(self, present: str, of_model: str = "") -> None:
        """Removes all downloaded bundles but the `present` one, the one before it, and that of the personalized model.
        Arguments are SHA-256. Does nothing on a disk that cannot be written."""
        used = self.bundles / "used"
        with contextlib.suppress(OSError):
            known = used.read_text("ascii", errors="replace").split() if used.is_file() else []
            order = [present, *(name for name in known if name != present)][:2]
            write_atomically(used, "\n".join(order).encode())
            for folder in self.bundles.iterdir():
                if folder.is_dir() and folder.name not in {*order, of_model}:
                    shutil.rmtree(folder, ignore_errors=True)

    def sizes(self) -> dict[str, int]:
        """Bytes on the disk: of downloaded bundles, of unacknowledged updates and of all other files but the cache,
        which counts its own."""
        found = {"bundles": 0, "updates": 0, "other": 0}
        kinds = {self.bundles: "bundles", self.outbox.folder: "updates"}
        for path in self.root.iterdir() if self.root.is_dir() else ():
            if path != self.cache:
                found[kinds.get(path, "other")] += sum(map(_size, path.rglob("*") if path.is_dir() else [path]))
        return found

    @property
    def skipped(self) -> Path:
        return self.root / "skipped.txt"

    @property
    def exported(self) -> Path:
        return self.root / "exported"

    @property
    def _name(self) -> Path:
        return self.root / "identity"

    def permission_error(self) -> ConfigError:
        """The error if this user may not read the directory."""
        return ConfigError(
            f"this user may not read {self.root}; run the command as the daemon's user (sudo -u fedfmsl)"
        )

    def ensure_name(self, configured: str | None) -> str:
        """The device's name. The first start creates it: `configured`, or made from the host name.

        Raises ConfigError if the directory belongs to another device than `configured`, or cannot be written.
        """
        if configured:
            check_name("device", configured)
        self._check_writable()
        stored = self.name()
        if stored and configured and configured != stored:
            raise ConfigError(
                f"--state {self.root} belongs to device {stored!r}, not {configured!r}; use another folder"
            )
        name = stored or configured or f"{name_of_host(socket.gethostname())}-{secrets.token_hex(4)}"
        if not stored:
            write_atomically(self._name, name.encode(), durable=True)
        return name

    def name(self) -> str | None:
        """The device's name. None: it has not started yet. Raises ConfigError if the file is damaged."""
        try:
            return check_name("device", self._name.read_text("utf-8").strip()) if self._name.is_file() else None
        except (UnicodeDecodeError, ConfigError) as error:
            raise ConfigError(f"{self._name} holds no device name; restore it, or use another --state") from error

    def _check_writable(self) -> None:
        """Raises ConfigError. A full disk is not an error: the daemon waits for space."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            if error.errno not in FULL:
                raise ConfigError(
                    f"--state {self.root} cannot be written to ({error.strerror}); choose a folder that this user can "
                    "write to, on a disk that is not read-only"
                ) from error

    def remove_temporary_files(self) -> None:
        """Removes the temporary files of a killed process. No other process may write at the same time."""
        files = [self.personal, self.baseline, self.residual, self.results, self.mixture, self.former]
        files += [self.personalized, self.health, self.skipped, self.exported, self.budget.path, self.secure.path]
        files += [self.tasks.path]
        files += [self.renewed.path, self.renewed.next_key]
        temporary = [path for folder in ("globals", "tasks", "outbox") for path in (self.root / folder).glob(".*")]
        temporary += [each for path in files for each in path.parent.glob(f".{path.name}.*")]
        for path in temporary:
            path.unlink(missing_ok=True)
        for folder in self.root.glob(f"{PROBE}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _size(path: Path) -> int:
    """Of a file; 0 for a folder, or for a file that was just removed."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def name_of_host(host: str) -> str:
    """The start of a device name, made of any host name: küche becomes kuche, カメラ becomes device."""
    plain = unicodedata.normalize("NFKD", host).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]+", "-", plain)[:40].strip("-_") or "device"
