"""Programs that tests need beside Python. Without one, its tests are skipped and the summary says so; with CI=true they
fail: a check that did not run does not pass."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import pytest

PACKAGES = {  # program → Debian package
    "chromium": "chromium",
    "faketime": "faketime",
    "ip": "iproute2",
    "iptables": "iptables",
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "mosquitto": "mosquitto",
    "qemu-aarch64-static": "qemu-user-static",
    "strace": "strace",
    "tc": "iproute2",
    "unshare": "util-linux",
}
NOT_TESTED = "not tested here: "
_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # not in a user's PATH on Debian


def find_tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *_FOLDERS]))


def require_tool(name: str) -> str:
    """The program's path. Ends the test if it is not installed."""
    path = find_tool(name)
    if path is None:
        not_tested(f"{name} is not installed (apt-get install {PACKAGES[name]})", fails_in_ci=True)
    return path


def require_faketime() -> Path:
    """The library that changes the clock of a process. Ends the test if it is not installed."""
    library = next(iter(sorted(Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1"))), None)
    if library is None:
        not_tested(f"libfaketime is not installed (apt-get install {PACKAGES['faketime']})", fails_in_ci=True)
    return library


def not_tested(reason: str, fails_in_ci: bool = False) -> NoReturn:
    """Ends the test because this machine lacks something. What can be installed is required with CI=true; what a
    container cannot have, such as a newer kernel, is not."""
    if fails_in_ci and os.environ.get("CI") == "true":
        pytest.fail(f"{NOT_TESTED}{reason}", pytrace=False)
    pytest.skip(f"{NOT_TESTED}{reason}")


def summary(skip_reasons: Iterable[str]) -> str:
    """One line with the reasons of `not_tested`, or nothing. Other skips are by choice, such as the long form."""
    counts: dict[str, int] = {}
    for text in skip_reasons:
        _, found, reason = text.partition(NOT_TESTED)
        if found:
            counts[reason] = counts.get(reason, 0) + 1
    return NOT_TESTED + "; ".join(f"{reason} ({count}×)" for reason, count in counts.items()) if counts else ""
