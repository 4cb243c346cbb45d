"""The daemon's I/O loop beside a long computation, on a real broker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import paho.mqtt.client as paho
import pytest
from onnx import TensorProto, helper
from support.bundles import Built
from support.in_process_daemon import RUN, InProcessDaemon, make_daemon
from support.processes import SECONDS, Broker, Observer, Processes, wait_until

from edge_runtime.daemon.loop import STOPS
from edge_runtime.daemon.privacy_budget import PrivacyBudget
from edge_runtime.daemon.round_runner import RoundRunner
from edge_runtime.daemon.timing import Timing
from edge_runtime.resources.governor import Limits, Readings
from edge_runtime.resources.throttle import WorkStoppedError
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import BundleError, RunError
from fedfmsl.protocol.messages import (
    Activity,
    DeviceStatus,
    Health,
    Progress,
    Round,
    ServerStatus,
    Stage,
    Training,
    encode,
)
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.address import parse_address
from fedfmsl.transport.link import Link

TOPICS = Topics(RUN)
QUICK = Timing(tick=0.05, sensors=0.05, health=0.1, ack=Backoff(first=0.2, longest=0.2))
GRAPH_SECONDS = 3.0  # of a single call of ONNX Runtime, at least
LIMIT = 75.0


def round_(number: int, stage: Stage = Stage.STATISTICS) -> Round:
    return Round(
        run=RUN,
        session="s",
        round=number,
        stage=stage,
        index=0,
        of=1,
        level=1,
        training=Training(epochs=1, learning_rate=1.0),
        sal=Sal(CapabilityQueue(2, 0.1), max_level=1),
    )


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with Processes(tmp_path / "logs") as processes:
        yield processes.start_broker()


@dataclass
class Thermometer:
    celsius: float = 50.0

    def read(self) -> Readings:
        return Readings(temperature=self.celsius)


@dataclass
class Scene:
    """A daemon that serves in a thread of this process, a server that only announces, and an observer."""

    broker: Broker
    daemon: InProcessDaemon
    observer: Observer
    server: Link
    thermometer: Thermometer
    bundle: str
    task: str
    errors: list[BaseException] = field(default_factory=list)
    anew: bool = False  # the daemon begins again with another task

    def __post_init__(self) -> None:
        self.serving = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        try:
            self.anew = self.daemon.connect_and_serve()
        except BaseException as error:
            self.errors.append(error)

    def start(self) -> None:
        self.server.connect()
        status = ServerStatus(online=True, run=RUN, session="s", bundle=self.bundle, task=self.task)
        self.server.publish(TOPICS.server_status, encode(status), retain=True)
        self.announce(round_(1))
        self.serving.start()

    def announce(self, announced: Round) -> None:
        self.server.publish(TOPICS.round, encode(announced), retain=True)

    def end(self) -> None:
        self.serving.join(SECONDS)
        assert not self.serving.is_alive()


@pytest.fixture
def scene(vit: Built, photos: Path, tmp_path: Path, broker: Broker, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The parameter is the RoundRunner's type."""
    thermometer = Thermometer()
    daemon = make_daemon(
        vit,
        photos,
        tmp_path / "state",
        broker=broker.url,
        limits=Limits(max_temperature=LIMIT),
        read=thermometer.read,
        timing=QUICK,
        runner_type=request.param,
    )
    with Observer(broker, RUN) as observer:
        scene = Scene(
            broker, daemon, observer, Link(broker.url, "server"), thermometer, vit.bundle.sha256, vit.bundle.task.sha256
        )
        scene.start()
        try:
            yield scene
        finally:
            if scene.serving.is_alive():
                scene.announce(round_(9, Stage.FINISHED))
            scene.end()
            scene.server.close()


class Runner(RoundRunner):
    """`runs` are the rounds that were started."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.runs: list[int] = []

    def run(self, task: Round, bytes_down: int) -> float:
        self.runs.append(task.round)
        self.device.store.outbox.enter(task.session, task.run)
        return self.compute(task)

    def compute(self, task: Round) -> float:
        return 0.0

    def write_personalized(self) -> None: ...


def products(path: Path, size: int = 256) -> Path:
    """A graph that multiplies matrices `count` times within one call."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "x"], ["y"]),
            helper.make_node("Tanh", ["y"], ["next"]),
            helper.make_node("Identity", ["go_on"], ["again"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [size, size]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [size, size]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["count", "", "start"], ["end"], body=body)],
        "products",
        [
            helper.make_tensor_value_info("count", TensorProto.INT64, []),
            helper.make_tensor_value_info("start", TensorProto.FLOAT, [size, size]),
        ],
        [helper.make_tensor_value_info("end", TensorProto.FLOAT, [size, size])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


class LongGraphRun(Runner):
    """Computes one graph run of at least GRAPH_SECONDS; `interval` is its start and end."""

    interval: tuple[float, float] | None = None

    def compute(self, task: Round) -> float:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(products(self.device.store.root / "products.onnx")), options)
        start, count = np.eye(256, dtype=np.float32), 256
        while True:
            begun = time.time()
            session.run(None, {"count": np.array(count), "start": start})
            ended = time.time()
            if ended - begun >= GRAPH_SECONDS:
                self.interval = begun, ended
                return ended - begun
            self.device.report("training", count, 2 * count)
            count *= 2


class Frugal(Runner):
    """A device whose budget is enough for one update with the noise of PRIVACY."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.budget = PrivacyBudget(self.device.store.budget, limit=4.0)

    def compute(self, task: Round) -> float:
        self.budget.record(task)
        return 0.0


PRIVACY = Privacy(clip=1.0, noise_multiplier=1.2, shares=1)  # ε of 3.5, and 5.3 after two


@pytest.mark.parametrize("scene", [Frugal], indirect=True)
def test_no_round_waits_for_a_device_that_would_pass_its_privacy_budget(scene: Scene) -> None:
    runner = scene.daemon.runner
    assert isinstance(runner, Frugal)

    def paused(reason: str, since: int = 0) -> None:
        scene.observer.wait(DeviceStatus, lambda s: s.online and reason in s.paused, reason, since)

    def wait_for_runs(runs: list[int]) -> None:
        wait_until(lambda: runner.runs == runs, f"it has computed {runs}")

    paused("its --max-epsilon 4 allows no update without noise")
    noised = {"privacy": PRIVACY}
    scene.announce(round_(2).model_copy(update=noised))
    wait_for_runs([2])
    for number, stage in ((3, Stage.GLOBAL), (4, Stage.GLOBAL)):
        scene.announce(round_(number, stage).model_copy(update=noised))
    paused("its --max-epsilon 4 would be passed: ε 5.3 after this round")
    since = scene.observer.catch_up()
    scene.announce(round_(5, Stage.EVALUATE).model_copy(update=noised))
    wait_for_runs([2, 5])
    scene.observer.wait(DeviceStatus, lambda s: s.online and not s.paused, "it takes part again", since)


@pytest.mark.parametrize("scene", [LongGraphRun], indirect=True)
def test_heartbeats_and_keepalives_go_on_during_a_long_graph_run(scene: Scene) -> None:
    """ONNX Runtime releases the GIL."""
    idle = paho.Client(paho.CallbackAPIVersion.VERSION2, "idle")
    pings: list[float] = []
    idle.on_log = lambda _client, _data, _level, text: pings.append(time.time()) if "PINGREQ" in text else None
    address = parse_address(scene.broker.url)
    idle.connect(address.host, address.port, keepalive=1)
    idle.loop_start()
    runner = scene.daemon.runner
    assert isinstance(runner, LongGraphRun)
    scene.observer.wait(Health, lambda h: h.activity is Activity.WORKING, "the round's start")
    scene.observer.wait(Progress, lambda p: p.activity == "training", "progress")
    scene.observer.wait(Health, lambda h: h.rounds_done == 1, "the round's end")
    assert runner.interval is not None
    begun, ended = runner.interval
    times = [m.time for m in scene.observer.seen if isinstance(m, Health) and begun <= m.time <= ended]
    gaps = [after - before for before, after in pairwise([begun, *times, ended])]
    assert len(times) >= 5
    assert max(gaps) < (ended - begun) / 3
    assert any(begun < ping < ended for ping in pings)
    idle.disconnect()
    idle.loop_stop()


class Patient(Runner):
    """Computes until it is stopped in round 1."""

    def compute(self, task: Round) -> float:
        while task.round == 1:
            self.control.check()
        return 0.0


@pytest.mark.parametrize("scene", [Patient], indirect=True)
def test_a_paused_round_is_given_up_for_a_newer_one(scene: Scene) -> None:
    runner = scene.daemon.runner
    assert isinstance(runner, Patient)
    scene.observer.wait(Health, lambda h: h.activity is Activity.WORKING, "the round's start")
    scene.thermometer.celsius = LIMIT + 10
    scene.observer.wait(Health, lambda h: h.activity is Activity.PAUSED, "the pause")
    scene.announce(round_(2))
    scene.observer.wait(Health, lambda h: h.activity is Activity.PAUSED and h.round == 2, "the newer round")
    scene.thermometer.celsius = 20.0
    scene.observer.wait(Health, lambda h: h.rounds_done == 1, "the newer round's end")
    assert runner.runs[0] == 1 and runner.runs[-1] == 2


class Endless(Runner):
    def compute(self, task: Round) -> float:
        while True:
            self.control.check()


@pytest.mark.parametrize("scene", [Endless], indirect=True)
def test_a_device_that_must_leave_stops_its_computation(scene: Scene) -> None:
    scene.observer.wait(Health, lambda h: h.activity is Activity.WORKING, "the round's start")
    newer = DeviceStatus(device="d", online=True, instance="newer")
    scene.server.publish(TOPICS.status("d"), encode(newer), retain=True)
    scene.end()
    (error,) = scene.errors
    assert isinstance(error, RunError) and "--device" in str(error)


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("scene", [Endless], indirect=True)
def test_a_task_with_a_new_class_ends_the_round_in_work_at_once_and_the_device_stays_online(
    scene: Scene, paused: bool
) -> None:
    scene.observer.wait(Health, lambda h: h.activity is Activity.WORKING, "the round's start")
    if paused:
        scene.thermometer.celsius = LIMIT + 10
        scene.observer.wait(DeviceStatus, lambda s: bool(s.paused), "the pause")
    following = ServerStatus(online=True, run=RUN, session="s2", bundle=scene.bundle, task="7" * 64)
    scene.server.publish(TOPICS.server_status, encode(following), retain=True)
    scene.end()
    assert scene.anew and not scene.errors
    scene.observer.catch_up()
    assert all(status.online for status in scene.observer.seen if isinstance(status, DeviceStatus))
    scene.daemon.link.close()


class Unanswered(Runner):
    """Its updates reach no server, as if the broker's access rules dropped them without a word."""

    def compute(self, task: Round) -> float:
        self.device.store.outbox.write(task.round, b"an update")
        return 0.0


@pytest.mark.parametrize("scene", [Unanswered], indirect=True)
def test_updates_that_the_broker_seems_to_drop_are_in_the_health(scene: Scene) -> None:
    health = scene.observer.wait(Health, lambda h: bool(h.refused), "its suspicion")
    assert health.refused.startswith("the server has not acknowledged an update: the broker's access rules")


@pytest.mark.parametrize("scene", [Runner], indirect=True)
def test_a_device_does_not_announce_a_model_that_does_not_exist(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "edge_runtime")
    scene.observer.wait(Health, lambda h: h.rounds_done == 1, "a round without a model")
    scene.announce(round_(9, Stage.FINISHED))
    scene.end()
    assert "has finished; this device has no model" in caplog.text
    assert STOPS in caplog.text


class Broken(Runner):
    error: BaseException = ZeroDivisionError("in the worker thread")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.released = threading.Event()

    def compute(self, task: Round) -> float:
        assert self.released.wait(SECONDS)
        raise self.error


class Refused(Broken):
    error = BundleError("the graph is damaged")


@pytest.mark.parametrize("scene", [Broken, Refused], indirect=True)
def test_an_error_of_the_computation_ends_the_daemon(scene: Scene) -> None:
    runner = scene.daemon.runner
    assert isinstance(runner, Broken)
    scene.observer.wait(Health, lambda h: h.activity is Activity.WORKING, "the round's start")
    runner.released.set()
    scene.end()
    assert scene.errors == [runner.error]
    reason = str(runner.error) if isinstance(runner, Refused) else ""
    offline = scene.observer.wait(DeviceStatus, lambda s: not s.online, "its last status")
    assert offline.error == reason


class Changing(Runner):
    """Is stopped at its first attempt, as it is when a file has changed or the disk is full."""

    error: BaseException = OSError(28, "No space left on device")

    def compute(self, task: Round) -> float:
        if len(self.runs) == 1:
            raise self.error
        return 0.0


class Stopped(Changing):
    error = WorkStoppedError()


@pytest.mark.parametrize("scene", [Changing, Stopped], indirect=True)
def test_a_round_that_failed_is_computed_again(scene: Scene) -> None:
    scene.observer.wait(Health, lambda h: h.rounds_done == 1, "the round's end")
    runner = scene.daemon.runner
    assert isinstance(runner, Changing)
    assert runner.runs == [1, 1]
