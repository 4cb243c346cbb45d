"""Settings out of a file, the environment and flags: which goes first, what they become, and every error at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from devices.provisioning.authority import CLIENT, make_authority
from edge_runtime.settings import LinkSettings, Settings, SettingsError, StateSettings, read_settings, with_settings
from fedfmsl.errors import ConfigError
from fedfmsl.transport.identity import read_identity

NEEDED = 'run = "orchard"\nimages = "photos"\n'


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "device.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def command_of(model: type[StateSettings]) -> typer.Typer:
    """A command that prints the settings it was given, and an option of its own."""
    app = typer.Typer()

    @app.command()
    @with_settings(model)
    def command(settings: StateSettings, loud: bool = typer.Option(False, "--loud")) -> None:
        """What it does."""
        print(json.dumps({**settings.model_dump(mode="json"), "loud": loud}))

    return app


def run(*arguments: str, model: type[StateSettings] = Settings, environment: dict[str, str] | None = None) -> Any:
    result = CliRunner().invoke(command_of(model), arguments, env=environment or {})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_a_flag_goes_before_the_environment_and_that_before_the_file(written: Callable[[str], Path]) -> None:
    config = str(written(NEEDED + "threads = 1\nmemory = '1GB'\nstep_seconds = 3\n"))
    seen = run(
        *("--config", config, "--threads", "3"), environment={"FEDFMSL_THREADS": "2", "FEDFMSL_MEMORY": "512 MB"}
    )
    assert (seen["threads"], seen["memory"], seen["step_seconds"]) == (3, 512_000_000, 3.0)
    assert (seen["run"], seen["engine"], seen["loud"]) == ("orchard", "auto", False)


def test_every_setting_has_a_flag_and_a_variable() -> None:
    shown = CliRunner().invoke(command_of(Settings), ["--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for key in Settings.model_fields:
        assert f"--{key.replace('_', '-')}" in shown
        assert f"FEDFMSL_{key.upper()}" in shown


def test_the_config_file_may_be_named_by_the_environment(written: Callable[[str], Path]) -> None:
    assert run("--loud", environment={"FEDFMSL_CONFIG": str(written(NEEDED))})["loud"] is True


def test_paths_of_a_file_are_meant_from_its_folder_and_those_of_flags_from_here(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    seen = run("--config", str(written(NEEDED + 'labels = "../labels.csv"\n')), "--bundle", "b")
    assert seen["images"] == str(tmp_path / "photos")
    assert seen["labels"] == str(tmp_path / "../labels.csv")
    assert seen["bundle"] == "b"


def test_lists_are_lists_in_a_file_and_have_commas_elsewhere(written: Callable[[str], Path]) -> None:
    config = written(NEEDED + 'hours = ["22:00-06:00", "Sat 08:00-20:00"]\nthermal_zones = ["cpu-thermal"]\n')
    seen = run("--config", str(config), environment={"FEDFMSL_HOURS": "22:00-06:00, Sat 08:00-20:00"})
    assert run("--config", str(config)) == seen
    settings = read_settings(Settings, config, {})
    assert any(datetime(2026, 11, 25, 23, 30) in hours for hours in settings.hours)
    assert not any(datetime(2026, 11, 25, 12, 0) in hours for hours in settings.hours)


def test_switches_can_be_turned_on_and_off(written: Callable[[str], Path]) -> None:
    config = str(written(NEEDED + "mains_only = true\n"))
    assert run("--config", config)["mains_only"] is True
    assert run("--config", config, "--no-mains-only")["mains_only"] is False
    assert run("--config", config, environment={"FEDFMSL_MAINS_ONLY": "0"})["mains_only"] is False


def test_a_smaller_command_takes_the_same_file(written: Callable[[str], Path]) -> None:
    config = str(written(NEEDED + 'state = "here"\nmemory = "1GB"\n'))
    assert run("--config", config, model=StateSettings)["state"].endswith("/here")
    assert run("--config", config, model=LinkSettings)["run"] == "orchard"


def test_an_identity_may_stand_in_the_file_itself(written: Callable[[str], Path]) -> None:
    authority = make_authority("fleet")
    issued = authority.issue("kitchen", [CLIENT])
    pem = issued.key_pem + issued.certificate_pem + authority.certificate_pem
    config = written(f'{NEEDED}identity = """\n{pem}"""\n')
    config.chmod(0o600)
    settings = read_settings(Settings, config, {})
    assert settings.identity == config
    assert read_identity(settings.identity).name == "kitchen"


def test_everything_that_is_wrong_is_said_at_once_with_its_place(written: Callable[[str], Path]) -> None:
    config = written(
        'run = "or/chard"\n\nmemmory = "1GB"\nengine = "fast"\ncache = "much"\nmax_load = 3.5\n'
        'hours = ["26:00"]\nbanana = 1\n'
    )
    with pytest.raises(SettingsError) as caught:
        run("--config", str(config), "--threads", "-1", environment={"FEDFMSL_STEP_SECONDS": "soon"})
    told = {
        f"{config}:1: run = 'or/chard'": "unusable",
        f"{config}:3: 'memmory' is not a setting": "did you mean 'memory'?",
        f"{config}:4: engine = 'fast'": "'auto', 'step-graph' or 'ort-training'",
        f"{config}:5: cache = 'much'": "512MB",
        f"{config}:6: max_load = 3.5": "less than or equal to 1",
        f"{config}:7: hours = ['26:00']": "22:00-06:00",
        f"{config}:8: 'banana' is not a setting": "the settings are",
        "--images is missing": f"FEDFMSL_IMAGES, or images in {config}",
        "--threads '-1'": "greater than or equal to 0",
        "FEDFMSL_STEP_SECONDS 'soon'": "number",
    }
    lines = caught.value.lines
    for place, what in told.items():
        assert [line for line in lines if line.startswith(place) and what in line], (place, lines)
    assert len(lines) == len(told)
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize("text", ["run = orchard", "run =", '[run]\nx = """'])
def test_what_is_no_toml_is_said_with_its_line(written: Callable[[str], Path], text: str) -> None:
    with pytest.raises(ConfigError, match=r"device\.toml is not TOML: .*(line \d|end of document)"):
        run("--config", str(written(text)))


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.toml").write_bytes(b"\xff\xd8\xff")
    for name in ("nowhere.toml", "picture.toml"):
        with pytest.raises(ConfigError, match=rf"{name} cannot be read"):
            run("--config", str(tmp_path / name))


def test_keys_and_passwords_are_not_shown(written: Callable[[str], Path]) -> None:
    with pytest.raises(SettingsError) as caught:
        run("--config", str(written(NEEDED + 'state = """-----BEGIN PRIVATE KEY-----\nhush"""\nthreads = -1\n')))
    assert "hush" not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        run("--config", str(written(NEEDED + 'broker = "mqttz://kitchen:hush@fleet.example"\n')))
    assert "mqttz" in str(caught.value) and "hush" not in str(caught.value)
