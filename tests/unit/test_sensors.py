"""What the machine says of itself, from trees of files as boards have them; and of this very machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from support.processes import wait_until

from edge_runtime.resources.processors import OtherLoad, ProcessorTimes
from edge_runtime.resources.sensors import Sensors, board, thermal_zones

THERMAL = "sys/class/thermal/thermal_zone"
SUPPLY = "sys/class/power_supply"
ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
BUSY = "import time\nwhile True: pass"


def lay_out(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def zones(**temperatures: object) -> dict[str, object]:
    found: dict[str, object] = {}
    for index, (name, temperature) in enumerate(temperatures.items()):
        found |= {f"{THERMAL}{index}/type": name.replace("_", "-"), f"{THERMAL}{index}/temp": temperature}
    return found


def supply(name: str, **says: object) -> dict[str, object]:
    return {f"{SUPPLY}/{name}/{what}": value for what, value in says.items()}


def test_the_hottest_zone_counts_and_nonsense_does_not(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path, zones(cpu_thermal=61234, gpu_thermal=58000, PMIC_Die=100000, tj=-256000, wifi=200000, ddr="")
    )
    assert Sensors(root=root).read().temperature == 61.234
    assert Sensors(["gpu-thermal"], root).read().temperature == 58.0
    assert Sensors(["gpu-thermal", "cpu-thermal", "no-such-zone"], root).read().temperature == 61.234
    assert Sensors(["wifi"], root).read().temperature is None
    assert thermal_zones(root) == {"cpu-thermal": 61.234, "gpu-thermal": 58.0}


def test_a_zone_that_refuses_to_be_read_is_left_out(tmp_path: Path) -> None:
    root = lay_out(tmp_path, zones(cpu_thermal=50000))
    (tmp_path / f"{THERMAL}1/temp").mkdir(parents=True)  # reading it is an OSError
    lay_out(tmp_path, {f"{THERMAL}1/type": "gpu-thermal"})
    assert Sensors(root=root).read().temperature == 50.0


@pytest.mark.parametrize(
    ("supplies", "on_battery"),
    [
        ({}, False),
        (supply("BAT0", type="Battery", status="Discharging"), True),
        (supply("BAT0", type="Battery", status="Charging"), False),
        (supply("BAT0", type="Battery", status="Full", scope="System"), False),
        (supply("BAT0", type="Battery", status="Discharging") | supply("AC", type="Mains", online=0), True),
        (supply("BAT0", type="Battery", status="Discharging") | supply("AC", type="Mains", online=1), False),
        (supply("BAT0", type="Battery", status="Discharging") | supply("usb", type="USB", online=1), False),
        (supply("hidpp", type="Battery", status="Discharging", scope="Device"), False),
    ],
)
def test_a_battery_of_the_machine_that_nothing_feeds(
    supplies: dict[str, object], on_battery: bool, tmp_path: Path
) -> None:
    assert Sensors(root=lay_out(tmp_path, supplies)).read().on_battery is on_battery


FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"
FIRMWARE_5 = "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"
POLICY = "sys/devices/system/cpu/cpufreq/policy0"


@pytest.mark.parametrize(
    ("files", "throttled"),
    [
        ({}, None),
        ({FIRMWARE: "0"}, False),
        ({FIRMWARE: "50000"}, False),  # once, but not now
        ({FIRMWARE: "50005"}, True),
        ({FIRMWARE_5: "8"}, True),
        ({"sys/class/hwmon/hwmon1/name": "rpi_volt", "sys/class/hwmon/hwmon1/in0_lcrit_alarm": 1}, True),
        ({"sys/class/hwmon/hwmon1/name": "other", "sys/class/hwmon/hwmon1/in0_lcrit_alarm": 1}, None),
        ({f"{POLICY}/scaling_max_freq": 1500000, f"{POLICY}/cpuinfo_max_freq": 1500000}, False),
        ({f"{POLICY}/scaling_max_freq": 600000, f"{POLICY}/cpuinfo_max_freq": 1500000}, True),
    ],
)
def test_throttling_is_what_firmware_or_kernel_say_of_now(
    files: dict[str, object], throttled: bool | None, tmp_path: Path
) -> None:
    assert Sensors(root=lay_out(tmp_path, files)).read().throttled is throttled


def test_other_load_is_the_share_of_others_between_two_readings() -> None:
    readings = iter(
        [
            ProcessorTimes(total=20.0, others=4.0),
            ProcessorTimes(total=21.0, others=4.3),
            ProcessorTimes(total=21.02, others=4.32),  # too early for a new value
            ProcessorTimes(total=22.0, others=5.1),
            ProcessorTimes(total=23.0, others=5.0),  # an unseen child has ended, and its time is its parent's now
            None,
            ProcessorTimes(total=25.0, others=6.0),
        ]
    )
    load = OtherLoad(lambda: next(readings))
    expected = [None, 0.3, 0.3, 0.8, 0.0, None, None]
    assert [load.share() for _ in expected] == [value if value is None else pytest.approx(value) for value in expected]


def test_busy_children_do_not_count_as_others() -> None:
    """On this machine. The children keep all of its processors busy, besides other processes."""
    children = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        sensors, started, before = Sensors(), time.monotonic(), sum(map(seconds_of, children))
        sensors.read()
        wait_until(lambda: sum(map(seconds_of, children)) > before + 0.5, "the children to be at work")
        elapsed = (time.monotonic() - started) * (os.cpu_count() or 1)
        share = (sum(map(seconds_of, children)) - before) / elapsed
        others = sensors.read().others
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert others is not None
    assert others < 1 - 0.7 * share


def seconds_of(process: subprocess.Popen[bytes]) -> float:
    """Processor time."""
    return float(psutil.Process(process.pid).cpu_times().user)


def routes(*interfaces: tuple[str, int]) -> dict[str, object]:
    lines = [f"{name}\t00000000\t0100A8C0\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0" for name, metric in interfaces]
    local = "eth9\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0"
    return {"proc/net/route": ROUTES + "\n".join([local, *lines])}


@pytest.fixture
def network_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What nmcli will answer, and the log of what it was asked, beside it."""
    folder = tmp_path / "bin"
    script = f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/answer\n'
    lay_out(folder, {"nmcli": script})
    (folder / "nmcli").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "answer"


@pytest.mark.parametrize(
    ("interfaces", "answer", "metered"),
    [
        ([("wwan0", 700)], "no", True),
        ([("wwan0", 700), ("eth0", 100)], "no (guessed)", False),
        ([("wlan0", 600)], "yes", True),
        ([("wlan0", 600)], "yes (guessed)", True),
        ([("wlan0", 600)], "unknown", None),
        ([], "yes", None),
    ],
)
def test_a_metered_network_is_a_modems_or_one_that_network_manager_calls_so(
    interfaces: list[tuple[str, int]], answer: str, metered: bool | None, network_manager: Path, tmp_path: Path
) -> None:
    network_manager.write_text(answer)
    sensors = Sensors(root=lay_out(tmp_path, routes(*interfaces)))
    assert sensors.read().metered is metered
    assert sensors.read().metered is metered
    asked = tmp_path / "asked"
    if asked.is_file():  # only once
        assert asked.read_text() == f"-g GENERAL.METERED device show {min(interfaces, key=lambda i: i[1])[0]}\n"


def test_network_manager_is_asked_again_of_another_interface(network_manager: Path, tmp_path: Path) -> None:
    network_manager.write_text("no")
    sensors = Sensors(root=lay_out(tmp_path, routes(("eth0", 100))))
    assert sensors.read().metered is False
    network_manager.write_text("yes")
    lay_out(tmp_path, routes(("wlan0", 100)))
    assert sensors.read().metered is True


def test_a_machine_is_called_what_it_calls_itself(tmp_path: Path) -> None:
    assert board(tmp_path) == ""
    lay_out(tmp_path, {"sys/class/dmi/id/product_name": "Standard PC"})
    assert board(tmp_path) == "Standard PC"
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    assert board(tmp_path) == "Raspberry Pi 5 Model B Rev 1.0"


def test_where_nothing_is_told_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    lay_out(tmp_path, routes(("eth0", 100)))
    readings = Sensors(root=tmp_path).read()
    assert (readings.temperature, readings.metered, readings.throttled) == (None,) * 3
