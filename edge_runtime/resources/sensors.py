"""Sensor readings from /proc and /sys, and from NetworkManager if it is installed (ours).

A reading is unknown if its file is missing, unreadable or has an implausible value. Reading all sensors takes a few
milliseconds.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from edge_runtime.resources.governor import Readings
from edge_runtime.resources.processors import OtherLoad

PLAUSIBLE = (-40.0, 150.0)  # °C
CONSTANT_ZONE = "PMIC-Die"  # a thermal zone of Jetsons that always reports 100 °C
MOBILE = ("wwan", "ppp", "rmnet")  # prefixes of the interfaces of modems
NMCLI_SECONDS, NMCLI_VALID_SECONDS = 2.0, 60.0
CURRENT_BITS = 0xF  # of a Raspberry Pi's get_throttled; higher bits: what has happened since the last boot


def thermal_zones(root: Path = Path("/")) -> dict[str, float]:
    """°C by zone name. Of several zones with one name, the highest."""
    found: dict[str, float] = {}
    low, high = PLAUSIBLE
    for zone in root.glob("sys/class/thermal/thermal_zone*"):
        name, temperature = _text(zone / "type"), _number(zone / "temp")
        if name and name != CONSTANT_ZONE and temperature is not None and low <= temperature / 1000 <= high:
            found[name] = max(temperature / 1000, found.get(name, low))
    return found


def board(root: Path = Path("/")) -> str:
    """The model name of the machine, or ""."""
    names = (_text(root / name) for name in ("proc/device-tree/model", "sys/class/dmi/id/product_name"))
    return next((name.strip("\0 ") for name in names if name), "")


class Sensors:
    """Reads the machine's sensors on request."""

    def __init__(self, zones: Sequence[str] = (), root: Path = Path("/")) -> None:
        """`zones` names the thermal zones to use; default: all. `root` is the parent of /proc and /sys."""
        self._zones = zones
        self._root = root
        self._load = OtherLoad()
        self._networks = _Networks(root)

    def read(self) -> Readings:
        return Readings(
            temperature=self._temperature(),
            on_battery=_on_battery(self._root),
            others=self._load.share(),
            metered=self._networks.metered(),
            throttled=_throttled(self._root),
        )

    def _temperature(self) -> float | None:
        zones = thermal_zones(self._root)
        return max((zones[name] for name in self._zones or zones if name in zones), default=None)


def _on_battery(root: Path) -> bool:
    """Whether only a battery powers the machine. Batteries of mice and the like do not count."""
    supplies = [path for path in root.glob("sys/class/power_supply/*") if _text(path / "scope") != "Device"]
    discharging = any(_text(path / "status") == "Discharging" for path in supplies)
    powered = any(_text(path / "type") != "Battery" and (_number(path / "online") or 0) > 0 for path in supplies)
    return discharging and not powered


def _throttled(root: Path) -> bool | None:
    """Whether the firmware throttles the processor or reports low voltage, or the kernel caps the frequency."""
    flags: list[float | bool] = [
        int(text, 16) & CURRENT_BITS for text in _texts(root, "sys/devices/platform/soc*/soc*firmware/get_throttled")
    ]
    alarms = root.glob("sys/class/hwmon/hwmon*/in0_lcrit_alarm")
    flags += [_number(alarm) or 0 for alarm in alarms if _text(alarm.parent / "name") == "rpi_volt"]
    for policy in root.glob("sys/devices/system/cpu/cpufreq/policy*"):
        allowed, possible = _number(policy / "scaling_max_freq"), _number(policy / "cpuinfo_max_freq")
        if allowed is not None and possible is not None:
            flags.append(allowed < possible)
    return any(flags) if flags else None


class _Networks:
    """Whether the default route uses a metered network."""

    def __init__(self, root: Path) -> None:
        self._routes = root / "proc" / "net" / "route"
        self._asked: tuple[str, float] | None = None  # interface, and until when the answer is valid
        self._answer: bool | None = None

    def metered(self) -> bool | None:
        interface = self._default_interface()
        if interface is None:
            return None
        if interface.startswith(MOBILE):
            return True
        if self._asked is None or self._asked[0] != interface or time.monotonic() > self._asked[1]:
            self._answer = _ask_network_manager(interface)
            self._asked = interface, time.monotonic() + NMCLI_VALID_SECONDS
        return self._answer

    def _default_interface(self) -> str | None:
        lines = (line.split() for line in (_text(self._routes) or "").splitlines()[1:])
        routes = [(int(line[6]), line[0]) for line in lines if len(line) > 7 and line[1] == line[7] == "00000000"]
        return min(routes)[1] if routes else None


def _ask_network_manager(interface: str) -> bool | None:
    """NetworkManager answers yes, no or unknown, with "(guessed)" if the user has not set it."""
    nmcli = shutil.which("nmcli")
    if nmcli is None:
        return None
    command = [nmcli, "-g", "GENERAL.METERED", "device", "show", interface]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=NMCLI_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"yes": True, "no": False}.get(done.stdout.split("(")[0].strip())


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except (OSError, TypeError):  # a sensor that is off; EAGAIN (a Jetson's cv0) becomes a TypeError
        return None


def _texts(root: Path, pattern: str) -> Iterator[str]:
    return (text for path in root.glob(pattern) if (text := _text(path)))


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return int(text) if text else None
    except ValueError:
        return None
