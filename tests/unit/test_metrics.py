"""What Prometheus reads, over HTTP."""

from __future__ import annotations

import shutil
import socket
import subprocess
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.tools import NOT_TESTED

from edge_runtime.daemon.metrics import families
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.messages import Activity, Health
from fedfmsl.transport.metrics import serve_metrics

HEALTH = Health(
    device="kitchen",
    time=1_790_000_000.5,
    started=1_789_990_000.0,
    version="1.0",
    board='Raspberry Pi 5 "Model B"',
    activity=Activity.PAUSED,
    paused="81.5 °C, above --max-temperature 75",
    round=7,
    stage="global",
    level=3,
    level_cap=2,
    slowdown=1.6,
    temperature=81.5,
    on_battery=False,
    memory=300_000_000,
    train=40,
    skipped=2,
    rounds_done=6,
    epsilon=2.5,
)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def test_prometheus_reads_what_is_known_and_nothing_else(port: int) -> None:
    newest: list[Health | None] = [None]
    serve_metrics(f"127.0.0.1:{port}", lambda: families(newest[0]))
    assert list(text_string_to_metric_families(scraped(port))) == []
    newest[0] = HEALTH
    found = [sample for family in text_string_to_metric_families(scraped(port)) for sample in family.samples]
    assert all(sample.name.startswith("fedfmsl_") for sample in found)

    def value(name: str, **labels: str) -> float:
        (only,) = (sample.value for sample in found if (sample.name, sample.labels) == (f"fedfmsl_{name}", labels))
        return only

    assert value("info", device="kitchen", version="1.0", board='Raspberry Pi 5 "Model B"') == 1
    assert [what for what in Activity if value("activity", activity=what.value)] == [Activity.PAUSED]
    assert value("temperature_celsius") == 81.5
    assert value("on_battery") == 0
    assert value("samples", split="skipped") == 2
    assert value("rounds_total") == 6
    assert value("epsilon") == 2.5
    assert value("health_timestamp_seconds") == HEALTH.time
    assert not {"fedfmsl_metered", "fedfmsl_other_processes_cpu_ratio"} & {sample.name for sample in found}


@pytest.mark.skipif(shutil.which("promtool") is None, reason=f"{NOT_TESTED}promtool is not installed")
def test_promtool_finds_nothing_to_complain_of(port: int) -> None:
    everything = HEALTH.model_copy(update={"others": 0.25, "metered": True, "throttled": True})
    serve_metrics(f"127.0.0.1:{port}", lambda: families(everything))
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=scraped(port), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("address", ["9464", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:http", ":9464"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        serve_metrics(address, list)


def test_a_port_that_is_taken_is_refused_in_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(
            RunError, match=r"--metrics: cannot listen on .* \(the port is in use\); choose another address"
        ):
            serve_metrics(f"127.0.0.1:{other.getsockname()[1]}", list)


def test_others_hear_of_it_only_if_that_is_said(port: int) -> None:
    with pytest.raises(ConfigError, match=r"unencrypted; let it listen on 127\.0\.0\.1, or allow it with --insecure"):
        serve_metrics(f"0.0.0.0:{port}", lambda: families(HEALTH))
    serve_metrics(f"0.0.0.0:{port}", lambda: families(HEALTH), insecure=True)
    assert "fedfmsl_round 7.0" in scraped(port)
