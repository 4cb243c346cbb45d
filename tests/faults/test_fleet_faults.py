"""Faults of a fleet with the kit's broker: a certificate is revoked in mid-run, the bundle's HTTPS process dies."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from support.fault_records import Row
from support.processes import Broker, Federation, Processes, free_port, wait_until
from support.provisioned_fleet import HOSTS, provision, start_fleet
from support.real_run import OTHERS, RUN, VICTIM, Shape, settings_of
from support.recovery import strike_each
from support.run_oracle import examine, reference
from support.tools import require_tool

from edge_runtime.daemon.download import fetch_bundle
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import ServerStatus
from trainer_server.service.bundle_http import BundleServer
from trainer_server.storage.run_store import RunStore

ROUND_SECONDS = 8  # a round waits so long for the revoked device
RESTART_SECONDS = 1.0
DOWNLOAD_SECONDS = 0.5  # the process dies within this time after a download has started


@pytest.fixture(autouse=True)
def long_form_only(full: bool) -> None:
    if not full:
        pytest.skip(
            "in the long form only (--full); see tests/integration/test_security.py and test_bundle_download.py"
        )
    require_tool("mosquitto")


def test_after_a_device_is_revoked_the_others_go_on_and_a_new_identity_is_welcome(
    wide: Path, device_photos: dict[str, Path], processes: Processes, tmp_path: Path, row: Row, times: int
) -> None:
    row.name = f"device's certificate revoked and broker restarted, rounds of {ROUND_SECONDS} s, mosquitto"
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, *device_photos)
    fleet = start_fleet(pki, processes)
    brokers = [processes.started["mosquitto"]]
    federation = Federation(RUN, Broker("mosquitto", fleet.url), wide, device_photos, tmp_path, processes)
    settings = settings_of(Shape(stage1=times * 8, stage2=1))
    federation.start_server(*settings, "--identity", str(fleet.server), "--round-timeout", str(ROUND_SECONDS))

    def start(device: str) -> None:
        again = (federation.state(device) / "identity").exists()
        identity = ("--bundle", str(wide), "--identity", str(fleet.device(device)))
        federation.start_device(device, *identity, again=again)

    def revoke(number: int) -> None:
        if number:
            provision(pki, VICTIM)
            start(VICTIM)
        wait_until(lambda: VICTIM in RunStore(federation.server_folder).rounds()[-1].updates, "the victim takes part")
        provision(pki, "--revoke", VICTIM)

    def restart_the_broker(number: int) -> None:
        brokers[-1].end()
        brokers.append(processes.start(f"mosquitto-{number}", require_tool("mosquitto"), "-c", str(pki / "test.conf")))
        ended = federation.devices[VICTIM].wait()
        assert ended.code != 0
        assert "our certificate is revoked" in ended.stderr

    for name in device_photos:
        start(name)
    strike_each(federation.server_folder, row, times, restart_the_broker, before=revoke)
    for name, process in {
        "server": processes.started["server"],
        **{each: federation.devices[each] for each in OTHERS},
    }.items():
        ended = process.wait()
        assert ended.code == 0, (name, ended.stderr[-2000:])
    findings = examine(federation.server_folder, (), reference(federation.server_folder))
    row.add(findings, may_miss={VICTIM})


def test_a_download_goes_on_when_the_bundles_process_dies(wide: Path, tmp_path: Path, row: Row, times: int) -> None:
    """It recovers when the device has the whole bundle."""
    row.name = f"bundle's HTTPS process SIGKILL during a download, started again after {RESTART_SECONDS:.0f} s"
    pki, draw = tmp_path / "pki", random.Random(0)
    provision(pki, *HOSTS, VICTIM)
    server = BundleServer(wide, f"localhost:{free_port()}", pki / "server.pem", restart_seconds=RESTART_SECONDS)
    status = ServerStatus(online=True, run=RUN, session="s", bundle=Bundle.load(wide).sha256, bundle_url=server.url)
    try:
        for number in range(times):
            wait_until(lambda: is_alive(server.pid), "the bundle's process")
            timer = threading.Timer(draw.uniform(0.0, DOWNLOAD_SECONDS), os.kill, (server.pid, signal.SIGKILL))
            timer.start()
            folders = iter(range(1000))
            while timer.is_alive():  # one download after another, until it is hit
                began = time.monotonic()
                fetch_bundle(
                    status, tmp_path / f"{number}-{next(folders)}", pki / "devices" / f"{VICTIM}.toml"
                ).verify()
            row.seconds.append(time.monotonic() - began)
    finally:
        server.close()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return ") Z " not in Path(f"/proc/{process}/stat").read_text()
