"""A Raspberry Pi in software: Debian's arm64 programs in a folder, run by qemu-user as a Cortex-A76.

Its processes have the folder as their file system. Kernel, clock, memory and network are the host's. The kernel starts
qemu for every arm64 program (binfmt_misc), also for child processes.
"""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTER = Path(__file__).with_name("enter.sh")
HERE = Path(__file__).parents[3] / ".arm64"  # kept from one run to the next
SUITE = "bookworm"  # Raspberry Pi OS of 2023 to 2025, with Python 3.11
PYTHON = "3.11"
MODEL = "Raspberry Pi 5 Model B Rev 1.0"
PACKAGES = ("apt", "ca-certificates", "libgomp1", "passwd", "python3", "sudo")  # in addition to the essential ones
PROGRAMS = ("mmdebstrap", "qemu-aarch64-static", "unshare")  # of the host
CORES = 2
VARIABLES = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "COLUMNS": "1000",
    "DEBIAN_FRONTEND": "noninteractive",
    "QEMU_CPU": "cortex-a76",
}

_SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list")  # package sources of this machine
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_INTERPRETER = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")  # of Debian's qemu-user-static
_USR_IS_MERGED = "Package: usr-is-merged\nVersion: 1\nArchitecture: all\nMulti-Arch: foreign\nMaintainer: nobody\n"
_CPU = """\
processor\t: {}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""


class NoBoardError(Exception):
    """The reason why this machine cannot emulate a board."""


@dataclass(frozen=True)
class Board:
    """A system below the folder `root`. Paths in its commands are relative to that folder."""

    root: Path

    def command(self, *command: str, **variables: str) -> list[str]:
        """The host's command that runs `command` on the board as root, without environment variables of the host. It
        stays one process, which receives signals."""
        assignments = [f"{name}={value}" for name, value in {**VARIABLES, **variables}.items()]
        alone = ("unshare", "--mount", "--propagation", "private", "sh", str(ENTER), str(self.root))
        return ["env", "--ignore-environment", *assignments, *alone, *command]

    def run(self, *command: str, seconds: float = 600, **variables: str) -> str:
        """Runs a command. Returns its output on both streams. Raises AssertionError with the output if it fails."""
        done = subprocess.run(
            self.command(*command, **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout[-2000:]}"
        return done.stdout

    def path(self, inside: str) -> Path:
        """The host's path of a file on the board."""
        return self.root / inside.lstrip("/")

    def compile(self, inside: str) -> None:
        """Compiles the Python modules below a folder on the host, which is much faster. Does nothing with another
        Python version."""
        if f"{sys.version_info.major}.{sys.version_info.minor}" == PYTHON:
            compileall.compile_dir(str(self.path(inside)), quiet=2, stripdir=str(self.root))

    def copy(self, root: Path) -> Board:
        """A copy that a test may change."""
        subprocess.run(["cp", "--archive", "--reflink=auto", str(self.root), str(root)], check=True)
        return Board(root)


def require_emulation() -> None:
    """Lets the kernel run arm64 programs. Raises NoBoardError if that is impossible."""
    if os.geteuid() != 0:
        raise NoBoardError("only root can mount and chroot, which the emulated board needs")
    if not (_BINFMT / "register").exists():
        _try("mount", "-t", "binfmt_misc", "none", str(_BINFMT))
    if not (_BINFMT / "qemu-aarch64").exists():  # with systemd the package has done it
        try:
            (_BINFMT / "register").write_text(_INTERPRETER.read_text())
        except OSError as error:
            raise NoBoardError(f"the kernel takes no interpreter for arm64 programs: {error}") from error


def build(folder: Path) -> None:
    """Makes the board's file system at `folder` in some 20 s: packages are unpacked and registered as installed. Their
    scripts, which would take five minutes, are not run. Raises NoBoardError if that fails."""
    _try(
        *("mmdebstrap", "--quiet", "--arch=arm64", "--variant=extract", "--skip=check/qemu,cleanup/apt"),
        *("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", "--include=?essential"),
        *(f"--include={','.join(PACKAGES)}", SUITE, str(folder), *_sources()),
    )
    _enter_packages(folder)
    _configure(folder)
    _show_hardware(folder)
    Board(folder).compile(f"/usr/lib/python{PYTHON}")


def _sources() -> list[str]:
    """Package sources for mmdebstrap. On another distribution it uses its default."""
    known = [path for path in _SOURCES if Path(path).is_file() and SUITE in Path(path).read_text()]
    return known[:1]


def _enter_packages(root: Path) -> None:
    """Registers the unpacked packages with the board's apt."""
    entries = [_USR_IS_MERGED]
    archives = sorted((root / "var/cache/apt/archives").glob("*.deb"))
    for archive in archives:
        entries.append(
            subprocess.run(["dpkg-deb", "-f", str(archive)], stdout=subprocess.PIPE, text=True, check=True).stdout
        )
        archive.unlink()
    entries = [f"{entry.rstrip()}\nStatus: install ok installed\n" for entry in entries]
    (root / "var/lib/dpkg/status").write_text("\n".join(entries))


def _configure(root: Path) -> None:
    """Does what package scripts would do and the tests need: users, rules of sudo, host names."""
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)
    for kind in ("auth", "account", "password", "session", "session-noninteractive"):
        (root / f"etc/pam.d/common-{kind}").write_text(f"{kind.partition('-')[0]} required pam_permit.so\n")
    for name in ("hosts", "resolv.conf"):
        shutil.copy(f"/etc/{name}", root / "etc" / name)
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    if certificates.is_file():
        shutil.copy(certificates, root / "etc/ssl/certs")
    (root / "home/pi").mkdir()


def _show_hardware(root: Path) -> None:
    """Writes files in place of the kernel's: newer ONNX Runtimes exit at start on those of an x86-64."""
    (root / "etc/cpuinfo").write_text("\n".join(_CPU.format(core) for core in range(CORES)))
    processors, tree = root / "sys/devices/system/cpu", root / "sys/firmware/devicetree/base"
    for folder in (processors, tree):
        folder.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (processors / name).write_text(f"0-{CORES - 1}\n")
    (tree / "model").write_bytes(MODEL.encode() + b"\0")


def _try(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoBoardError(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
