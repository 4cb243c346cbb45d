"""What machine this is, found by looking, and how much of it a daemon may take.

    python -m devices.boards            what was found here, and the limits that follow

All is read below a root folder, so that another system's tree will do: an SD card's, a test's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from edge_runtime.resources.sensors import board as board_name
from edge_runtime.resources.sensors import thermal_zones
from fedfmsl.common.cli import application, console

Kind = Literal["raspberry-pi", "jetson", "generic"]

# The zones that tell how hot the processors are, by their types: cpu-thermal, CPU-therm, soc2-thermal, tj-thermal,
# x86_pkg_temp, bigcore0-thermal … and not iwlwifi, or a Jetson's PMIC-Die, which says 100 °C all its life.
_PROCESSORS = re.compile(r"cpu|gpu|soc|core|pkg|package|^tj", re.IGNORECASE)
_BELIEVABLE_TRIP = 40.0  # °C; some kernels have trip points that say 0, or −274

# Where each kind is told to stop (ours): below the point from which on it slows itself down.
_RASPBERRY_PI = 75.0  # its firmware throttles from 80 on; a 3B+ lowers its clock from 60 on, which it trains on with
_JETSON = 85.0  # its software throttles from 99 on, its fan is at its fastest earlier
_GENERIC, _BELOW_TRIP = 80.0, 5.0

# Bits of a Raspberry Pi's get_throttled (documentation of vcgencmd): now, and 16 bits higher since it was switched on.
_THROTTLED = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_SINCE_BOOT = 16
_OVER_CURRENT = {"oc1": "under-voltage", "oc2": "average over-current", "oc3": "peak over-current"}  # Orin's soctherm

# Shares of a board's memory (ours): between what the daemon plans with, and where the kernel takes pages back and
# kills, there is room for the process that classifies.
MEMORY_PLANNED, MEMORY_HIGH, MEMORY_MAX = 0.5, 0.65, 0.75

_MB = 1_000_000


@dataclass(frozen=True)
class Zone:
    """A thermal zone: its temperature now, and the lowest from which on the kernel cools it by slowing down, in °C."""

    name: str
    celsius: float
    trip: float | None = None


@dataclass(frozen=True)
class Limits:
    """What the daemon may take of a board; sizes are bytes."""

    threads: int
    cpu_quota: int  # per cent of one processor
    memory: int  # that the daemon plans with
    memory_high: int  # of all its processes: from here on the kernel takes pages back from them
    memory_max: int  # of all its processes: from here on it kills
    max_temperature: float  # °C
    thermal_zones: tuple[str, ...]


@dataclass(frozen=True)
class Board:
    kind: Kind
    model: str
    cores: int
    memory: int  # bytes
    zones: tuple[Zone, ...]  # those that tell how hot the processors are
    power: tuple[str, ...]  # what its supply, or its heat, has done to it
    bounds_memory: bool  # whether the kernel can hold a service to an amount of memory

    @property
    def limits(self) -> Limits:
        """One core of several stays free for what the device is there for (ours)."""
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


def look(root: Path = Path("/")) -> Board:
    """What the kernel of the system whose tree lies at `root` says of its board."""
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
        # Raspberry Pi OS starts its kernel with cgroup_disable=memory
        bounds_memory="memory" in _read(root / "sys/fs/cgroup/cgroup.controllers").split()
        or (root / "sys/fs/cgroup/memory").is_dir(),
    )


def _cores(present: str) -> int:
    """Of a list of ranges like 0-3 or 0,2-5; those of this machine if it is none."""
    spans = re.findall(r"(\d+)(?:-(\d+))?", present)
    return sum(int(last or first) - int(first) + 1 for first, last in spans) or os.cpu_count() or 1


def _zones(root: Path) -> Iterator[Zone]:
    """Those of the processors, or where none is known to be, all; of several with one name, the lowest trip point."""
    celsius = thermal_zones(root)
    names = [name for name in celsius if _PROCESSORS.search(name)] or list(celsius)
    folders = list((root / "sys/class/thermal").glob("thermal_zone*"))
    for name in sorted(names):
        trips = [trip for folder in folders if _read(folder / "type") == name for trip in _trips(folder)]
        yield Zone(name, celsius[name], min(trips, default=None))


def _trips(folder: Path) -> Iterator[float]:
    """Where the kernel begins to slow a zone's processors down, in °C."""
    for path in folder.glob("trip_point_*_type"):
        text = _read(path.with_name(path.name.replace("_type", "_temp")))
        if _read(path) == "passive" and text.isdigit() and int(text) / 1000 >= _BELIEVABLE_TRIP:
            yield int(text) / 1000


def _throttled(root: Path) -> Iterator[str]:
    """What a Raspberry Pi's firmware has noticed; under-voltage also by the driver, where only that tells."""
    for path in root.glob("sys/devices/platform/soc*/soc*:firmware/get_throttled"):
        bits = int(said, 16) if re.fullmatch("[0-9a-f]{1,8}", said := _read(path)) else 0
        for shift, when in ((0, "now"), (_SINCE_BOOT, "since it was switched on")):
            yield from (f"{what} {when}" for bit, what in _THROTTLED.items() if bits >> (bit + shift) & 1)
        return
    for folder in _hwmon(root, "rpi_volt"):
        if _read(folder / "in0_lcrit_alarm") == "1":
            yield "under-voltage now"


def _over_current(root: Path) -> Iterator[str]:
    """How often a Jetson Orin's supply did not suffice, so that it slowed down."""
    for folder in _hwmon(root, "soctherm_oc"):
        for event, what in _OVER_CURRENT.items():
            if (times := _read(folder / f"{event}_event_cnt")).isdigit() and int(times):
                yield f"{what} {times} times since it was switched on"


def _hwmon(root: Path, driver: str) -> list[Path]:
    return [path for path in sorted(root.glob("sys/class/hwmon/hwmon*")) if _read(path / "name") == driver]


def _read(path: Path) -> str:
    """A small file's text without what ends it, "" if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0 \n\t")
    except OSError:
        return ""


def _whole_mb(size: float) -> int:
    return int(size / _MB) * _MB


app = application("Say what this machine is, and what limits a daemon on it has.")


@app.command()
def boards(
    root: Path = typer.Option(Path("/"), help="Look at the system whose tree lies here."),
    as_json: bool = typer.Option(False, "--json", help="For programs."),
) -> None:
    board = look(root)
    limits = board.limits
    if as_json:
        print(json.dumps({**asdict(board), "limits": asdict(limits)}))
        return
    zones = ", ".join(f"{zone.name} {zone.celsius:.0f} °C" for zone in board.zones)
    lines = {
        "board": f"{board.model} ({board.kind})",
        "processors": f"{board.cores}; the daemon computes with {limits.threads}",
        "memory": f"{board.memory // _MB} MB; the daemon plans with {limits.memory // _MB}, "
        f"and may have {limits.memory_max // _MB} with all its processes"
        + ("" if board.bounds_memory else ", which this kernel does not see to"),
        "temperature": f"{zones or 'no sensor'}; it trains up to {limits.max_temperature:.0f} °C",
        "power": ", ".join(board.power) or "nothing noticed",
    }
    for name, value in lines.items():
        console.print(f"{name:<12} {value}", highlight=False)


if __name__ == "__main__":
    app()
