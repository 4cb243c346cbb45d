"""The machine that a device is installed on: users, file access, services."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedfmsl.errors import RunError, one_line

DEPTH = 3  # levels below a folder that are checked for access: DIR/train/<class>/…


def add_user_command(user: str, home: Path) -> list[str]:
    return [
        *("useradd", "--system", "--user-group", "--no-create-home", "-s", "/usr/sbin/nologin"),
        *("--home-dir", str(home), user),
    ]


def add_user(user: str, home: Path) -> None:
    """Adds the user if it does not exist."""
    if not _exists(user):
        _run(add_user_command(user, home))


def remove_user(user: str) -> None:
    if _exists(user):
        _run(["userdel", user])


def unreadable(path: Path, user: str) -> Iterator[str]:
    """The first problem that keeps `user` from reading a file or folder, with its remedy."""
    for folder in reversed(path.parents):
        if not _can(user, "-x", folder):
            by_group, group = folder.stat().st_mode & 0o010, _group(folder)
            remedy = _join(user, group) if by_group and group else f"chmod o+x {shlex.quote(str(folder))}"
            yield f"the service's user cannot enter {folder}; {remedy}, then install again"
            return
    inside = [str(path), "-maxdepth", str(DEPTH), "!", "-type", "l"]
    may_not = ["!", "-readable", "-o", "-type", "d", "!", "-executable"]
    found = _as(user, ["find", "-L", *inside, "(", *may_not, ")", "-print", "-quit"]).stdout.splitlines()
    if found:
        first = Path(found[0])
        needed, group = (0o050 if first.is_dir() else 0o040), _group(first)
        by_group = first.stat().st_mode & needed == needed
        remedy = _join(user, group) if by_group and group else f"chmod -R o+rX {shlex.quote(str(path))}"
        yield f"the service's user cannot read {first}; {remedy}, then install again"


def unwritable(folder: Path, user: str) -> Iterator[str]:
    if folder.exists() and not _can(user, "-w", folder):
        command = f"chown {user}: {shlex.quote(str(folder))}"
        yield f"the service's user cannot write to {folder}; choose another folder, or run {command}"


def unusable(python: Path, user: str) -> Iterator[str]:
    """The problem that keeps `user` from running the daemon with this Python, in the environment of a service."""
    try:
        done = _as(user, [str(python), "-c", "import edge_runtime.commands"])
        errors = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except OSError as error:
        errors = [str(error)]
    for line in errors:
        yield (
            f"the service's user cannot run the daemon with {python} ({one_line(line)}); install the package into an "
            "environment that every user may read, for example python3 -m venv /opt/fedfmsl"
        )


def change_owner(path: Path, user: str) -> None:
    """Makes `user` the owner. A missing folder is created."""
    if not path.exists():
        path.mkdir(parents=True)
    shutil.chown(path, user, user)


def systemd_runs() -> bool:
    return Path("/run/systemd/system").is_dir()  # as sd_booted(3) documents


def systemd_version() -> int:
    """0 without systemd."""
    if not shutil.which("systemctl"):
        return 0
    found = re.match(r"systemd (\d+)", _run(["systemctl", "--version"]))
    return int(found[1]) if found else 0


def start_service(name: str) -> None:
    """Starts the service now and at every boot. A running one is restarted with the new settings."""
    reload_services()
    _run(["systemctl", "enable", name])
    _run(["systemctl", "restart", "--no-block", name])  # else it waits until the daemon is ready


def stop_service(name: str) -> None:
    _run(["systemctl", "disable", "--now", name])


def reload_services() -> None:
    _run(["systemctl", "daemon-reload"])


def _exists(user: str) -> bool:
    return any(entry.pw_name == user for entry in pwd.getpwall())


def _can(user: str, flag: str, path: Path) -> bool:
    return _as(user, ["test", flag, str(path)]).returncode == 0


def _group(path: Path) -> str:
    """Name of a path's group. "" for root's group, which no service user should join."""
    gid = path.stat().st_gid
    return grp.getgrgid(gid).gr_name if gid else ""


def _join(user: str, group: str) -> str:
    return f"usermod --append --groups {group} {user}"


def _as(user: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command as `user`, so the kernel checks modes, groups and access control lists."""
    entry = pwd.getpwnam(user)
    groups = os.getgrouplist(user, entry.pw_gid)
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
        cwd="/",
        env={"PATH": os.defpath},
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=groups,
    )


def _run(command: Sequence[str]) -> str:
    """The command's output. Raises RunError with its error message."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL, check=False
        )
    except OSError as error:
        raise RunError(f"{shlex.join(command)}: {error}") from error
    if done.returncode:
        raise RunError(f"{shlex.join(command)} failed: {one_line(done.stderr) or done.returncode}")
    return done.stdout
