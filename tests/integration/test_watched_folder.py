"""`edge_runtime predict` as a process: a watched folder, a device's newest model, a real broker."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.bundles import Built
from support.in_process_daemon import make_daemon
from support.personal_models import another_model, globals_of, keep, round_of
from support.processes import SECONDS, Broker, Processes, run_module, wait_until
from support.samples import CLASSES, write_photos

from edge_runtime.daemon.lock import locked
from edge_runtime.inference.watcher import NICENESS, Watcher
from edge_runtime.store import DeviceStore
from edge_runtime.training.model import save_personal_model
from edge_runtime.training.stored_model import read_personal_model
from fedfmsl.common.backoff import Backoff
from fedfmsl.protocol.messages import DeviceStatus, Message, Prediction, Stage, parse
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received

CONFIG, INPUT = 2, 3


@pytest.fixture
def store(vit: Built, tmp_path: Path) -> DeviceStore:
    """The store of a device after its first round, with a downloaded bundle."""
    device = make_daemon(vit, write_photos(tmp_path / "photos"), tmp_path / "state", "kitchen").device
    save_personal_model(device, round_of(Stage.GLOBAL), globals_of(vit))
    shutil.copytree(vit.bundle.root, device.store.bundles / vit.bundle.sha256)
    return device.store


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "inbox", per_class=2, seed=7)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "logs") as started:
        yield started


def arguments(store: DeviceStore, *more: str) -> list[str]:
    return ["predict", "--state", str(store.root), *more]


def photos_in(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*.jpg")}


def lines_of(output: str) -> list[Prediction]:
    """The predictions in complete lines. The last line may be incomplete."""
    return [parse(Prediction, line.encode()) for line in output.splitlines(keepends=True) if line.endswith("\n")]


def test_state_and_onnx_file_print_the_same_predictions(store: DeviceStore, inbox: Path, tmp_path: Path) -> None:
    result = run_module("edge_runtime", *arguments(store, str(inbox), "--json"))
    assert (result.code, result.stderr) == (0, "")
    out = tmp_path / "model.onnx"
    assert run_module("edge_runtime", "personalize", "--state", str(store.root), "--out", str(out)).code == 0
    from_file = run_module("edge_runtime", "predict", "--model", str(out), str(inbox), "--json")
    for one, other in zip(lines_of(result.stdout), lines_of(from_file.stdout), strict=True):
        assert (one.file, one.label, one.round, one.device) == (other.file, other.label, 3, "kitchen")
        assert tuple(one.probabilities) == CLASSES
        assert np.allclose(list(one.probabilities.values()), list(other.probabilities.values()), atol=1e-5)


def test_predictions_below_the_threshold_are_unknown(store: DeviceStore, inbox: Path) -> None:
    result = run_module("edge_runtime", *arguments(store, str(inbox), "--unknown", "1", "--top", "1"))
    lines = result.stdout.splitlines()
    assert len(lines) == len(photos_in(inbox))
    assert all(": unknown (" in line and line.count("%") == 1 for line in lines)


def test_watching_waits_for_a_model_and_uses_each_newer_one(
    vit: Built, store: DeviceStore, inbox: Path, processes: Processes
) -> None:
    model = read_personal_model(store)
    store.mixture.unlink()
    process = processes.start_module("predict", "edge_runtime", *arguments(store, "--watch", str(inbox), "--json"))
    wait_until(lambda: "no personalized model yet" in process.stderr or not process.running, "the notice")
    keep(store, model)
    before = photos_in(inbox)
    wait_until(
        lambda: len(lines_of(process.stdout)) == len(before) or not process.running, "predictions of the first photos"
    )
    keep(store, another_model(vit.bundle, model, round_=9, level=3))
    shutil.copy(next(iter(before)), inbox / "late.jpg")
    wait_until(
        lambda: len(lines_of(process.stdout)) > len(before) or not process.running, "the prediction of the late photo"
    )
    *first, late = lines_of(process.stdout)
    assert {prediction.file for prediction in first} == before
    assert {prediction.round for prediction in first} == {3}
    assert (late.file, late.round) == (str(inbox / "late.jpg"), 9)
    process.end()
    assert process.stderr.count("\n") == 1


def test_the_process_ends_when_its_output_is_closed(store: DeviceStore, inbox: Path) -> None:
    """For example because the daemon that started it was killed."""
    command = [sys.executable, "-m", "edge_runtime", *arguments(store, "--watch", str(inbox), "--json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        for _ in photos_in(inbox):
            json.loads(process.stdout.readline())
        process.stdout.close()
        assert process.wait(SECONDS) == 0
        assert process.stderr.read() == b""


def test_the_watcher_restarts_a_killed_process(store: DeviceStore, inbox: Path, tmp_path: Path) -> None:
    predictions: queue.Queue[Prediction] = queue.Queue()
    (bundle,) = store.bundles.iterdir()
    with Watcher(inbox, store.root, bundle, predictions.put, Backoff(first=0.01, longest=0.1)) as watcher:
        before = {predictions.get(timeout=SECONDS).file for _ in photos_in(inbox)}
        first = watcher.pid
        assert first is not None
        assert os.getpriority(os.PRIO_PROCESS, first) == NICENESS
        os.kill(first, signal.SIGKILL)
        after = {predictions.get(timeout=SECONDS).file for _ in photos_in(inbox)}
        last = watcher.pid
    assert before == after == photos_in(inbox)
    assert last is not None and last != first
    assert not is_child(last)
    assert predictions.empty()


def test_a_watcher_that_ends_at_once_leaves_no_process_and_no_thread(store: DeviceStore, inbox: Path) -> None:
    with Watcher(inbox, store.root, store.bundles, lambda prediction: None) as watcher:
        pass
    assert watcher.pid is None or not is_child(watcher.pid)
    assert "child" not in {thread.name for thread in threading.enumerate()}


def is_child(pid: int) -> bool:
    """Whether this process has a child `pid`, running or not waited for."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def receive(link: Link, topic: str, kind: type[Message]) -> Message:
    while True:
        event = link.next_event(SECONDS)
        assert event is not None, f"no message on {topic}"
        if isinstance(event, Received) and event.topic == topic and event.payload:
            return parse(kind, event.payload)


def test_predictions_are_published_with_a_discovery_message(
    store: DeviceStore, inbox: Path, broker: Broker, processes: Processes
) -> None:
    topics = Topics("stream")
    link = Link(broker.url, "reader")
    link.connect()
    config = f"homeassistant/device/{topics.run}/kitchen/config"
    for topic in (topics.prediction("kitchen"), topics.prediction_status("kitchen"), config):
        link.subscribe(topic)
    options = ["--watch", str(inbox), "--publish", "--run", topics.run, "--broker", broker.url]
    process = processes.start_module("predict", "edge_runtime", *arguments(store, *options))
    names = {Path(path).name for path in photos_in(inbox)}
    files, discovered, online = set(), False, False
    while len(files) < len(names) or not discovered or not online:
        event = link.next_event(SECONDS)
        assert event is not None, process.stderr
        if not isinstance(event, Received):
            continue
        if event.topic == config:
            payload = json.loads(event.payload)
            discovered = payload["components"]["class"]["options"] == [*CLASSES, "unknown"]
            assert payload["availability"][0]["topic"] == topics.prediction_status("kitchen")
        elif event.topic == topics.prediction_status("kitchen"):
            online = parse(DeviceStatus, event.payload).online
        elif event.topic == topics.prediction("kitchen"):  # amqtt sends messages of other clients' subscriptions, too
            files.add(parse(Prediction, event.payload).file)
    assert files == names
    process.kill()
    status = receive(link, topics.prediction_status("kitchen"), DeviceStatus)
    assert isinstance(status, DeviceStatus) and not status.online
    link.close()
    late = Link(broker.url, "late-reader")  # the last prediction is retained
    late.connect()
    late.subscribe(topics.prediction("kitchen"))
    last = receive(late, topics.prediction("kitchen"), Prediction)
    assert isinstance(last, Prediction) and last.file in files
    late.close()


@pytest.mark.parametrize(
    ("more", "text"), [((), "in use by another process"), (("--model", "model.onnx"), "the daemon of --state")]
)
def test_publishing_beside_a_daemon_is_refused(
    store: DeviceStore, inbox: Path, more: tuple[str, ...], text: str
) -> None:
    with locked(store.root, ""):
        result = run_module("edge_runtime", *arguments(store, str(inbox), "--publish", "--run", "stream", *more))
    result.assert_error(CONFIG, text, "watch")


@pytest.mark.parametrize(
    ("more", "code", "parts"),
    [
        ((), CONFIG, ("files or folders", "--watch")),
        (("INBOX", "--watch", "INBOX"), CONFIG, ("files and --watch exclude each other",)),
        (("INBOX", "--new"), CONFIG, ("--new",)),
        (("INBOX", "--publish"), CONFIG, ("--publish needs --run",)),
        (("--watch", "nowhere"), INPUT, ("nowhere does not exist",)),
        (("INBOX", "--run", "r.1", "--publish"), CONFIG, ("run name 'r.1'", "Home Assistant", "--home-assistant")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_an_invalid_call_is_one_line_of_error(
    store: DeviceStore, inbox: Path, more: tuple[str, ...], code: int, parts: tuple[str, ...]
) -> None:
    options = [str(inbox) if option == "INBOX" else option for option in more]
    run_module("edge_runtime", *arguments(store, *options)).assert_error(code, *parts)
