"""Installs the daemon on a device: /etc/fedfmsl/device.toml and a systemd service with its own user; and removes it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from devices.provisioning import host
from devices.provisioning.boards import Board, detect_board
from devices.provisioning.service_unit import NAME, STATE, USER, Service, service_unit
from devices.provisioning.settings_file import Value, dumps, item, read_document, settings_text
from edge_runtime.settings import Settings
from fedfmsl.common.files import write_atomically
from fedfmsl.common.settings import SettingsError, read_settings
from fedfmsl.errors import ConfigError
from fedfmsl.transport.identity import read_identity

ROOT = Path("/")
CONFIG = Path("/etc") / NAME / "device.toml"
UNIT = Path("/etc/systemd/system") / f"{NAME}.service"
ENABLED = UNIT.parent / "multi-user.target.wants" / UNIT.name  # the link that starts the service at boot
PRIVATE = (Path("/tmp"), Path("/var/tmp"))  # the service has private ones (PrivateTmp= in its unit)

_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----\n.*?-----END [A-Z0-9 ]+-----\n", re.DOTALL)


@dataclass(frozen=True)
class Request:
    """What to install. `source`: the device's file from devices.provision. `settings`: those of the file and of the
    command line. `overrides`: the keys from the command line."""

    source: Path
    settings: Settings
    overrides: frozenset[str]


def install(request: Request, root: Path = ROOT) -> list[str]:
    """Writes settings and service, and starts the service. A repeated installation replaces the settings.

    With another `root` (of a mounted SD card) it only writes files. Returns lines for the operator.
    Raises ConfigError, or SettingsError with every problem that would stop the service.
    """
    local = root == ROOT
    # the board is unknown if `root` is a mounted SD card
    board = detect_board(root) if (root / "proc/meminfo").exists() else None
    text = _device_toml(request, board)
    _check_settings(text, request)
    service = _service(request.settings, board)
    if local:
        host.add_user(USER, STATE)
        _check_access(service)
        for folder in service.writes:
            host.change_owner(folder, USER)
    _write(_below(root, CONFIG), text, 0o600, USER if local else None)
    _write(_below(root, UNIT), service_unit(service, host.systemd_version() if local else 0))
    return [*_notes(request, board), _start(root)]


def renew(source: Path, root: Path = ROOT) -> list[str]:
    """Replaces the identity in the installed settings by the one in `source`, and restarts the service. Its state and
    its other settings stay. Raises ConfigError if nothing is installed, or the file has no identity of this device."""
    config = _below(root, CONFIG)
    if not config.is_file():
        raise ConfigError(f"{CONFIG} does not exist; install first, without --renew")
    earlier, later = read_identity(config), read_identity(source)
    if later.valid is None or later.name != earlier.name:
        raise ConfigError(f"{source} holds no certificate of {earlier.name}; pass the file of --renew {earlier.name}")
    table = read_document(config)
    table["identity"] = item("".join(_PEM.findall(source.read_text("utf-8", errors="replace"))))
    local = root == ROOT
    _write(config, dumps(table), 0o600, USER if local else None)
    if local and host.systemd_runs():
        host.start_service(NAME)
    return [f"{earlier.name} has a certificate until {later.valid[1]:%Y-%m-%d}; remove {source}"]


def uninstall(root: Path = ROOT, purge: bool = False) -> list[str]:
    """Removes service and settings, with `purge` also the state directory and the user."""
    unit, config = _below(root, UNIT), _below(root, CONFIG)
    with_systemd = root == ROOT and host.systemd_runs()
    if with_systemd and unit.exists():
        host.stop_service(NAME)
    for path in (_below(root, ENABLED), unit, config):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the folder does not exist or holds other files
        config.parent.rmdir()
    if with_systemd:
        host.reload_services()
    if purge:
        host.remove_user(USER)  # before the state: it fails while a daemon still runs
        shutil.rmtree(STATE, ignore_errors=True)
    return [f"removed {UNIT} and {CONFIG}" + (f", {STATE} and user {USER}" if purge else f"; {STATE} stays")]


def _device_toml(request: Request, board: Board | None) -> str:
    """Settings of the command line and of the file override the limits of the board."""
    settings = request.settings
    values: dict[str, Value] = settings.model_dump(mode="json", include=settings.model_fields_set, exclude_none=True)
    values |= {key: str(value.absolute()) for key, value in settings if key in values and isinstance(value, Path)}
    if settings.identity:
        read_identity(settings.identity)  # raises ConfigError
        values["identity"] = "".join(_PEM.findall(settings.identity.read_text("utf-8", errors="replace")))
    parts: list[tuple[str, dict[str, Value]]] = [
        ("Options of the installation.", {key: value for key, value in values.items() if key in request.overrides}),
        ("The state directory of the service.", {} if "state" in values else {"state": str(STATE)}),
        ("The service waits for the next run after a run.", {} if "stay" in values else {"stay": True}),
        (f"Limits of this board, {board.model}." if board else "", _limits(board, values) if board else {}),
        (
            f"From {request.source.name}.",
            {key: value for key, value in values.items() if key not in request.overrides},
        ),
    ]
    header = "Written by devices.install, which overwrites it. Secret: it may contain the device's key."
    return settings_text((header, {}), *(part for part in parts if part[1]))


def _limits(board: Board, values: Mapping[str, Value]) -> dict[str, Value]:
    """Settings derived from the board, without those that have a value already."""
    limits = board.limits
    known: dict[str, Value] = {"threads": limits.threads, "memory": limits.memory}
    if limits.thermal_zones:
        known |= {"max_temperature": limits.max_temperature, "thermal_zones": limits.thermal_zones}
    return {key: value for key, value in known.items() if key not in values}


def _service(settings: Settings, board: Board | None) -> Service:
    state = settings.state if "state" in settings.model_fields_set else STATE
    reads = (settings.images, settings.labels, settings.bundle, settings.watch)
    writes = [state, settings.log_file.parent if settings.log_file else state]
    if settings.page and settings.watch:  # its answers move files
        writes += [settings.watch, settings.images, *([settings.labels.parent] if settings.labels else [])]
    return Service(
        python=Path(sys.executable),
        config=CONFIG,
        reads=[path.absolute() for path in reads if path],
        writes=sorted({path.absolute() for path in writes if not path.absolute().is_relative_to(STATE)}),
        limits=board.limits if board else None,
    )


def _check_settings(text: str, request: Request) -> None:
    """Reads the text as the daemon will. Raises ConfigError."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / CONFIG.name
        copy.touch(0o600)
        copy.write_text(text, encoding="utf-8")
        try:
            read_settings(Settings, copy, environment=False)
            if request.settings.identity:
                read_identity(copy)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(copy), str(request.source))) from error


def _check_access(service: Service) -> None:
    """Raises SettingsError with every file that the service's user cannot read, write or execute."""
    problems: list[str] = []
    for path in service.reads:
        if not path.exists():
            problems.append(f"{path} does not exist; create or mount it, or pass another path")
        elif any(path.is_relative_to(folder) for folder in PRIVATE):
            problems.append(f"{path} is not visible to the service, which has a temporary folder of its own; move it")
        else:
            problems += host.unreadable(path, USER)
    for folder in service.writes:
        problems += host.unwritable(folder, USER)
    problems += host.unusable(service.python, USER)
    if problems:
        raise SettingsError(problems)


def _start(root: Path) -> str:
    """Enables the service, and starts it if systemd runs on this machine."""
    inspect = f"systemctl status {NAME}, journalctl -fu {NAME}"
    if root == ROOT and host.systemd_runs():
        host.start_service(NAME)
        return f"installed and started {UNIT}; inspect it with: {inspect}"
    link = _below(root, ENABLED)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(UNIT)
    if root == ROOT:
        return f"installed {UNIT}; systemd does not run now, so it starts at the next boot; inspect it with: {inspect}"
    first = f"{shlex.join(host.add_user_command(USER, STATE))} && chown {USER}: {CONFIG}"
    return f"wrote the files below {root}; on the device itself, before its first start: {first}"


def _notes(request: Request, board: Board | None) -> Iterator[str]:
    if board and board.power:
        yield f"note: this board reports {', '.join(board.power)}; it may need a better power supply or a fan"
    if board and not board.bounds_memory:
        yield (
            "note: this kernel does not enforce the service's memory limit; on Raspberry Pi OS append "
            "cgroup_enable=memory to the line in /boot/firmware/cmdline.txt, and restart"
        )
    if request.settings.identity == request.source:
        yield f"note: {request.source} holds the device's key, which is now in {CONFIG}: remove it"


def _write(path: Path, text: str, mode: int = 0o644, user: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = os.umask(0o777 & ~mode)
    write_atomically(path, text.encode(), durable=True)
    os.umask(before)
    if user:
        shutil.chown(path, user, user)


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to(ROOT)
