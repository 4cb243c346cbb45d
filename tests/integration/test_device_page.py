"""The device's page in Chromium: a real daemon whose photos are labelled by keyboard, and hostile names and clients."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from support.browser import Chromium, accessibility_faults, chromium
from support.held_round import FIRST, HOLDER, hold_in_mid_round
from support.processes import Broker, Federation, Observer, Processes, answers, free_port, wait_until
from support.samples import write_device_photos

from edge_runtime.labelling.queue import Queue, version_of
from edge_runtime.page import service
from edge_runtime.page.views import Desk, routes
from edge_runtime.store import DeviceStore
from fedfmsl.protocol.messages import DeviceStatus, Prediction
from fedfmsl.transport.listening import listen
from fedfmsl.web.access import Access
from fedfmsl.web.application import application
from fedfmsl.web.serve import WebServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

WAITING, LABELLED = 12, 10
TEMPLATES = Path(service.__file__).parent / "templates"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with chromium() as started:
        yield started


def sign_in(browser: Chromium, url: str, token: str, **context: object) -> Page:
    page = browser.open(url, **context)
    page.get_by_label("Token").fill(token)
    page.keyboard.press("Enter")
    return page


def test_ten_photos_labelled_by_keyboard_join_the_next_round(
    broker: Broker,
    bundle: Path,
    photos: dict[str, Path],
    tmp_path: Path,
    browser: Chromium,
    pytestconfig: pytest.Config,
) -> None:
    folder = shutil.copytree(photos[FIRST], tmp_path / "photos")
    inbox, port = write_device_photos(tmp_path / "inbox", {"apple": 6, "kiwi": 6}, seed=9), free_port()
    two = {FIRST: folder, HOLDER: photos[HOLDER]}
    options = ["--bundle", str(bundle), "--watch", str(inbox), "--page", f"0.0.0.0:{port}", "--insecure"]
    with Processes(tmp_path / "logs") as processes, Observer(broker, "page") as observer:
        federation = Federation("page", broker, bundle, two, tmp_path, processes)
        federation.start_server("--stage1-rounds", "6", "--stage2-rounds", "2")
        federation.start_device(FIRST, *options)
        federation.start_device(HOLDER, "--bundle", str(bundle))
        begun = hold_in_mid_round(federation, observer)
        queue = Queue(DeviceStore(federation.state(FIRST)).questions)
        wait_until(lambda: queue.count() == WAITING and answers(port), f"{WAITING} questions and the page")

        url, token_file = f"http://127.0.0.1:{port}/", DeviceStore(federation.state(FIRST)).page_token
        page = sign_in(browser, url, "a wrong token of enough characters")
        assert page.get_by_role("alert").inner_text() == "This is not the token."
        assert page.request.get(f"{url}file/1/small.jpg").status == 401
        browser.problems.clear()  # the browser's own lines about the status codes
        page.get_by_label("Token").fill(token_file.read_text().strip())
        page.keyboard.press("Enter")
        page.get_by_role("heading", name=FIRST).wait_for()
        assert page.locator(".pictures img").count() == WAITING and not accessibility_faults(page)
        page.get_by_role("link", name="What is this?", exact=True).press("Enter")
        page.wait_for_url(f"{url}ask")  # with its script, which takes the keys
        assert not accessibility_faults(page)
        if pictures := pytestconfig.getoption("--screenshots"):
            page.screenshot(path=Path(pictures) / "labelling.png")
        for index in range(LABELLED):
            answer_one(page, "12"[index % 2], left=WAITING - index - 1)
        page.keyboard.press("u")
        wait_for_text(page, f"{WAITING - LABELLED + 1} waiting")
        assert len(list(inbox.rglob("*.jpg"))) == WAITING - LABELLED + 1
        answer_one(page, "2", left=WAITING - LABELLED)
        assert {name: len(list((folder / name).iterdir())) for name in ("apple", "kiwi")} == {"apple": 15, "kiwi": 15}
        page.context.close()
        assert not browser.problems

        federation.devices[HOLDER].resume()
        observer.wait(
            DeviceStatus,
            lambda status: status.device == FIRST and status.train + status.held_out + status.test == 20 + LABELLED,
            "the new photos in a scan",
        )
        wait_until(lambda: federation.rounds()[-1]["round"]["round"] > begun.round + 1, "two more rounds")
        samples = {line["round"]["round"]: line["updates"][FIRST]["samples"] for line in federation.rounds()}
        said = federation.devices[FIRST].stdout + federation.devices[FIRST].stderr
    assert samples[begun.round] == 12 < samples[begun.round + 2]
    assert f"the page of this device is http://{socket.gethostname()}:{port}/" in said and "Traceback" not in said


def wait_for_text(page: Page, text: str) -> None:
    """On a page whose script runs: without it, a key does nothing."""
    page.get_by_text(text).wait_for()
    page.wait_for_load_state()


def answer_one(page: Page, key: str, left: int) -> None:
    """Answers about the large photo alone; photos like it are unticked."""
    for box in page.get_by_role("checkbox").all()[1:]:
        box.press("Space")
    page.keyboard.press(key)
    wait_for_text(page, f"{left} waiting")


HOSTILE = ("<img src=x onerror=alert(1)>", '"><script>alert(2)', "ש" * 127, "\u202egnorw", "w" * 255)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """A device with hostile classes, and waiting photos of hostile names."""
    images, inbox, store = tmp_path / "images", tmp_path / "inbox", DeviceStore(tmp_path / "state")
    for folder in (images, inbox):
        folder.mkdir()
    store.ensure_name("kitchen")
    desk = service.open_desk(store, images, None, watched=True)
    desk.queue.describe(HOSTILE, "image")
    names = [*(os.fsencode(name[:100]) for name in HOSTILE), b"\xff\xfe"]
    for row, name in enumerate(names):
        path = inbox / os.fsdecode(name + b".jpg")
        Image.fromarray(np.full((30, 40, 3), 40 * row, np.uint8)).save(str(inbox / "x.jpg"))
        (inbox / "x.jpg").rename(path)
        shares = dict.fromkeys(HOSTILE, 0.2)
        said = Prediction(
            device="d", file="f", time=row, label=HOSTILE[0], confidence=0.2, probabilities=shares, round=1
        )
        version = version_of(path)
        assert version is not None
        desk.queue.put(path, version, said, np.eye(len(names), dtype=np.float32)[row])
    return desk


@pytest.fixture
def url(desk: Desk) -> Iterator[str]:
    listeners = listen("--page", "127.0.0.1", 0)
    access = Access("127.0.0.1", listeners[0].getsockname()[1], None, encrypted=False)
    with WebServer(application("kitchen", routes(desk), access, TEMPLATES), listeners) as server:
        yield server.url


def test_hostile_names_are_only_text_on_a_narrow_dark_page(desk: Desk, url: str, browser: Chromium) -> None:
    page = browser.open(url, dark=True, width=360)
    page.on("dialog", lambda dialog: browser.problems.append(f"dialog {dialog.message}"))
    for path in ("", "ask", "skipped"):
        page.goto(url + path)
        assert not accessibility_faults(page)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{path} is too wide"
    page.goto(f"{url}ask")
    assert page.locator("main script, main img[src=x]").count() == 0
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == HOSTILE[1]
    page.keyboard.press("Enter")
    wait_for_text(page, f"{len(HOSTILE)} waiting")
    assert len(list((desk.answers._destination.images / HOSTILE[1]).iterdir())) == 1  # a folder with the hostile name
    page.keyboard.press("Delete")
    wait_for_text(page, "4 waiting")
    page.keyboard.press("n")
    wait_for_text(page, "Last answer: not in the list")
    for waiting in (4, 5, 6):
        page.keyboard.press("u")
        wait_for_text(page, f"{waiting} waiting")
    page.context.close()
    assert not browser.problems


def test_a_text_is_shown_as_text(desk: Desk, url: str, browser: Chromium) -> None:
    desk.queue.describe(HOSTILE, "text")
    desk.asking.next(1)[0].files[0].path.write_bytes(b"<b>Ripe</b> plums \xff")
    page = browser.open(url)
    assert "<b>Ripe</b> plums \ufffd" in page.locator("blockquote").all_inner_texts()
    assert not page.locator("main img").count()
    page.context.close()


@pytest.mark.parametrize("path", ["file/1/../../../etc/passwd", "file/%2e%2e/small.jpg", "file/999/small.jpg", "x"])
def test_no_address_leads_to_another_file(path: str, url: str, browser: Chromium) -> None:
    context = browser.browser.new_context()
    assert context.request.get(url + path).status == 404
    assert context.request.post(f"{url}ask", form={"class": "0", "file-1": "on"}).status == 403  # no CSRF token
    context.close()


def test_a_question_is_shown_while_the_disk_of_the_samples_is_away(desk: Desk, url: str) -> None:
    desk.answers._destination.images.rmdir()
    answer = urlopen(f"{url}ask").read().decode()
    assert 'name="file-1"' in answer and str(desk.answers._destination.images) in answer
