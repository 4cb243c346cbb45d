"""The daemon's systemd unit, checked by systemd's tools, and one of its restrictions without systemd."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.tools import NOT_TESTED, not_tested

from devices.provisioning import host
from devices.provisioning.boards import Limits
from devices.provisioning.service_unit import NAME, SERVER, Service, server_unit, service_unit

LIMITS = Limits(3, 300, 1_900_000_000, 2_500_000_000, 2_900_000_000, 75.0, ("cpu-thermal",))
VERSION = host.systemd_version()
DENY_WRITE_EXECUTE = 65  # PR_SET_MDWE of prctl(2), since Linux 6.3, which MemoryDenyWriteExecute= sets
LAUNCH = f"""
import ctypes, os, sys
if ctypes.CDLL(None).prctl({DENY_WRITE_EXECUTE}, 1, 0, 0, 0):
    sys.exit("not on this kernel")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""

with_systemd = pytest.mark.skipif(VERSION < 250, reason=f"{NOT_TESTED}systemd 250 or newer is not installed")


def write_unit(folder: Path, systemd: int = VERSION, **changes: object) -> Path:
    values = {
        "python": Path(sys.executable),
        "config": Path("/etc/fedfmsl/device.toml"),
        "reads": [Path("/data/our photos, 100%")],
        "writes": [Path("/mnt/a disk/state")],
        "limits": LIMITS,
        **changes,
    }
    path = folder / f"{NAME}.service"
    path.write_text(service_unit(Service(**values), systemd))  # type: ignore[arg-type]
    return path


def write_server_unit(folder: Path) -> Path:
    path = folder / f"{SERVER}.service"
    path.write_text(server_unit(Path(sys.executable)))
    return path


def systemd_analyze(*arguments: str) -> str:
    """Its output on both streams."""
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


@with_systemd
@pytest.mark.parametrize("changes", [{}, {"limits": None, "writes": []}], ids=["board", "card"])
def test_systemd_accepts_the_unit(tmp_path: Path, changes: dict[str, object]) -> None:
    assert systemd_analyze("verify", str(write_unit(tmp_path, **changes))) == ""


@with_systemd
def test_systemd_accepts_the_servers_unit(tmp_path: Path) -> None:
    assert systemd_analyze("verify", str(write_server_unit(tmp_path))) == ""


def test_the_server_works_without_writable_and_executable_memory() -> None:
    code = "from Crypto.Protocol.SecretSharing import Shamir; Shamir.split(2, 3, bytes(16))"
    done = run_without_new_code("-c", f"import trainer_server.commands; {code}")
    assert done.returncode == 0, done.stderr


@with_systemd
def test_paths_in_the_unit_are_escaped(tmp_path: Path) -> None:
    output = systemd_analyze("verify", "--man=no", str(write_unit(tmp_path, python=Path("/a b/100%/$x/python"))))
    assert "Command /a b/100%/$x/python is not executable: No such file or directory" in output


@with_systemd
def test_the_exposure_level_is_low(tmp_path: Path) -> None:
    for path in (write_unit(tmp_path), write_server_unit(tmp_path)):
        output = systemd_analyze("security", "--offline=true", str(path))
        score = re.search(rf"exposure level for {path.name}: ([\d.]+)", output)
        assert score and float(score[1]) <= 2.0, output


def test_restart_delays_grow_if_systemd_supports_it(tmp_path: Path) -> None:
    old, new = (write_unit(tmp_path, systemd=version).read_text() for version in (252, 254))
    assert "RestartSec=1min\n" in old and "RestartSteps" not in old
    assert "RestartSteps=6\nRestartMaxDelaySec=10min\n" in new
    for text in (old, new):
        assert "StartLimitIntervalSec=0\n" in text and "RestartPreventExitStatus=2\n" in text


def run_without_new_code(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process that cannot get writable and executable memory."""
    command = [sys.executable, "-c", LAUNCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "not on this kernel" in done.stderr:
        not_tested("Linux 6.3 or newer is needed")
    return done


def test_the_daemon_trains_without_writable_and_executable_memory(
    bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    photo = next(photos["device-0"].rglob("*.jpg"))
    measuring = (
        "-m",
        "edge_runtime",
        "probe",
        "--bundle",
        str(bundle),
        "--sample",
        str(photo),
        "--scratch",
        str(tmp_path),
    )
    done = run_without_new_code(*measuring)
    assert done.returncode == 0, done.stderr
    assert '"level": 2' in done.stdout
    forbidden = run_without_new_code("-c", "import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)")
    assert "PermissionError" in forbidden.stderr
