"""python -m devices.install FILE --images DIR: makes this machine a device of a fleet, and it stays one.

FILE is what devices.provision wrote for it. What it says, what is said here, and what the board can bear become
/etc/fedfmsl/device.toml, and a systemd service of a user of its own runs the daemon. The `edge` extra is enough.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from devices.boards import Board, look
from devices.provisioning import host
from devices.provisioning.service_unit import NAME, STATE, USER, Service, service_unit
from devices.provisioning.settings_file import Value, settings_text
from edge_runtime.settings import Settings
from fedfmsl.common.cli import application, console
from fedfmsl.common.files import write_atomically
from fedfmsl.common.options import with_settings
from fedfmsl.common.settings import SettingsError, read_settings
from fedfmsl.errors import ConfigError
from fedfmsl.transport.identity import read_identity

HERE = Path("/")
CONFIG = Path("/etc") / NAME / "device.toml"
UNIT = Path("/etc/systemd/system") / f"{NAME}.service"
WANTED = UNIT.parent / "multi-user.target.wants" / UNIT.name  # what enables it
OWN_TO_THE_SERVICE = (Path("/tmp"), Path("/var/tmp"))  # it does not see those of the machine

_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----\n.*?-----END [A-Z0-9 ]+-----\n", re.DOTALL)

app = application("Make this machine a device of a fleet: its settings, a user, a service. Or undo that.")


@dataclass(frozen=True)
class Order:
    """What is wanted: the carried file, the settings in it and on the command line, and which are of the latter."""

    carried: Path
    settings: Settings
    said: frozenset[str]


def _order(carried: Path | None, flags: Mapping[str, Any]) -> Order | None:
    return Order(carried, read_settings(Settings, carried, flags), frozenset(flags)) if carried else None


@app.command()
@with_settings(
    Settings, file=typer.Argument(None, metavar="FILE", help="Device file written by devices.provision."), read=_order
)
def install(
    order: Order | None,
    root: Path = typer.Option(HERE, help="Lay all out below this folder, of an SD card say, and do nothing else."),
    uninstall: bool = typer.Option(False, "--uninstall", help="Take service and settings away; the state stays."),
    purge: bool = typer.Option(False, "--purge", help="With --uninstall: the state and the user go as well."),
) -> None:
    """Make this machine a device of a fleet. Once more: with other settings, and with the state that it has."""
    if root == HERE and os.geteuid() != 0:
        raise ConfigError(f"only root may install a service: sudo {sys.executable} -m devices.install …")
    if purge and (root != HERE or not uninstall):
        raise ConfigError("--purge goes with --uninstall, and without --root")
    os.umask(0o022)
    if uninstall:
        _uninstall(root, purge)
        return
    if order is None:
        raise ConfigError("which device is it? give the file that devices.provision wrote, like kitchen.toml")
    board = look(root) if (root / "proc/meminfo").exists() else None  # an SD card does not tell where it will be
    text = _settings(order, board)
    _check_text(text, order)
    service = _service(order.settings, board)
    if root == HERE:
        host.add_user(USER, STATE)
        _check_access(service)
        for folder in service.writes:
            host.give(folder, USER)
    _put(root / CONFIG.relative_to(HERE), text, 0o600, USER if root == HERE else None)
    _put(root / UNIT.relative_to(HERE), service_unit(service, host.systemd_version() if root == HERE else 0))
    _say_what_is_odd(order, board)
    _start(root)


def _settings(order: Order, board: Board | None) -> str:
    """The text of device.toml."""
    settings = order.settings
    wanted: dict[str, Value] = settings.model_dump(mode="json", include=settings.model_fields_set, exclude_none=True)
    wanted |= {key: str(value.absolute()) for key, value in settings if key in wanted and isinstance(value, Path)}
    if settings.identity:
        wanted["identity"] = "".join(_PEM.findall(settings.identity.read_text("utf-8", errors="replace")))
    parts: list[tuple[str, dict[str, Value]]] = [
        ("Said on installation.", {key: value for key, value in wanted.items() if key in order.said}),
        ("Where the service keeps what it must not lose.", {} if "state" in wanted else {"state": str(STATE)}),
        ("A service does not end with a run.", {} if "stay" in wanted else {"stay": True}),
        (f"Of this board, {board.model}." if board else "", _of_board(board, wanted) if board else {}),
        (f"Of {order.carried.name}.", {key: value for key, value in wanted.items() if key not in order.said}),
    ]
    header = "Written by devices.install, which replaces it. Secret: the device's key may stand in it."
    return settings_text((header, {}), *(part for part in parts if part[1]))


def _of_board(board: Board, wanted: Mapping[str, Value]) -> dict[str, Value]:
    """What nobody has said otherwise."""
    limits = board.limits
    known: dict[str, Value] = {"threads": limits.threads, "memory": limits.memory}
    if limits.thermal_zones:
        known |= {"max_temperature": limits.max_temperature, "thermal_zones": limits.thermal_zones}
    return {key: value for key, value in known.items() if key not in wanted}


def _service(settings: Settings, board: Board | None) -> Service:
    state = settings.state if "state" in settings.model_fields_set else STATE
    reads = (settings.images, settings.labels, settings.bundle, settings.watch)
    writes = (state, settings.log_file.parent if settings.log_file else state)
    return Service(
        python=Path(sys.executable),
        config=CONFIG,
        reads=[path.absolute() for path in reads if path],
        writes=sorted({path.absolute() for path in writes if not path.absolute().is_relative_to(STATE)}),
        limits=board.limits if board else None,
    )


def _check_text(text: str, order: Order) -> None:
    """As the daemon will read it. Raises ConfigError."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / CONFIG.name
        copy.touch(0o600)
        copy.write_text(text)
        try:
            read_settings(Settings, copy, environment=False)
            if order.settings.identity:
                read_identity(copy)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(copy), str(order.carried))) from error


def _check_access(service: Service) -> None:
    """Raises SettingsError with all that the service would fail at."""
    problems: list[str] = []
    for path in service.reads:
        if not path.exists():
            problems.append(f"{path} does not exist; make or mount it, or give another")
        elif any(path.is_relative_to(folder) for folder in OWN_TO_THE_SERVICE):
            problems.append(
                f"{path} is where the service does not see it: it has a folder for temporary files of its own"
            )
        else:
            problems += host.unreadable(path, USER)
    for folder in service.writes:
        problems += host.unwritable(folder, USER)
    problems += host.unusable(service.python, USER)
    if problems:
        raise SettingsError(problems)


def _start(root: Path) -> None:
    look_at = f"systemctl status {NAME}, journalctl -fu {NAME}"
    if root == HERE and host.systemd_runs():
        host.start_service(NAME)
        console.print(f"installed {UNIT}, started; to look at it: {look_at}")
        return
    wanted = root / WANTED.relative_to(HERE)
    wanted.parent.mkdir(parents=True, exist_ok=True)
    wanted.unlink(missing_ok=True)
    wanted.symlink_to(UNIT)
    if root == HERE:
        console.print(f"installed {UNIT}; systemd does not run here, it starts at the next boot. Then: {look_at}")
    else:
        first = f"{shlex.join(host.add_user_command(USER, STATE))} && chown {USER}: {CONFIG}"
        console.print(f"laid out below {root}; on the device itself, before its first start: {first}")


def _uninstall(root: Path, purge: bool) -> None:
    unit = root / UNIT.relative_to(HERE)
    with_systemd = root == HERE and host.systemd_runs()
    if with_systemd and unit.exists():
        host.stop_service(NAME)
    for path in (root / WANTED.relative_to(HERE), unit, config := root / CONFIG.relative_to(HERE)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not there, or somebody keeps something in it
        config.parent.rmdir()
    if with_systemd:
        host.reload_services()
    if purge:
        host.remove_user(USER)  # first: it fails as long as a daemon works, which may not lose its state then
        shutil.rmtree(STATE, ignore_errors=True)
    console.print(f"removed {UNIT} and {CONFIG}" + (f", {STATE} and user {USER}" if purge else f"; {STATE} stays"))


def _say_what_is_odd(order: Order, board: Board | None) -> None:
    if board and board.power:
        console.print(f"note: this board has had {', '.join(board.power)}; it may want a better supply, or a fan")
    if board and not board.bounds_memory:
        console.print(
            "note: this kernel holds no service to its memory; on Raspberry Pi OS write cgroup_enable=memory at the end"
            " of the line in /boot/firmware/cmdline.txt, and restart"
        )
    if order.settings.identity == order.carried:
        console.print(f"note: {order.carried} holds the device's key, which now stands in {CONFIG}: remove it")


def _put(path: Path, text: str, mode: int = 0o644, user: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = os.umask(0o777 & ~mode)
    write_atomically(path, text.encode(), durable=True)
    os.umask(before)
    if user:
        shutil.chown(path, user, user)


if __name__ == "__main__":
    app()
