"""Detection of boards from files like those of real boards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from devices.provisioning.boards import Board, detect_board

UNREADABLE = None  # a sensor whose reads fail, like a Jetson's cv0


def lay_out(root: Path, files: Mapping[str, str | None]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is UNREADABLE:
            path.symlink_to("/proc/self/mem")  # reading its first page is an input/output error
        else:
            path.write_text(text)
    return root


def zones(**celsius: float | None) -> dict[str, str | None]:
    files: dict[str, str | None] = {}
    for index, (name, value) in enumerate(celsius.items()):
        folder = f"sys/class/thermal/thermal_zone{index}"
        files[f"{folder}/type"] = name.replace("_thermal", "-thermal") + "\n"
        files[f"{folder}/temp"] = UNREADABLE if value is None else f"{value * 1000:.0f}\n"
    return files


def cores(count: int) -> dict[str, str]:
    return {"sys/devices/system/cpu/present": f"0-{count - 1}\n"}


def memory(kilobytes: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal:       {kilobytes} kB\nMemFree:          93456 kB\n"}


PI_4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.5\0",
    **cores(4),
    **memory(3884360),
    **zones(cpu_thermal=48.686),
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "critical\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "110000\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    "sys/class/hwmon/hwmon1/name": "rpi_volt\n",
    "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n",
}
PI_5 = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    **cores(4),
    **memory(8256432),
    **zones(cpu_thermal=55.1),
    "sys/class/hwmon/hwmon2/name": "rp1_adc\n",
    "sys/class/hwmon/hwmon4/name": "rpi_volt\n",
    "sys/class/hwmon/hwmon4/in0_lcrit_alarm": "0\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
}
ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    **cores(6),
    **memory(7802888),
    **zones(
        cpu_thermal=49.062,
        gpu_thermal=49.906,
        cv0_thermal=None,
        cv1_thermal=None,
        cv2_thermal=None,
        soc0_thermal=49.781,
        soc1_thermal=50.5,
        soc2_thermal=48.812,
        tj_thermal=50.5,
    ),
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon3/oc2_event_cnt": "0\n",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "27\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma misc\n",
}
PC = {
    "sys/class/dmi/id/product_name": "OptiPlex 3050\n",
    "sys/devices/system/cpu/present": "0,2-4\n",
    **memory(16279056),
    **zones(acpitz=27.8, x86_pkg_temp=44.0, iwlwifi_1=None),
}


@pytest.fixture
def found(tmp_path: Path, request: pytest.FixtureRequest) -> Board:
    return detect_board(lay_out(tmp_path, request.param))


@pytest.mark.parametrize(
    ("found", "kind", "model", "cores", "megabytes", "zones", "degrees"),
    [
        (PI_4, "raspberry-pi", "Raspberry Pi 4 Model B Rev 1.5", 4, 3977, ["cpu-thermal"], 75),
        (PI_5, "raspberry-pi", "Raspberry Pi 5 Model B Rev 1.0", 4, 8454, ["cpu-thermal"], 75),
        (
            *(ORIN_NANO, "jetson", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 6, 7990),
            [f"{name}-thermal" for name in ("cpu", "gpu", "soc0", "soc1", "soc2", "tj")],
            85,
        ),
        (PC, "generic", "OptiPlex 3050", 4, 16669, ["x86_pkg_temp"], 80),
    ],
    ids=["pi4", "pi5", "orin", "pc"],
    indirect=["found"],
)
def test_a_board_is_detected_from_its_kernels_files(
    found: Board, kind: str, model: str, cores: int, megabytes: int, zones: list[str], degrees: float
) -> None:
    assert (found.kind, found.model, found.cores, found.memory // 1_000_000) == (kind, model, cores, megabytes)
    assert list(found.limits.thermal_zones) == zones
    assert found.limits.max_temperature == degrees


@pytest.mark.parametrize(
    ("found", "power", "bounds"),
    [
        (
            PI_4,
            (
                *("under-voltage now", "throttled now"),
                *("under-voltage since boot", "throttled since boot"),
            ),
            False,
        ),
        (PI_5, (), True),
        ({**PI_5, "sys/class/hwmon/hwmon4/in0_lcrit_alarm": "1\n"}, ("under-voltage now",), True),
        (ORIN_NANO, ("peak over-current 27 times since boot",), True),
        (PC, (), False),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, (), True),
    ],
    ids=["pi4", "pi5", "weak-pi5", "orin", "pc", "old-cgroups"],
    indirect=["found"],
)
def test_problems_of_power_and_memory_limits_are_detected(found: Board, power: tuple[str, ...], bounds: bool) -> None:
    assert found.power == power
    assert found.bounds_memory is bounds


def test_limits_leave_a_core_free_and_a_margin_of_memory(tmp_path: Path) -> None:
    limits = detect_board(lay_out(tmp_path, PI_4)).limits
    assert (limits.threads, limits.cpu_quota) == (3, 300)
    assert limits.memory < limits.memory_high < limits.memory_max < 3_977_000_000
    single = detect_board(lay_out(tmp_path / "zero", {**cores(1), **memory(500_000)})).limits
    assert (single.threads, single.cpu_quota) == (1, 100)


def test_a_generic_boards_limit_is_below_its_trip_points(tmp_path: Path) -> None:
    folder = "sys/class/thermal/thermal_zone0"
    trips = [("passive", "85000"), ("passive", "70000"), ("passive", "-274000"), ("active", "50000"), ("hot", "60000")]
    files = {f"{folder}/trip_point_{i}_type": kind for i, (kind, _) in enumerate(trips)}
    files |= {f"{folder}/trip_point_{i}_temp": value for i, (_, value) in enumerate(trips)}
    assert detect_board(lay_out(tmp_path, {**zones(soc_thermal=40), **files})).limits.max_temperature == 65


def test_implausible_sensors_are_ignored(tmp_path: Path) -> None:
    root = lay_out(tmp_path, zones(cpu_thermal=-256.0, board=41.0))
    assert [zone.name for zone in detect_board(root).zones] == ["board"]


def test_an_unknown_machine_has_limits_too(tmp_path: Path) -> None:
    board = detect_board(tmp_path)
    assert (board.kind, board.model, board.zones) == ("generic", "unknown", ())
    assert board.cores >= 1 and board.limits.memory > 0


def test_the_command_prints_the_board(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "devices.boards", "--root", str(lay_out(tmp_path, PI_4))]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in ("Raspberry Pi 4 Model B Rev 1.5", "cpu-thermal 49 °C", "up to 75 °C", "under-voltage now"):
        assert part in shown
    data = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert data["limits"]["thermal_zones"] == ["cpu-thermal"]
