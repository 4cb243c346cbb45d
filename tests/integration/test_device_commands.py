"""The commands of a device with a settings file: check, run, status, predict and personalize."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.processes import (
    SECONDS,
    Broker,
    Ended,
    Federation,
    Observer,
    Process,
    Processes,
    free_port,
    run_module,
    wait_until,
)
from support.samples import CLASSES

from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Activity, DeviceStatus, Health, Prediction, Round, ServerStatus, Stage, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received

DEVICE, ANNOUNCED = "device-0", "announced"


@dataclass(frozen=True)
class Device:
    """`config` is its settings file."""

    config: Path
    inbox: Path
    state: Path
    metrics: int
    federation: Federation
    observer: Observer

    def ask(self, command: str, *arguments: str) -> Ended:
        return run_module("edge_runtime", command, "--config", str(self.config), *arguments)

    def a_photo(self) -> Path:
        return min((self.config.parent / "photos" / "kiwi").iterdir())

    def start(self, name: str = DEVICE) -> Process:
        return self.federation.processes.start_module(name, "edge_runtime", "run", "--config", str(self.config))


@pytest.fixture
def device(broker: Broker, bundle: Path, photos: dict[str, Path], tmp_path: Path) -> Iterator[Device]:
    port, inbox, state = free_port(), tmp_path / "inbox", tmp_path / "state"
    inbox.mkdir()
    images = shutil.copytree(photos[DEVICE], tmp_path / "photos")
    (images / "apple" / "torn.jpg").write_bytes(b"\xff\xd8 torn")
    config, run = tmp_path / "device.toml", f"in-use-{port}"  # a new run in each folder, on a common broker
    config.write_text(
        f'run = "{run}"\ndevice = "{DEVICE}"\nbroker = "{broker.url}"\nimages = "photos"\nstate = "state"\n'
        f'bundle = "{bundle}"\nthreads = 1\nwatch = "inbox"\nmetrics = "127.0.0.1:{port}"\nlog = "json"\n'
        'log_file = "log/device.log"\n'
    )
    with Processes(tmp_path / "logs") as processes, Observer(broker, run) as observer:
        federation = Federation(run, broker, bundle, {DEVICE: images}, tmp_path, processes)
        yield Device(config, inbox, state, port, federation, observer)


def test_check_run_status_and_predictions_during_a_run_and_after_it(device: Device) -> None:
    before = device.ask("check")
    assert before.code == 0, before.stdout
    for finding in ("ok     broker", "note   server", "ok     bundle", "ok     samples", "torn.jpg", "ok     memory"):
        assert finding in before.stdout
    assert not device.state.exists()
    device.ask("status").assert_error(8, "no daemon has used --state")

    server = device.federation.start_server("--stage1-rounds", "3", "--stage2-rounds", "2")
    daemon = device.start()
    device.observer.wait(Round, lambda r: r.stage is Stage.GLOBAL, "stage 1")
    device.start("second").wait().assert_error(2, "is in use by another process", "--state")
    status = device.ask("status")
    assert status.code == 0, status.stderr
    assert DEVICE in status.stdout and "torn.jpg: not a readable image" in status.stdout
    assert "the daemon runs" in device.ask("check").stdout

    device.observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end of the run")
    assert server.wait().code == 0
    shutil.copyfile(device.a_photo(), device.inbox / "late.jpg")
    seen = device.observer.wait(Prediction, lambda p: "late.jpg" in p.file, "a prediction of the final model")
    assert seen.device == DEVICE and seen.label in (*CLASSES, "unknown")
    assert sum(seen.probabilities.values()) == pytest.approx(1, abs=1e-4)
    assert daemon.running
    health = device.observer.wait(Health, lambda h: h.rounds_done > 5, "its health")
    metrics = metrics_of(device.metrics)
    assert metrics["fedfmsl_samples", "train"] == health.train
    assert metrics["fedfmsl_samples", "skipped"] == 1

    daemon.end()
    assert daemon.wait().code == 128 + 15
    device.observer.wait(DeviceStatus, lambda s: not s.online, "its offline status")
    assert device.observer.wait(Health, lambda h: h.activity is Activity.STOPPED, "its last health")
    device.ask("status").assert_error(8, "the daemon stopped")
    lines = [json.loads(line) for line in daemon.stdout.splitlines()]
    assert {"round", "stage", "seconds"} <= {key for line in lines for key in line}
    assert (device.config.parent / "log/device.log").read_text().splitlines() == daemon.stdout.splitlines()


def metrics_of(port: int) -> dict[tuple[str, str], float]:
    """Values by name and first label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {(s.name, next(iter(s.labels.values()), "")): s.value for family in families for s in family.samples}


def test_a_killed_device_has_a_model_of_its_last_round(device: Device) -> None:
    device.federation.start_server("--stage1-rounds", "2", "--stage2-rounds", "1")
    daemon = device.start()
    device.observer.wait(Round, lambda r: r.stage is Stage.GLOBAL and r.index == 1, "a second round of stage 1")
    wait_until((device.state / "mixture").is_file, "its model")
    daemon.kill()
    made = run_module(
        "edge_runtime", "personalize", "--state", str(device.state), "--bundle", str(device.federation.bundle)
    )
    assert made.code == 0, made.stderr
    model = str(device.state / "personalized.onnx")
    predicted = run_module("edge_runtime", "predict", "--model", model, str(device.a_photo()))
    assert predicted.code == 0 and any(name in predicted.stdout for name in (*CLASSES, "unknown"))


def test_a_device_with_a_downloaded_bundle_is_announced_to_home_assistant(device: Device, broker: Broker) -> None:
    text = device.config.read_text()
    device.config.write_text("".join(line for line in text.splitlines(True) if not line.startswith("bundle")))
    home = Link(broker.url, "home-assistant")
    home.connect()
    home.subscribe(f"homeassistant/device/{device.federation.run}/#")
    device.federation.start_server(
        "--serve", f"127.0.0.1:{free_port()}", "--stage1-rounds", "1", "--stage2-rounds", "1"
    )
    daemon = device.start()
    events = iter(lambda: home.next_event(SECONDS), None)
    messages = (event for event in events if isinstance(event, Received))
    discovery = next(event for event in messages if event.topic.startswith("homeassistant/"))  # amqtt sends others, too
    home.close()
    assert json.loads(discovery.payload)["device"]["name"] == DEVICE
    device.observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end of the run")
    assert daemon.running


def test_onnx_runtime_writes_no_telemetry(device: Device, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = """\
import sys
from pathlib import Path
from edge_runtime.engines.sessions import open_session
from fedfmsl.protocol.bundle import Bundle
open_session(Bundle.load(Path(sys.argv[1])), 'gate-predict.onnx', 1)
"""
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = [sys.executable, "-c", code, str(device.federation.bundle)]
    subprocess.run(command, env=environment, check=True, timeout=SECONDS)
    assert list(home.rglob("*")) == []


@pytest.fixture(scope="module")
def announced_run(broker: Broker, bundle: Path) -> None:
    """The retained status of a server: without one, `check` waits for ten seconds."""
    status = ServerStatus(online=True, run=ANNOUNCED, session="s", bundle=Bundle.load(bundle).sha256)
    link = Link(broker.url, "announcing-server")
    link.connect()
    sent = link.publish(Topics(ANNOUNCED).server_status, encode(status), retain=True)
    sent.wait_for_publish(SECONDS)
    link.close()


@pytest.mark.parametrize(
    ("change", "code", "parts"),
    [
        ({"images": "nowhere"}, 3, ["error  samples", "nowhere does not exist", "waiting up to 10 s for the server"]),
        ({"images": __file__}, 3, ["error  samples", "is a file; pass its folder"]),
        ({"broker": "mqtt://127.0.0.1:9"}, 6, ["error  broker", "no MQTT broker at 127.0.0.1:9"]),
        ({"max_temperature": "75", "thermal_zones": "none"}, 2, ["error  governor", "no thermal zone can be read"]),
        ({"watch": "nowhere"}, 3, ["error  watch", "nowhere does not exist; create or mount it"]),
        ({"memory": "1MB"}, 2, ["error  memory", "more than the budget of 1MB"]),
        ({"identity": "nowhere.pem"}, 2, ["error  identity", "not readable"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.usefixtures("announced_run")
def test_check_names_what_is_wrong_and_continues(
    device: Device, change: dict[str, str], code: int, parts: list[str]
) -> None:
    options = {"run": ANNOUNCED, **change}
    flags = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", value)]
    ended = device.ask("check", *flags)
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ended.code == code, ended.stdout
    for part in parts:
        assert part in ended.stdout
    assert "governor" in ended.stdout  # a later check, which runs although an earlier one failed
