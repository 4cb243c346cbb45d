"""The compose file and the Dockerfile, as data: there is no Docker here that would run them."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from setuptools import find_packages

from devices.provisioning.compose import compose_yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "devices" / "Dockerfile").read_text()


def compose(host: str = "fleet.example", run: str | None = "orchard", folder: str = "/srv/my kit") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(compose_yaml(Path(folder), host, run, Path("/src")))["services"]
    return loaded


def test_the_broker_finds_its_kit_where_its_configuration_says() -> None:
    broker = compose()["broker"]
    assert broker["command"] == ["mosquitto", "-c", "/srv/my kit/mosquitto.conf"]
    assert broker["volumes"] == [{"type": "bind", "source": ".", "target": "/srv/my kit"}]


def test_the_server_is_reached_by_the_name_that_its_certificate_is_of() -> None:
    services = compose()
    assert services["broker"]["hostname"] == "fleet.example"
    assert services["broker"]["ports"] == ["8883:8883", "8443:8443"]
    assert services["server"]["network_mode"] == "service:broker"
    command = services["server"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--broker"] == "mqtts://fleet.example"
    assert options["--serve"] == "fleet.example:8443"
    assert {volume["target"] for volume in services["server"]["volumes"]} == {
        options[name] for name in ("--bundle", "--out", "--identity")
    }


def test_an_address_is_the_machines_own() -> None:
    services = compose(host="2001:db8::1")
    assert {service["network_mode"] for service in services.values()} == {"host"}
    assert "mqtts://[2001:db8::1]" in services["server"]["command"]


@pytest.mark.parametrize(("run", "meant"), [("orchard", "${RUN:-orchard}"), (None, "${RUN:?name of the run}")])
def test_the_run_is_the_fleets_or_asked_for(run: str | None, meant: str) -> None:
    assert compose(run=run)["server"]["command"][2] == meant


def test_a_dollar_in_a_path_is_no_variable() -> None:
    assert compose(folder="/srv/$kit")["broker"]["command"][2] == "/srv/$$kit/mosquitto.conf"


def test_compose_builds_what_the_dockerfile_has() -> None:
    build = compose()["server"]["build"]
    assert (ROOT / build["dockerfile"]).is_file()
    assert re.search(rf"^FROM base AS {build['target']}$", DOCKERFILE, re.MULTILINE)


def test_the_dockerfile_copies_all_that_the_wheel_is_made_of_and_nothing_else() -> None:
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY")]
    packages = {name for name in find_packages(str(ROOT), include=["*"]) if "." not in name}
    assert {name for names in copied for name in names} == {
        *(packages - {"benchmarks", "tests"}),
        *("pyproject.toml", "README.md", "LICENSE"),
    }


def test_what_the_images_start_is_there() -> None:
    started = re.findall(r'(?:ENTRYPOINT|CMD) \["python", "-m", "(\w+)"', DOCKERFILE)
    assert set(started) == {"edge_runtime", "trainer_server"}
    for module in started:
        import_module(f"{module}.__main__")


def test_nobody_is_root_in_the_end() -> None:
    for stage in DOCKERFILE.split("\nFROM ")[1:]:
        if "ENTRYPOINT" in stage:
            assert "\nUSER fedfmsl\n" in stage
