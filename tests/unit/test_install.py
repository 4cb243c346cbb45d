"""Files that devices.install writes, and its errors."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tools import NOT_TESTED
from typer.testing import CliRunner

from devices.install import app
from devices.provision import app as provision
from devices.provisioning import host
from devices.provisioning.installation import CONFIG, ENABLED, UNIT
from devices.provisioning.settings_file import read_table, settings_text
from edge_runtime.settings import Settings
from fedfmsl.common.settings import SettingsError, read_settings
from fedfmsl.errors import ConfigError
from fedfmsl.transport.identity import read_identity

LIMITS = {"threads": 3, "memory": 1_988_000_000, "max_temperature": 75.0, "thermal_zones": ["cpu-thermal"]}
PI = {
    "proc/meminfo": "MemTotal:       3884360 kB\n",
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.5\0",
    "sys/devices/system/cpu/present": "0-3\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48686\n",
    "sys/class/hwmon/hwmon1/name": "rpi_volt\n",
    "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n",
}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason=f"{NOT_TESTED}only root may become another user")


@pytest.fixture
def device_file(tmp_path: Path) -> Path:
    arguments = ["--pki", str(tmp_path / "pki"), "--host", "fleet.example", "--run", "orchard", "kitchen"]
    assert CliRunner().invoke(provision, arguments).exit_code == 0
    os.umask(0o022)
    return tmp_path / "pki" / "devices" / "kitchen.toml"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in PI.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    return tmp_path / "root"


def install(root: Path, *arguments: str | Path) -> str:
    """The command's output. Raises the command's errors."""
    command = [*map(str, arguments), "--root", str(root)]
    return CliRunner().invoke(app, command, catch_exceptions=False).stdout


def below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def test_settings_come_from_the_file_the_board_and_the_command_line(device_file: Path, root: Path) -> None:
    install(root, device_file, "--images", "photos", "--hours", "22:00-06:00,Sat 10:00-18:00", "--cache", "2GB")
    config = below(root, CONFIG)
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    table = read_table(config)
    identity = table.pop("identity")
    assert identity == read_table(device_file)["identity"]
    assert table == {
        **LIMITS,
        "run": "orchard",
        "broker": "mqtts://fleet.example",
        "images": str(Path("photos").absolute()),
        "hours": ["22:00-06:00", "Sat 10:00-18:00"],
        "cache": 2_000_000_000,
        "state": "/var/lib/fedfmsl",
        "stay": True,
    }
    assert "# Limits of this board, Raspberry Pi 4 Model B Rev 1.5.\nthreads = 3" in config.read_text()
    settings = read_settings(Settings, config)
    assert settings.identity == config and read_identity(config).name == "kitchen"


def test_the_command_line_has_priority_over_board_and_file(device_file: Path, root: Path) -> None:
    options = ("--memory", "300MB", "--max-temperature", "60", "--state", "/mnt/ssd/state", "--run", "meadow")
    install(root, device_file, "--images", "/data", *options)
    table = read_table(below(root, CONFIG))
    assert (table["memory"], table["max_temperature"]) == (300_000_000, 60)
    assert (table["state"], table["run"], table["threads"]) == ("/mnt/ssd/state", "meadow", 3)
    assert "\nReadWritePaths=/mnt/ssd/state\n" in below(root, UNIT).read_text()


def test_the_service_may_change_what_answers_on_the_page_change(device_file: Path, root: Path) -> None:
    folders = ("--images", "/photos", "--watch", "/inbox", "--labels", "/lists/labels.csv")
    install(root, device_file, *folders)
    assert "\nReadWritePaths=" not in below(root, UNIT).read_text()
    install(root, device_file, *folders, "--page", "127.0.0.1:8080")
    lines = below(root, UNIT).read_text().splitlines()
    assert {line for line in lines if line.startswith("ReadWritePaths=")} == {
        f"ReadWritePaths={path}" for path in ("/photos", "/inbox", "/lists")
    }


def test_a_second_installation_replaces_the_first(device_file: Path, root: Path) -> None:
    install(root, device_file, "--images", "/old", "--mains-only")
    install(root, device_file, "--images", "/new")
    table = read_table(below(root, CONFIG))
    assert table["images"] == "/new" and "mains_only" not in table
    assert below(root, ENABLED).readlink() == UNIT


def test_the_service_runs_this_python_with_the_boards_limits(device_file: Path, root: Path) -> None:
    install(root, device_file, "--images", "/data")
    unit = below(root, UNIT).read_text()
    assert f"\nExecStart={sys.executable} -m edge_runtime run --config /etc/fedfmsl/device.toml\n" in unit
    assert "\nMemoryHigh=2585000000\nMemoryMax=2983000000\nCPUQuota=300%\n" in unit


def test_a_mounted_sd_card_gives_no_board_limits(device_file: Path, tmp_path: Path) -> None:
    printed = install(tmp_path / "card", device_file, "--images", "/data")
    assert not LIMITS.keys() & read_table(below(tmp_path / "card", CONFIG)).keys()
    assert "\nMemoryMax=75%\n" in below(tmp_path / "card", UNIT).read_text()
    assert "useradd --system" in printed and "chown fedfmsl: /etc/fedfmsl/device.toml" in printed


def test_problems_of_the_board_and_a_left_over_key_are_reported(device_file: Path, root: Path) -> None:
    printed = install(root, device_file, "--images", "/data")
    for part in ("under-voltage now", "cgroup_enable=memory", f"{device_file} holds the device's key"):
        assert part in printed


def test_uninstall_removes_the_installed_files_only(device_file: Path, root: Path) -> None:
    before = sorted(path for path in root.rglob("*") if path.is_file())
    install(root, device_file, "--images", "/data")
    state = root / "var/lib/fedfmsl/state"
    state.parent.mkdir(parents=True)
    state.touch()
    install(root, "--uninstall")
    assert sorted(path for path in root.rglob("*") if path.is_file()) == sorted([*before, state])
    assert not below(root, CONFIG).parent.exists() and not below(root, ENABLED).is_symlink()
    install(root, "--uninstall")


def test_a_file_with_a_password_can_be_installed(tmp_path: Path, root: Path) -> None:
    arguments = ["--pki", str(tmp_path / "pki"), "--host", "fleet.example", "--run", "orchard", "--user", "kitchen"]
    assert CliRunner().invoke(provision, arguments).exit_code == 0
    install(root, tmp_path / "pki" / "devices" / "kitchen.toml", "--images", "/data")
    table = read_table(below(root, CONFIG))
    assert table["device"] == "kitchen" and table["broker"].startswith("mqtts://kitchen:")


def test_a_separate_identity_file_is_included(device_file: Path, root: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.toml"
    plain.write_text(settings_text(("", {"run": "orchard", "broker": "mqtts://fleet.example"})))
    install(root, plain, "--images", "/data", "--identity", device_file)
    assert read_identity(below(root, CONFIG)).name == "kitchen"


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("", (), "--run is missing"),
        ('run = "orchard"\n', (), "--images is missing"),
        ('run = "orchard"\n', ("--images", "/data", "--hours", "late"), "--hours 'late'"),
        ('run = "orchard"\nimages = "/data"\nidentity = "-----BEGIN CERTIFICATE-----"\n', (), "no certificate in PEM"),
        ("run = orchard\n", ("--images", "/data"), "is not TOML"),
        (None, ("--images", "/data"), "does not exist; check the path"),
    ],
)
def test_invalid_settings_are_named_and_write_nothing(
    tmp_path: Path, text: str | None, arguments: tuple[str, ...], says: str
) -> None:
    path = tmp_path / "device_file.toml"
    if text is not None:
        path.write_text(text)
        path.chmod(0o600)
    with pytest.raises(ConfigError, match=says) as caught:
        install(tmp_path / "root", path, *arguments)
    assert all("\n" not in line for line in caught.value.lines)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "the device's file is missing"),
        (("--uninstall", "--purge"), "--purge needs --uninstall and excludes --root"),
        (("--purge",), "--purge needs --uninstall"),
    ],
)
def test_options_that_exclude_each_other_are_named(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        install(tmp_path, *arguments)


NOBODY = "nobody"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter. pytest's temporary folders are private to their user."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        images = Path(folder) / "images"
        (images / "train" / "apple").mkdir(parents=True)
        (images / "train" / "apple" / "1.jpg").write_bytes(b"x")
        yield images


@as_root
def test_readable_folders_are_no_problem(open_folder: Path) -> None:
    (open_folder / "gone.jpg").symlink_to("nowhere")
    assert list(host.unreadable(open_folder, NOBODY)) == []


@as_root
@pytest.mark.parametrize(
    ("path", "mode", "says"),
    [
        ("..", 0o700, "cannot enter {parent}; chmod o+x {parent}, then install again"),
        (".", 0o700, "cannot read {images}; chmod -R o+rX {images}, then install again"),
        ("train/apple", 0o711, "cannot read {images}/train/apple; chmod -R o+rX {images}"),
        ("train/apple/1.jpg", 0o600, "cannot read {images}/train/apple/1.jpg; chmod -R o+rX {images}"),
    ],
)
def test_unreadable_paths_are_named_with_the_remedy(open_folder: Path, path: str, mode: int, says: str) -> None:
    (open_folder / path).chmod(mode)
    (problem,) = host.unreadable(open_folder, NOBODY)
    assert says.format(parent=open_folder.parent, images=open_folder) in problem


@as_root
def test_if_a_group_may_read_the_remedy_is_to_join_it(open_folder: Path) -> None:
    os.chown(open_folder, -1, 44)  # group video on Debian
    open_folder.chmod(0o750)
    (problem,) = host.unreadable(open_folder, NOBODY)
    assert f"cannot read {open_folder}; usermod --append --groups video nobody" in problem
    open_folder.chmod(0o755)
    photo = open_folder / "train" / "apple" / "1.jpg"
    os.chown(photo, -1, 44)
    photo.chmod(0o640)
    (problem,) = host.unreadable(open_folder, NOBODY)
    assert f"cannot read {photo}; usermod --append --groups video nobody" in problem


@as_root
def test_a_folder_that_cannot_be_written_is_named(open_folder: Path) -> None:
    (problem,) = host.unwritable(open_folder, NOBODY)
    assert f"chown nobody: {open_folder}" in problem
    assert list(host.unwritable(open_folder / "to be made", NOBODY)) == []


@as_root
def test_a_python_that_cannot_be_run_is_named(open_folder: Path) -> None:
    python = open_folder / "python"
    python.symlink_to(sys.executable)
    open_folder.chmod(0o700)
    (problem,) = host.unusable(python, NOBODY)
    assert f"cannot run the daemon with {python}" in problem and "/opt/fedfmsl" in problem


def test_all_errors_are_reported_at_once(device_file: Path, root: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        install(root, device_file, "--images", "/data", "--hours", "late", "--memory", "much")
    assert len(caught.value.lines) == 2


def test_a_renewed_identity_replaces_the_installed_one_and_nothing_else(device_file: Path, root: Path) -> None:
    install(root, device_file, "--images", "/photos", "--hours", "22:00-06:00")
    config, pki = root / CONFIG.relative_to("/"), device_file.parents[1]
    before = read_table(config)
    assert CliRunner().invoke(provision, ["--pki", str(pki), "--renew", "kitchen"]).exit_code == 0
    os.umask(0o022)
    assert "kitchen has a certificate until" in install(root, "--renew", device_file)
    after = read_table(config)
    assert {key for key in after if after[key] != before[key]} == {"identity"} and after.keys() == before.keys()
    assert after["identity"] == read_table(device_file)["identity"]
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert CliRunner().invoke(provision, ["--pki", str(pki), "cellar"]).exit_code == 0
    os.umask(0o022)
    with pytest.raises(ConfigError, match="holds no certificate of kitchen"):
        install(root, "--renew", pki / "devices" / "cellar.toml")
