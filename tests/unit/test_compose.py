"""The compose file and the Dockerfile, checked as data without Docker."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from setuptools import find_packages

from devices.provisioning.compose import compose_yaml
from trainer_server.service.bundle_http import revocation_list_beside

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "devices" / "Dockerfile").read_text()


def compose(host: str = "fleet.example", run: str | None = "orchard", folder: str = "/srv/my kit") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(compose_yaml(Path(folder), host, run, Path("/src")))["services"]
    return loaded


def test_the_kit_is_mounted_at_the_path_in_the_brokers_configuration() -> None:
    broker = compose()["broker"]
    assert broker["command"] == ["mosquitto", "-c", "/srv/my kit/mosquitto.conf"]
    assert broker["volumes"] == [{"type": "bind", "source": ".", "target": "/srv/my kit"}]


def test_clients_reach_the_server_by_the_name_in_its_certificate() -> None:
    services = compose()
    assert services["broker"]["networks"] == {"default": {"aliases": ["fleet.example"]}}
    assert services["broker"]["ports"] == ["8883:8883"]
    assert services["server"]["ports"] == ["8443:8443"]
    command = services["server"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--broker"] == "mqtts://fleet.example"
    assert options["--serve"] == "fleet.example:8443"
    targets = {volume["target"] for volume in services["server"]["volumes"]}
    assert targets == {options["--bundle"], options["--out"], options["--identity"], "/run/revoked.crl"}


def test_the_server_finds_the_revocation_list_beside_its_identity(tmp_path: Path) -> None:
    mounted = {volume["target"]: volume["source"] for volume in compose()["server"]["volumes"]}
    assert mounted["/run/server.pem"] == "../server.pem"
    assert mounted["/run/revoked.crl"] == "./revoked.crl"  # and not the folder, which holds the broker's key
    (tmp_path / "revoked.crl").touch()
    assert revocation_list_beside(tmp_path / "server.pem") == tmp_path / "revoked.crl"


def test_the_server_keeps_its_network_when_the_broker_restarts() -> None:
    """A container that uses another one's network loses it when that one restarts."""
    for host in ("fleet.example", "2001:db8::1"):
        assert "service:" not in compose(host=host)["server"].get("network_mode", "")


def test_with_an_address_both_use_the_machines_network() -> None:
    services = compose(host="2001:db8::1")
    assert {service["network_mode"] for service in services.values()} == {"host"}
    assert "mqtts://[2001:db8::1]" in services["server"]["command"]


@pytest.mark.parametrize(("run", "meant"), [("orchard", "${RUN:-orchard}"), (None, "${RUN:?name of the run}")])
def test_the_run_is_the_fleets_or_a_required_variable(run: str | None, meant: str) -> None:
    assert compose(run=run)["server"]["command"][2] == meant


def test_a_dollar_in_a_path_is_escaped() -> None:
    assert compose(folder="/srv/$kit")["broker"]["command"][2] == "/srv/$$kit/mosquitto.conf"


def test_compose_builds_a_target_of_the_dockerfile() -> None:
    build = compose()["server"]["build"]
    assert (ROOT / build["dockerfile"]).is_file()
    assert re.search(rf"^FROM base AS {build['target']}$", DOCKERFILE, re.MULTILINE)


def test_the_dockerfile_copies_exactly_the_sources_of_the_wheel() -> None:
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY")]
    packages = {name for name in find_packages(str(ROOT), include=["*"]) if "." not in name}
    assert {name for names in copied for name in names} == {
        *(packages - {"benchmarks", "tests"}),
        *("pyproject.toml", "README.md", "LICENSE"),
    }


def test_the_build_context_holds_only_what_the_images_need() -> None:
    """A checkout may also hold environments, data sets and the keys of a fleet."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY")]
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == {name for names in copied for name in names}


def test_the_images_start_existing_modules() -> None:
    started = re.findall(r'(?:ENTRYPOINT|CMD) \["python", "-m", "(\w+)"', DOCKERFILE)
    assert set(started) == {"edge_runtime", "trainer_server"}
    for module in started:
        import_module(f"{module}.__main__")


def test_no_image_runs_as_root() -> None:
    for stage in DOCKERFILE.split("\nFROM ")[1:]:
        if "ENTRYPOINT" in stage:
            assert "\nUSER fedfmsl\n" in stage
