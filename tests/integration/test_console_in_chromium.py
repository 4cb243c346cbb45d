"""The operator's console in Chromium: beside a real server, broker and devices, and with stored runs."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from support.browser import Chromium, accessibility_faults, chromium
from support.bundles import Built
from support.processes import Broker, Federation, Process, Processes, answers, free_port, run_module, wait_until
from support.provisioned_fleet import write_identity
from support.stored_runs import stored_run

from devices.provisioning.authority import CLIENT, SERVER, make_authority
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.transport.identity import client_context
from trainer_server.console.process import serve
from trainer_server.service.console_job import ConsoleJob
from trainer_server.storage.run_store import RunStore

if TYPE_CHECKING:
    from playwright.sync_api import Page

HOSTILE = "<script>document.title = 'stolen'</script>"
RIGHT_TO_LEFT = "\u202egnihtyna\u202c \u05e9\u05dc\u05d5\u05dd"
LOST = "ERR_"  # how Chromium's console names a broken connection
EXCLUDED = "device-2"
ROUNDS = ("--stage1-rounds", "3", "--stage2-rounds", "2", "--audit")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with chromium() as started:
        yield started


def kill_console(server: Process) -> None:
    children = psutil.Process(server.pid).children()
    (console,) = (child for child in children if "trainer_server.console.process" in child.cmdline())
    console.kill()


def confirm(page: Page) -> None:
    page.click("button:has-text('Confirm')")


def test_an_operator_watches_a_whole_run_and_excludes_a_device(
    bundle: Path,
    photos: dict[str, Path],
    tmp_path: Path,
    broker: Broker,
    browser: Chromium,
    pytestconfig: pytest.Config,
) -> None:
    browser.problems.clear()
    address = f"127.0.0.1:{free_port()}"
    with Processes(tmp_path / "logs") as processes:
        federation = Federation("watched", broker, bundle, photos, tmp_path, processes)
        server = federation.start_server(*ROUNDS, "--devices", "2", "--console", address)
        wait_until(lambda: answers(int(address.split(":")[1])), "the console")
        page = browser.open(f"http://{address}/")
        page.click("text=Pause the run")
        confirm(page)
        page.wait_for_selector("h1:has-text('paused')")
        for name in photos:  # only now: no round closes before the exclusion, however slow the machine is
            federation.start_device(name, "--bundle", str(bundle))

        # the console's process dies and the server lives; the page follows the next process
        kill_console(server)
        page.wait_for_selector("#stream:visible")
        page.wait_for_selector("#stream", state="hidden")

        page.click("nav >> text=Devices")
        page.click(f"tr:has-text('{EXCLUDED}') >> text=Exclude")
        confirm(page)
        page.wait_for_selector(f"tr:has-text('{EXCLUDED}') >> text=by the operator")
        page.click("nav >> text=Overview")
        page.fill("#seconds", "450")
        page.click("text=Change the deadline")
        confirm(page)
        page.click("text=Resume the run")
        confirm(page)
        page.wait_for_selector("#facts:has-text('of 450 s')")
        page.wait_for_selector("#head:has-text('the run is resumed')")

        # from here on the page is not loaded again
        page.evaluate("window.stays = true")
        page.wait_for_selector("#chart-accuracy .u-legend")
        page.wait_for_selector("h1:has-text('finished')")
        page.wait_for_selector("#facts:has-text('Own test accuracy')")
        assert page.evaluate("window.stays")
        if screenshots := pytestconfig.getoption("--screenshots"):
            page.screenshot(path=Path(screenshots) / "console.png", full_page=True)
        assert accessibility_faults(page) == []
        assert server.wait().code == 0
    rounds = RunStore(federation.server_folder).rounds.all()
    assert {name for closed in rounds for name in closed.updates} == {*photos} - {EXCLUDED}
    log = (federation.server_folder / "notes.log").read_text()
    assert [line.split(": ", 1)[1] for line in log.splitlines() if "operator at 127.0.0.1" in line] == [
        "the run is paused; no round opens or closes until it is resumed",
        f"{EXCLUDED} is excluded from this run; its updates are refused",
        "the round deadline is 450 s from now on, it was 600 s",
        "the run is resumed",
    ]
    replayed = run_module("trainer_server", "replay", "--out", str(federation.server_folder))
    assert (replayed.code, replayed.stderr) == (0, "")
    assert [problem for problem in browser.problems if LOST not in problem] == []


def test_hostile_texts_a_thousand_devices_and_every_page_for_everyone(
    vit: Built, tmp_path: Path, browser: Chromium
) -> None:
    browser.problems.clear()
    text = f"{HOSTILE}{RIGHT_TO_LEFT}{'x' * 10_000}"
    folder = stored_run(tmp_path / "shops", vit, devices=1000, rounds=30, ended="finished", board=text)
    task = Task(vit.bundle.sha256, (HOSTILE, "\u05e9\u05dc\u05d5\u05dd", "x" * 200))
    store = RunStore(folder)
    store.reset(store.origin.config, TaskBundle(vit.bundle, task))
    (folder / "notes.log").write_text(f"refused: {text}\n", encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    with serve(ConsoleJob(address, str(folder))):
        page = browser.open(f"http://{address}/", dark=True, width=390)
        page.wait_for_selector("#chart-accuracy .u-legend")
        page.click("summary")
        assert page.locator(f"bdi:text-is({json.dumps(HOSTILE)})").count() == 1
        for name in ("Overview", "Devices", "Rounds", "Log"):
            page.click(f"nav >> text={name}")
            assert accessibility_faults(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
            assert "stolen" not in page.title()
        page.click("nav >> text=Devices")
        assert page.locator("tbody tr").count() == 100
        page.fill("#search", "device-0777")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=1 rows")
    assert browser.problems == []


def test_from_other_machines_only_the_token_opens_the_console(vit: Built, tmp_path: Path, browser: Chromium) -> None:
    browser.problems.clear()
    folder = stored_run(tmp_path / "shops", vit, devices=12, rounds=20)
    ours = make_authority("ours")
    server = write_identity(tmp_path / "server.pem", ours.issue("server", [SERVER], ["localhost"]), ours)
    device = write_identity(tmp_path / "device.pem", ours.issue("device", [CLIENT]), ours)
    port = free_port()
    with serve(ConsoleJob(f"0.0.0.0:{port}", str(folder), str(server))):
        connection = http.client.HTTPSConnection("localhost", port, context=client_context(device), timeout=10)
        for path in ("/", "/runs/x/devices", "/runs/x/action"):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 401
        page = browser.open(f"https://localhost:{port}/", ignore_https_errors=True)
        page.fill("#token", "not the token")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=This is not the token")
        assert accessibility_faults(page) == []
        page.fill("#token", (folder / "console.token").read_text())
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:has-text('shops')")
        page.click("text=Sign out")
        page.wait_for_selector("#token")
    assert [problem for problem in browser.problems if "403" not in problem] == []
