"""Detects the board from its kernel's files, and derives limits for the daemon.

Every file is read below a root folder, so a mounted SD card or a test's folder works as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_runtime.resources.sensors import board as board_name
from edge_runtime.resources.sensors import thermal_zones

Kind = Literal["raspberry-pi", "jetson", "generic"]

# Types of the processors' thermal zones: cpu-thermal, CPU-therm, soc2-thermal, tj-thermal, x86_pkg_temp,
# bigcore0-thermal. Not iwlwifi, and not a Jetson's PMIC-Die, which always reads 100 °C.
_PROCESSORS = re.compile(r"cpu|gpu|soc|core|pkg|package|^tj", re.IGNORECASE)
_PLAUSIBLE_TRIP = 40.0  # °C; some kernels have trip points of 0 or −274

# Temperature limit of each kind in °C (ours): below the temperature at which the board throttles itself.
_RASPBERRY_PI = 75.0  # the firmware throttles at 80; a 3B+ lowers its clock at 60 and continues to train
_JETSON = 85.0  # the software throttles at 99; the fan reaches full speed earlier
_GENERIC, _BELOW_TRIP = 80.0, 5.0

# Bits of a Raspberry Pi's get_throttled (documentation of vcgencmd): current state, and 16 bits higher since boot.
_THROTTLED = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_SINCE_BOOT = 16
_OVER_CURRENT = {"oc1": "under-voltage", "oc2": "average over-current", "oc3": "peak over-current"}  # Orin's soctherm

# Shares of a board's memory (ours). The margin above the planned share is for the process that classifies.
MEMORY_PLANNED, MEMORY_HIGH, MEMORY_MAX = 0.5, 0.65, 0.75

_MB = 1_000_000


@dataclass(frozen=True)
class Zone:
    """A thermal zone in °C. `trip` is the lowest temperature at which the kernel throttles."""

    name: str
    celsius: float
    trip: float | None = None


@dataclass(frozen=True)
class Limits:
    """Resources that the daemon may use. Sizes in bytes."""

    threads: int
    cpu_quota: int  # percent of one core
    memory: int  # budget of the daemon
    memory_high: int  # of all its processes; above it the kernel reclaims their pages
    memory_max: int  # of all its processes; above it the kernel kills one
    max_temperature: float  # °C
    thermal_zones: tuple[str, ...]


@dataclass(frozen=True)
class Board:
    kind: Kind
    model: str
    cores: int
    memory: int  # bytes
    zones: tuple[Zone, ...]  # of the processors
    power: tuple[str, ...]  # problems of power supply and cooling
    bounds_memory: bool  # whether the kernel can limit a service's memory

    @property
    def limits(self) -> Limits:
        """Leaves one core of several free for the device's own task (ours)."""
        threads = max(1, self.cores - 1)
        trips = [zone.trip for zone in self.zones if zone.trip is not None]
        generic = min(trips) - _BELOW_TRIP if trips else _GENERIC
        return Limits(
            threads=threads,
            cpu_quota=100 * threads,
            memory=_whole_mb(self.memory * MEMORY_PLANNED),
            memory_high=_whole_mb(self.memory * MEMORY_HIGH),
            memory_max=_whole_mb(self.memory * MEMORY_MAX),
            max_temperature={"raspberry-pi": _RASPBERRY_PI, "jetson": _JETSON, "generic": generic}[self.kind],
            thermal_zones=tuple(zone.name for zone in self.zones),
        )


def detect_board(root: Path = Path("/")) -> Board:
    """The board of the system with the root folder `root`."""
    model = board_name(root)
    kind: Kind = "generic"
    if model.startswith("Raspberry Pi"):
        kind = "raspberry-pi"
    elif _read(root / "etc/nv_tegra_release") or re.search("jetson|tegra", model, re.IGNORECASE):
        kind = "jetson"
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return Board(
        kind=kind,
        model=model or "unknown",
        cores=_cores(_read(root / "sys/devices/system/cpu/present")),
        memory=int(total[1]) * 1024 if total else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        zones=tuple(_zones(root)),
        power=(*_throttled(root), *_over_current(root)),
        # Raspberry Pi OS boots with cgroup_disable=memory
        bounds_memory="memory" in _read(root / "sys/fs/cgroup/cgroup.controllers").split()
        or (root / "sys/fs/cgroup/memory").is_dir(),
    )


def _cores(present: str) -> int:
    """Number of cores in a list of ranges like 0-3 or 0,2-5; this machine's number if the list is empty."""
    spans = re.findall(r"(\d+)(?:-(\d+))?", present)
    return sum(int(last or first) - int(first) + 1 for first, last in spans) or os.cpu_count() or 1


def _zones(root: Path) -> Iterator[Zone]:
    """The processors' zones, or all zones if no type matches. One per name, with the lowest trip point."""
    celsius = thermal_zones(root)
    names = [name for name in celsius if _PROCESSORS.search(name)] or list(celsius)
    folders = list((root / "sys/class/thermal").glob("thermal_zone*"))
    for name in sorted(names):
        trips = [trip for folder in folders if _read(folder / "type") == name for trip in _trips(folder)]
        yield Zone(name, celsius[name], min(trips, default=None))


def _trips(folder: Path) -> Iterator[float]:
    """Temperatures in °C at which the kernel throttles a zone's processors."""
    for path in folder.glob("trip_point_*_type"):
        text = _read(path.with_name(path.name.replace("_type", "_temp")))
        if _read(path) == "passive" and text.isdigit() and int(text) / 1000 >= _PLAUSIBLE_TRIP:
            yield int(text) / 1000


def _throttled(root: Path) -> Iterator[str]:
    """Problems that a Raspberry Pi's firmware reports. Without it the driver reports under-voltage only."""
    for path in root.glob("sys/devices/platform/soc*/soc*:firmware/get_throttled"):
        bits = int(text, 16) if re.fullmatch("[0-9a-f]{1,8}", text := _read(path)) else 0
        for shift, when in ((0, "now"), (_SINCE_BOOT, "since boot")):
            yield from (f"{problem} {when}" for bit, problem in _THROTTLED.items() if bits >> (bit + shift) & 1)
        return
    for folder in _hwmon(root, "rpi_volt"):
        if _read(folder / "in0_lcrit_alarm") == "1":
            yield "under-voltage now"


def _over_current(root: Path) -> Iterator[str]:
    """Throttling of a Jetson Orin because of its power supply."""
    for folder in _hwmon(root, "soctherm_oc"):
        for event, problem in _OVER_CURRENT.items():
            if (times := _read(folder / f"{event}_event_cnt")).isdigit() and int(times):
                yield f"{problem} {times} times since boot"


def _hwmon(root: Path, driver: str) -> list[Path]:
    return [path for path in sorted(root.glob("sys/class/hwmon/hwmon*")) if _read(path / "name") == driver]


def _read(path: Path) -> str:
    """A small file's text without trailing NUL and white space, "" if it cannot be read."""
    try:
        return path.read_text("utf-8", errors="replace").strip("\0 \n\t")
    except OSError:
        return ""


def _whole_mb(size: float) -> int:
    return int(size / _MB) * _MB
