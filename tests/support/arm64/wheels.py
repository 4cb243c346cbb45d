"""The project as a wheel, and the aarch64 wheels that it depends on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
LOCK = REPOSITORY / "devices" / "requirements.txt"
# Platform tags for glibc 2.35 of JetPack 6. Raspberry Pi OS has 2.36 or 2.41. pip needs every tag by name.
_GLIBC = ("2_35", "2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17", "2014")
PLATFORMS = [f"manylinux{'' if version == '2014' else '_'}{version}_aarch64" for version in _GLIBC]


def pip(*arguments: str) -> str:
    """Runs pip. Returns its stdout. Raises AssertionError with the end of its stderr if it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def for_aarch64(python: str) -> list[str]:
    """pip's options for a device with that Python. A package without a wheel is an error."""
    options = [f"--platform={platform}" for platform in PLATFORMS]
    return ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *options]


def build_wheel(folder: Path) -> Path:
    """Builds the project's wheel as the documentation does."""
    shutil.rmtree(REPOSITORY / "build" / "lib", ignore_errors=True)  # setuptools would include removed files
    pip("wheel", "--no-deps", f"--wheel-dir={folder}", ".")
    (wheel,) = folder.glob("fedfmsl_edge-*.whl")
    return wheel


def download(python: str, folder: Path) -> None:
    """Downloads all wheels of `[edge]` for aarch64, by their hashes."""
    pip("download", *for_aarch64(python), f"--dest={folder}", "--require-hashes", f"--requirement={LOCK}")


def install(wheel: Path, python: str, wheels: Path, target: Path) -> None:
    """Installs as pip on the device would. The host's pip is faster."""
    options = [*for_aarch64(python), "--no-index", f"--target={target}"]
    pip("install", *options, f"--find-links={wheels}", "--require-hashes", f"--requirement={LOCK}")
    pip("install", *options, "--no-deps", str(wheel))
