"""The project as a wheel, and the aarch64 wheels it depends on, as pip finds them in its registry."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
# What glibc 2.35 can load, JetPack 6's; Raspberry Pi OS has 2.36 or 2.41. pip wants every name that a wheel may have.
_GLIBC = ("2_35", "2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17", "2014")
PLATFORMS = [f"manylinux{'' if version == '2014' else '_'}{version}_aarch64" for version in _GLIBC]


def pip(*arguments: str) -> str:
    """What it says on stdout. Raises AssertionError with the end of its stderr if it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def for_aarch64(python: str) -> list[str]:
    """pip's options for a device with that Python: wheels only, so whatever would have to be compiled is an error."""
    options = [f"--platform={platform}" for platform in PLATFORMS]
    return ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *options]


def build_wheel(folder: Path) -> Path:
    """The project's own, as the README makes it."""
    shutil.rmtree(REPOSITORY / "build" / "lib", ignore_errors=True)  # setuptools would take in what has left the tree
    pip("wheel", "--no-deps", f"--wheel-dir={folder}", ".")
    (wheel,) = folder.glob("fedfmsl_edge-*.whl")
    return wheel


def download(wheel: Path, python: str, folder: Path) -> None:
    """All that `[edge]` needs on aarch64, into `folder`."""
    pip("download", *for_aarch64(python), f"--dest={folder}", f"{wheel}[edge]")


def install(wheel: Path, python: str, wheels: Path, target: Path) -> None:
    """As pip on the device would; done by the host's, which is faster."""
    pip("install", *for_aarch64(python), "--no-index", f"--find-links={wheels}", f"--target={target}", f"{wheel}[edge]")
