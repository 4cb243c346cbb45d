"""Faults of a fleet with the kit's broker: a certificate is revoked in mid-run, the bundle's HTTPS process dies."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
from support.bundles import Built
from support.fault_records import Row
from support.processes import RUN_SECONDS, Broker, Federation, Processes, answers, free_port, wait_until
from support.provisioned_fleet import HOSTS, provision, start_fleet
from support.real_run import RUN, VICTIM, Shape, settings_of
from support.recovery import strike_each
from support.run_oracle import examine, reference
from support.simulation import ROUND_TIMEOUT, ROUNDS_PER_FAULT
from support.tools import require_tool

from edge_runtime.daemon.download import fetch_bundle
from fedfmsl.errors import BrokerError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import ServerStatus
from fedfmsl.transport.link import Link
from trainer_server.service.bundle_http import BundleServer

RESTART_SECONDS = 1.0
DOWNLOAD_SECONDS = 0.5  # the process dies within this time after a download has started


@pytest.fixture(autouse=True)
def long_form_only(full: bool) -> None:
    if not full:
        pytest.skip("in the long form only (--full); see test_security.py and test_bundle_download.py")
    require_tool("mosquitto")


def test_a_revoked_member_is_out_and_the_run_goes_on(
    vit: Built, device_photos: dict[str, Path], processes: Processes, tmp_path: Path, row: Row, times: int
) -> None:
    """A member that is connected and takes no part in the run is revoked, which needs a restart of the broker."""
    row.name = "member's certificate revoked and broker restarted, mutual TLS, mosquitto"
    pki, members = tmp_path / "pki", [f"member-{number}" for number in range(times)]
    provision(pki, *HOSTS, *device_photos, *members)
    identities = [Path(shutil.copy(pki / "devices" / f"{name}.toml", tmp_path)) for name in members]
    revoked = pki / "broker" / "revoked.crl"
    lists = [revoked.read_bytes()]
    for name in members:
        provision(pki, "--revoke", name)
        lists.append(revoked.read_bytes())
    revoked.write_bytes(lists[0])
    fleet = start_fleet(pki, processes)
    brokers = [processes.started["mosquitto"]]

    def connect(number: int) -> None:
        link = Link(fleet.url, members[number], identity=identities[number])
        link.connect()
        link.close()

    def revoke(number: int) -> None:
        revoked.write_bytes(lists[number + 1])
        brokers[-1].end()
        brokers.append(processes.start(f"mosquitto-{number}", require_tool("mosquitto"), "-c", str(pki / "test.conf")))
        wait_until(lambda: answers(fleet.port), "the restarted broker")
        with pytest.raises(BrokerError, match="our certificate is revoked"):
            connect(number)

    federation = Federation(RUN, Broker("mosquitto", fleet.url), vit.bundle.root, device_photos, tmp_path, processes)
    settings = settings_of(Shape(stage1=times * ROUNDS_PER_FAULT, stage2=1))
    federation.start_server(*settings, "--round-timeout", str(ROUND_TIMEOUT), "--identity", str(fleet.server))
    for name in device_photos:
        federation.start_device(
            name, "--bundle", str(federation.bundle), "--identity", str(fleet.device(name)), again=False
        )
    strike_each(federation.server_folder, row, times, revoke, before=connect)
    for process in (processes.started["server"], *federation.devices.values()):
        ended = process.wait(RUN_SECONDS)
        assert ended.code == 0, (process.log.name, ended.stderr[-2000:])
    row.add(examine(federation.server_folder, (), reference(federation.server_folder)))


def test_a_download_goes_on_when_the_bundles_process_dies(wide: Path, tmp_path: Path, row: Row, times: int) -> None:
    """It recovers when a download that began after the fault is finished."""
    row.name = f"bundle's HTTPS process SIGKILL during a download, started again after {RESTART_SECONDS:.0f} s"
    pki, draw = tmp_path / "pki", random.Random(0)
    provision(pki, *HOSTS, VICTIM)
    identity = pki / "devices" / f"{VICTIM}.toml"
    server = BundleServer(wide, f"localhost:{free_port()}", pki / "server.pem", restart_seconds=RESTART_SECONDS)
    status = ServerStatus(online=True, run=RUN, session="s", bundle=Bundle.load(wide).sha256, bundle_url=server.url)
    struck = 0.0

    def kill() -> None:
        nonlocal struck
        os.kill(server.pid, signal.SIGKILL)
        struck = time.monotonic()

    def download() -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            fetch_bundle(status, Path(folder), identity).verify()

    try:
        for _ in range(times):
            wait_until(lambda: is_alive(server.pid), "the bundle's process")
            timer = threading.Timer(draw.uniform(0.0, DOWNLOAD_SECONDS), kill)
            timer.start()
            while timer.is_alive():
                download()
            download()
            row.seconds.append(time.monotonic() - struck)
    finally:
        server.close()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return ") Z " not in Path(f"/proc/{process}/stat").read_text()
