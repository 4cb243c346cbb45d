"""Settings from flags, the environment and a TOML file: priority, values, errors, help and reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ByteSize
from support.bundles import Built
from typer.testing import CliRunner

from devices.provisioning.authority import CLIENT, make_authority
from devices.trial.__main__ import app as trial
from devices.trial.settings import TrialSettings
from edge_runtime.__main__ import app as edge
from edge_runtime.settings import PredictSettings, Settings, StateSettings
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.common.options import reference, with_settings
from fedfmsl.common.settings import SettingsError, SettingsModel, read_settings, type_of
from fedfmsl.errors import ConfigError
from fedfmsl.transport.identity import read_identity
from simulation.settings import SimulationSettings
from trainer_server.__main__ import app as server
from trainer_server.config import RunConfig, RunRules
from trainer_server.settings import ResumeSettings, ServerSettings

NEEDED = 'run = "orchard"\nimages = "photos"\n'


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "device.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def command_of(model: type[SettingsModel], file_model: type[SettingsModel] = Settings) -> typer.Typer:
    """A command that prints its settings and an option of its own."""
    app = typer.Typer()

    @app.command()
    @with_settings(model, file_model)
    def command(settings: SettingsModel, loud: bool = typer.Option(False, "--loud")) -> None:
        """A command."""
        print(json.dumps({**settings.model_dump(mode="json"), "loud": loud}))

    return app


def run(*arguments: str, model: type[SettingsModel] = Settings, environment: dict[str, str] | None = None) -> Any:
    file_model = ServerSettings if issubclass(model, ServerSettings) else Settings
    result = CliRunner().invoke(command_of(model, file_model), arguments, env=environment or {})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_a_flag_overrides_the_environment_and_that_the_file(written: Callable[[str], Path]) -> None:
    config = str(written(NEEDED + "threads = 1\nmemory = '1GB'\nstep_seconds = 3\n"))
    seen = run(
        *("--config", config, "--threads", "3"), environment={"FEDFMSL_THREADS": "2", "FEDFMSL_MEMORY": "512 MB"}
    )
    assert (seen["threads"], seen["memory"], seen["step_seconds"]) == (3, 512_000_000, 3.0)
    assert (seen["run"], seen["engine"], seen["loud"]) == ("orchard", "auto", False)


COMMANDS = [
    (edge, "run", Settings),
    (edge, "check", Settings),
    (edge, "status", StateSettings),
    (edge, "predict", PredictSettings),
    (server, "start", ServerSettings),
    (server, "resume", ResumeSettings),
    (trial, "", TrialSettings),
]


def help_of(app: typer.Typer, command: str) -> str:
    text = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "400", "TERM": "dumb"}).output
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("app", "command", "model"), COMMANDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_help_and_reference_show_every_setting_of_the_model(
    app: typer.Typer, command: str, model: type[SettingsModel]
) -> None:
    shown, page = help_of(app, command), reference(model)
    rows = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    assert set(rows) == set(model.model_fields)
    for key, field in model.model_fields.items():
        _, _, about = shown.partition(f"--{key.replace('_', '-')} ")
        about = about.partition(f"[env var: FEDFMSL_{key.upper()}]")[0]
        assert field.description and field.description in about, (key, about)
        assert field.description.replace("<", "&lt;") in rows[key]
        assert ("required" in rows[key]) == field.is_required()
        required = f"[env var: FEDFMSL_{key.upper()}] [required]" in shown
        assert required == field.is_required()


def test_help_and_reference_show_types_bounds_and_defaults() -> None:
    shown, page = help_of(server, "start"), reference(ServerSettings)
    for text in ("--trim <float>", "[default: 0.2] [≥ 0, < 0.5]", "--select <all|random|capable>", "--devices <int>"):
        assert text in shown
    assert "| `trim` | float ≥ 0, < 0.5 | `0.2` |" in page
    assert "| `select` | `all` or `random` or `capable` | `all` |" in page
    assert "--keep-free <size>" in help_of(edge, "run") and "[default: 500.0MB]" in help_of(edge, "run")


def test_a_server_setting_that_the_run_stores_is_declared_once() -> None:
    for key, field in RunRules.model_fields.items():
        assert ServerSettings.model_fields[key].default == RunConfig.model_fields[key].default == field.default
        assert ServerSettings.model_fields[key].metadata == RunConfig.model_fields[key].metadata == field.metadata


def test_the_default_settings_are_the_default_configuration_of_a_run(vit: Built) -> None:
    needed = {"run": "orchard", "bundle": "b", "devices": "2"}
    config = read_settings(ServerSettings, flags=needed, environment=False).run_config(vit.bundle)
    levels = vit.bundle.manifest.levels
    assert (config.stage1_sal, config.stage2_sal) == (
        Sal(CapabilityQueue(window=3, min_gain=0.02), levels),
        Sal(CapabilityQueue(window=2, min_gain=0.01), levels),
    )
    rules = {"stage1_sal": config.stage1_sal, "stage2_sal": config.stage2_sal}
    assert config == RunConfig(run="orchard", devices=2, **rules)
    with pytest.raises(ConfigError, match=f"--max-level 99 is more than {levels}, the highest level"):
        read_settings(ServerSettings, flags={**needed, "max_level": "99"}).run_config(vit.bundle)


def test_a_server_starts_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text('run = "orchard"\nbundle = "b"\ndevices = 3\ntrim = 0.2\nselect = "random"\nfraction = 0.5\n')
    seen = run("--config", str(config), "--stage2-rounds", "7", model=ServerSettings)
    assert (seen["bundle"], seen["trim"], seen["stage1_rounds"], seen["stage2_rounds"]) == (f"{tmp_path}/b", 0.2, 12, 7)
    assert read_settings(ServerSettings, config).folder == Path("runs/orchard/server")
    config.write_text('out = "there"\nbundle = "b"\nbroker = "mqtt://127.0.0.1"\n')
    assert read_settings(ResumeSettings, config, file_model=ServerSettings).out == tmp_path / "there"


def test_server_settings_that_do_not_fit_together_name_the_flags(tmp_path: Path) -> None:
    needed = {"run": "orchard", "bundle": "b", "devices": "2"}
    for more, what in (
        ({"min_updates": "3"}, "--min-updates 3 is more than --devices 2"),
        ({"fraction": "0.5"}, "--fraction 0.5 needs --select random"),
        ({"dp_noise": "1"}, "--dp-noise and --dp-clip need each other"),
        ({"revoked": "revoked.crl"}, "--revoked has no effect without --identity"),
        ({"console_token": "token"}, "--console-token has no effect without --console"),
        ({"classes": ""}, "--classes '' is empty; name the classes"),
        ({"task": ""}, "--task '' is empty; give a value, or leave it out"),
        ({"schedule": ""}, "--schedule '' is empty"),
        ({"schedule": "22:00-22:00"}, "--schedule '22:00-22:00' begins when it ends; write 00:00-24:00"),
        ({"serve": "0.0.0.0:8443"}, "devices cannot reach 0.0.0.0; give a name or an address of this machine"),
        ({"broker": "mqtt://localhost/a"}, "has a path, which only addresses of ws and wss have"),
        ({"dp_noise": "1", "dp_clip": "1"}, "choose --sal fixed-schedule"),
        ({"dp_noise": "1", "dp_clip": "1", "sal": "all-at-once", "clip": "1"}, "leave out --rule, --clip"),
    ):
        with pytest.raises(SettingsError, match=what):
            read_settings(ServerSettings, flags={**needed, **more}, environment=False)


@pytest.mark.parametrize("given", ["kitchen, balcony", "names.txt"])
def test_allowed_devices_are_names_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("kitchen\nbalcony\n")
    flags = {"run": "r", "devices": 2, "bundle": tmp_path, "allow": given}
    assert read_settings(ServerSettings, flags=flags).allowed == {"kitchen", "balcony"}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("a/b", "there is no such file"),
        ("devices.txt", "there is no such file"),
        ("kitchen,b?d", "device name 'b?d' is invalid"),
        ("", "device name '' is invalid"),
    ],
)
def test_allowed_devices_are_no_missing_file(given: str, why: str) -> None:
    flags = {"run": "r", "devices": 2, "bundle": "bundle", "allow": given}
    with pytest.raises(ConfigError, match=f"--allow {given!r}: {why}".replace("?", r"\?")):
        assert read_settings(ServerSettings, flags=flags).allowed


def test_the_config_file_may_be_named_by_the_environment(written: Callable[[str], Path]) -> None:
    assert run("--loud", environment={"FEDFMSL_CONFIG": str(written(NEEDED))})["loud"] is True


def test_paths_in_a_file_are_relative_to_its_folder_and_those_of_flags_to_the_working_directory(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    seen = run("--config", str(written(NEEDED + 'labels = "../labels.csv"\n')), "--bundle", "b")
    assert seen["images"] == str(tmp_path / "photos")
    assert seen["labels"] == str(tmp_path / "../labels.csv")
    assert seen["bundle"] == "b"


def test_lists_are_lists_in_a_file_and_comma_separated_elsewhere(written: Callable[[str], Path]) -> None:
    config = written(NEEDED + 'hours = ["22:00-06:00", "Sat 08:00-20:00"]\nthermal_zones = ["cpu-thermal"]\n')
    seen = run("--config", str(config), environment={"FEDFMSL_HOURS": "22:00-06:00, Sat 08:00-20:00"})
    assert run("--config", str(config)) == seen
    settings = read_settings(Settings, config)
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
    assert run("--config", config, model=PredictSettings)["run"] == "orchard"


def test_a_file_may_contain_the_text_of_an_identity(written: Callable[[str], Path]) -> None:
    authority = make_authority("fleet")
    issued = authority.issue("kitchen", [CLIENT])
    pem = issued.key_pem + issued.certificate_pem + authority.certificate_pem
    config = written(f'{NEEDED}identity = """\n{pem}"""\n')
    config.chmod(0o600)
    settings = read_settings(Settings, config)
    assert settings.identity == config
    assert read_identity(settings.identity).name == "kitchen"


def test_all_errors_are_reported_at_once_with_their_places(written: Callable[[str], Path]) -> None:
    config = written(
        'run = "or/chard"\n\nmemmory = "1GB"\nengine = "fast"\ncache = "much"\nmax_load = 3.5\n'
        'hours = ["26:00"]\nbanana = 1\n'
    )
    with pytest.raises(SettingsError) as caught:
        run("--config", str(config), "--threads", "-1", environment={"FEDFMSL_STEP_SECONDS": "soon"})
    expected = {
        f"{config}:1: run = 'or/chard'": "invalid",
        f"{config}:3: 'memmory' is not a setting": "did you mean 'memory'?",
        f"{config}:4: engine = 'fast'": "'auto', 'step-graph' or 'ort-training'",
        f"{config}:5: cache = 'much'": "512MB",
        f"{config}:6: max_load = 3.5": "is too large; it must be at most 1",
        f"{config}:7: hours = ['26:00']": "22:00-06:00",
        f"{config}:8: 'banana' is not a setting": "the settings are",
        "--images is missing": f"FEDFMSL_IMAGES, or images in {config}",
        "--threads '-1'": "is too small; it must be at least 0",
        "FEDFMSL_STEP_SECONDS 'soon'": "is not a number; write it like 0.5",
    }
    lines = caught.value.lines
    for place, what in expected.items():
        assert [line for line in lines if line.startswith(place) and what in line], (place, lines)
    assert len(lines) == len(expected)
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize("text", ["run = orchard", "run =", '[run]\nx = """'])
def test_invalid_toml_is_reported_with_its_line(written: Callable[[str], Path], text: str) -> None:
    with pytest.raises(ConfigError, match=r"device\.toml is not TOML: .*(line \d|end of document)"):
        run("--config", str(written(text)))


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture.toml").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "archive.toml").write_bytes(b"abc\0def")
    for name, what in (
        ("nowhere.toml", "does not exist; check the path"),
        ("picture.toml", "is not a TOML file; pass a text file"),
        ("archive.toml", "is not a TOML file; pass a text file"),
    ):
        with pytest.raises(ConfigError, match=rf"{name} {what}"):
            run("--config", str(tmp_path / name))


def test_a_repeated_key_is_named(written: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        run("--config", str(written('run = "a"\nstate = "b"\nrun = "c"\n')))
    assert str(caught.value).endswith("is not TOML: 'run' is set twice, again in line 3; remove one")


def test_a_value_of_another_type_in_a_file_is_an_error(written: Callable[[str], Path]) -> None:
    config = written(
        NEEDED + 'threads = true\nstep_seconds = "3"\nmains_only = 1\nmax_load = false\nengine = 2\nlabels = 4\n'
    )
    with pytest.raises(SettingsError) as caught:
        run("--config", str(config))
    assert caught.value.lines == (
        f"{config}:3: threads = true is not an integer; write it like 2",
        f"{config}:4: step_seconds = '3' is not a number; write it like 0.5",
        f"{config}:5: mains_only = 1 is neither true nor false; write one of them",
        f"{config}:6: max_load = false is not a number; write it like 0.5",
        f"{config}:7: engine = 2 is unknown; choose 'auto', 'step-graph' or 'ort-training'",
        f"{config}:8: labels = 4 is not a path; write it as a text in quotes",
    )
    config.write_text(NEEDED + "step_seconds = 3\n")
    assert run("--config", str(config), "--threads", "2", environment={"FEDFMSL_MAINS_ONLY": "yes"})["threads"] == 2


def test_errors_follow_the_lines_of_the_file_and_list_the_settings_once(written: Callable[[str], Path]) -> None:
    config = written(f'threads = "a"\nbanana = 1\nmax_load = 7\napplepie = 2\n{NEEDED}[mqtt]\nx = 1\n')
    with pytest.raises(SettingsError) as caught:
        run("--config", str(config), "--broker", "localhost:1")
    lines = caught.value.lines
    assert [line.removeprefix(f"{config}:")[0] for line in lines[:-1]] == ["1", "2", "3", "4", "7"]
    assert lines[-2].endswith("'mqtt' is not a setting; remove it")
    assert lines[-1].startswith("--broker 'localhost:1' is not of the form mqtt://host:port")
    assert sum("the settings are" in line for line in lines) == 1


def test_keys_and_passwords_are_not_shown(written: Callable[[str], Path]) -> None:
    with pytest.raises(SettingsError) as caught:
        run("--config", str(written(NEEDED + 'state = """-----BEGIN PRIVATE KEY-----\nhush"""\nthreads = -1\n')))
    assert "hush" not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        run("--config", str(written(NEEDED + 'broker = "mqttz://kitchen:hush@fleet.example"\n')))
    assert "mqttz" in str(caught.value) and "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (Settings, {"run": "r", "images": "."}),
        (ServerSettings, {"run": "r", "bundle": "b", "devices": "3"}),
        (ResumeSettings, {"out": "o"}),
        (TrialSettings, {}),
        (SimulationSettings, {"bundle": "b", "images": "."}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_no_setting_takes_a_number_without_bounds(model: type[SettingsModel], given: dict[str, str]) -> None:
    read_settings(model, flags=given, environment=False)
    for name, field in model.model_fields.items():
        if type_of(field)[0] in (int, float, ByteSize):
            for value in ("nan", "inf", "-inf", "1" + 30 * "0", "-1"):
                with pytest.raises(SettingsError, match=rf"--{name.replace('_', '-')} '{value}' is ") as caught:
                    read_settings(model, flags={**given, name: value}, environment=False)
                assert len(caught.value.lines) == 1
