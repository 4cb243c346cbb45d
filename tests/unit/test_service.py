"""The server's I/O loop on a real broker: a disk that cannot be written, and a device that floods the server."""

from __future__ import annotations

import errno
import sqlite3
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.brokers import RestartableBroker
from support.bundles import Built
from support.coordinators import ROUND_SECONDS, CoordinatorRun, make_update, plan_for
from support.night_fleet import Killed
from support.processes import SECONDS, Broker, Observer, Processes, free_port, wait_until
from support.samples import CLASSES

from fedfmsl.algorithms.aggregation import Aggregate, ScreenedMean
from fedfmsl.common.hours import Hours
from fedfmsl.protocol.chunks import chunks
from fedfmsl.protocol.messages import Ack, Activity, Health, Round, ServerStatus, Stage, Verdict, encode, parse
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.tensors import pack
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received
from trainer_server.coordinator.events import UpdateRefused, UpdateSeen
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.state import Plan
from trainer_server.service import loop
from trainer_server.service.floods import SPARE_MESSAGES
from trainer_server.service.lifecycle import make_plan, open_bundle, open_run, restore_state, run_server
from trainer_server.service.retained import retained
from trainer_server.service.run_log import LOG_BYTES
from trainer_server.storage.kept_experts import KeptExperts
from trainer_server.storage.observations import read_observations
from trainer_server.storage.operations import Operations
from trainer_server.storage.run_store import DATABASE, RunStore


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Processes(tmp_path_factory.mktemp("logs")) as processes:
        yield processes.start_broker()


@dataclass
class Scene:
    """A server in a thread of this process, device `a` which is not online yet, and an observer."""

    plan: Plan
    folder: Path
    link: Link
    observer: Observer
    server: threading.Thread
    serve: Callable[[], None]

    @property
    def topics(self) -> Topics:
        return Topics(self.plan.config.run)

    @property
    def notes(self) -> str:
        path = self.folder / "notes.log"
        return path.read_text() if path.is_file() else ""

    def announce_device(self) -> None:
        self.link.publish(self.topics.status("a"), encode(CoordinatorRun(self.plan).status("a")), retain=True)

    def send(self, sent: UpdateSeen) -> None:
        for index, chunk in enumerate(chunks(pack(sent.update, sent.tensors))):
            self.link.publish(self.topics.update_chunk("a", str(sent.update.round), str(index)), chunk)

    def start_again(self) -> None:
        self.server = threading.Thread(target=self.serve, daemon=True)
        self.server.start()

    def run_to_its_end(self, since: int = 0) -> None:
        while True:
            announced = self.observer.wait(Round, lambda r, since=since: r.round > since, "the next round")
            if announced.stage is Stage.FINISHED:
                break
            since = announced.round
            update = make_update(self.plan, announced, "a")
            self.send(update)
            ack = self.observer.wait(Ack, lambda a, since=since: a.round == since, "its acknowledgement")
            assert ack.verdict is Verdict.ACCEPTED
        self.server.join(30)
        assert not self.server.is_alive()
        assert RunStore(self.folder).ended == "finished"


@contextmanager
def scene(
    vit: Built,
    broker: Broker,
    folder: Path,
    run: str,
    log_bytes: int = LOG_BYTES,
    allowed: frozenset[str] | None = None,
    metrics: str | None = None,
    round_timeout: float = ROUND_SECONDS,
    wall: Callable[[], float] = time.time,
    schedule: tuple[Hours, ...] = (),
) -> Iterator[Scene]:
    rounds = {"stage1_rounds": 1, "stage2_rounds": 1}
    plan = plan_for(vit, devices=1, run=run, round_timeout=round_timeout, schedule=schedule, **rounds)
    config, over = plan.config, threading.Event()
    folder.mkdir()

    def clock() -> float:
        if over.is_set():
            raise Killed
        return wall()

    def serve() -> None:
        open_run(folder, config, vit.bundle).close()
        store = RunStore(folder, busy_seconds=0.05)
        options: dict[str, Any] = {"log_bytes": log_bytes, "allowed": allowed, "metrics": metrics, "wall": clock}
        with suppress(Killed):
            run_server(store, vit.bundle, broker.url, "", None, insecure=False, **options)

    server = threading.Thread(target=serve, daemon=True)
    link = Link(broker.url, f"device-{run}")
    with Observer(broker, run) as observer:
        link.connect()
        server.start()
        wait_until(lambda: bool(observer.catch_up()), "the server is online")
        plan = Plan(config, vit.bundle, RunStore(folder).origin.session, plan_for(vit).read)
        made = Scene(plan, folder, link, observer, server, serve)
        try:
            yield made
        finally:
            over.set()
            made.server.join(SECONDS)
    link.close()


def test_the_server_subscribes_before_devices_can_answer_its_status(
    vit: Built, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker delivers an earlier answer as a retained message, which is no sign of life."""
    calls: list[tuple[str, str]] = []
    originals = {"subscribe": Link.subscribe, "publish": Link.publish}
    for name in originals:

        def recorded(link: Link, topic: str, *more: object, name: str = name, **named: object) -> object:
            calls.append((name, topic))
            return originals[name](link, topic, *more, **named)

        monkeypatch.setattr(Link, name, recorded)
    with scene(vit, broker, tmp_path / "run", "order") as s:
        first = calls.index(("publish", s.topics.server_status))
        for topic in (s.topics.status("+"), s.topics.health("+"), s.topics.server_status):
            assert calls.index(("subscribe", topic)) < first
        s.announce_device()
        s.run_to_its_end()


def test_a_device_that_joins_while_the_disk_cannot_be_written_takes_part_later(
    vit: Built, broker: Broker, tmp_path: Path
) -> None:
    with scene(vit, broker, tmp_path / "run", "disk") as s:
        with closing(sqlite3.connect(s.folder / DATABASE, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # so that nothing can be committed
            s.announce_device()
            wait_until(lambda: "cannot use" in s.notes, "the server notices")
            assert not [m for m in s.observer.seen if isinstance(m, Round)]
            other.execute("ROLLBACK")
        s.run_to_its_end()
        assert s.notes.count("cannot use") == 1


def test_a_finished_run_goes_on_after_a_rollback(vit: Built, broker: Broker, tmp_path: Path) -> None:
    with scene(vit, broker, tmp_path / "run", "rollback") as s:
        s.announce_device()
        s.run_to_its_end()
        experts = KeptExperts(s.folder).rounds()
        made = experts[0]
        assert Operations(s.folder).add(Operation(action=Action.PAUSE))
        assert Operations(s.folder).add(Operation(action=Action.ROLLBACK, round=made))
        closed = RunStore(s.folder).rounds.all()[-1].round.round
        s.start_again()
        s.run_to_its_end(since=closed + 1)
        assert "operator: the run has ended (finished), so pause changes nothing" in s.notes
        assert f"the run returns to the global expert of round {made} now" in s.notes
        stages = [each.round.stage for each in RunStore(s.folder).rounds.all() if each.round.round > closed]
        assert stages == [Stage.PERSONAL, Stage.EVALUATE]
        assert KeptExperts(s.folder).rounds() == experts


def test_the_next_session_of_a_run_begins_while_devices_stay(vit: Built, broker: Broker, tmp_path: Path) -> None:
    """The server is never offline in between, and leaves no globals of the former session on the broker."""
    with scene(vit, broker, tmp_path / "run", "classes") as s:
        s.announce_device()
        first = s.observer.wait(Round, lambda r: True, "the first round")
        assert Operations(s.folder).add(Operation(action=Action.CLASSES, classes=("quince",)))
        wait_until(lambda: "1 class is added after round 1: quince" in s.notes, "the server obeys")
        s.send(make_update(s.plan, first, "a"))
        former, seen = s.plan.session, s.observer.catch_up()
        status = s.observer.wait(ServerStatus, lambda it: it.session != former, "the next session", seen)
        store = RunStore(s.folder)
        s.plan = make_plan(store, open_bundle(store))
        assert (status.session, status.task) == (s.plan.session, s.plan.bundle.task.sha256)
        s.announce_device()
        s.run_to_its_end(since=first.round)
        end = next(
            n for n, each in enumerate(s.observer.seen) if isinstance(each, Round) and each.stage is Stage.FINISHED
        )
        assert all(each.online for each in s.observer.seen[:end] if isinstance(each, ServerStatus))
        assert Task.unpack(s.observer.blobs[status.task]).classes == (*CLASSES, "quince")
        retained = Link(broker.url, "later")
        retained.connect()
        retained.subscribe(s.topics.globals_chunk(vit.bundle.task.sha256, "+"))  # the broker answers in this order
        retained.subscribe(s.topics.round)
        topics = [""]
        while topics[-1] != s.topics.round:
            event = retained.next_event(30.0)
            assert event is not None
            topics += [event.topic] if isinstance(event, Received) else []
        retained.close()
        assert not any(s.topics.globals_of(topic) == vit.bundle.task.sha256 for topic in topics)
        view, _ = read_observations(s.folder)
        assert view is not None and view.acted is not None and "quince" in view.acted.text  # in the former session


def test_the_next_session_waits_for_the_broker(vit: Built, tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as processes:
        broker = RestartableBroker(processes, tmp_path / "broker", kind="amqtt")
        with scene(vit, Broker(broker.kind, broker.url), tmp_path / "run", "later", round_timeout=1.0) as s:
            s.announce_device()
            s.observer.wait(Round, lambda r: True, "the first round")
            broker.kill()
            assert Operations(s.folder).add(Operation(action=Action.CLASSES, classes=("quince",)))
            wait_until(lambda: "the next session begins when the broker is back" in s.notes, "a deadline passes")
            assert RunStore(s.folder).task().version == 1
            seen = s.observer.catch_up()
            broker.start()
            s.observer.wait(ServerStatus, lambda it: it.session != s.plan.session, "the next session", seen)
            assert RunStore(s.folder).task().version == 2


def test_an_aggregation_that_finds_a_full_disk_is_tried_again(
    vit: Built, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [OSError(errno.ENOSPC, "No space left on device")] * 2
    aggregate = ScreenedMean.aggregate

    def aggregate_later(*arguments: Any) -> Aggregate:
        if full:
            raise full.pop()
        return aggregate(*arguments)

    monkeypatch.setattr(ScreenedMean, "aggregate", aggregate_later)
    with scene(vit, broker, tmp_path / "run", "scratch") as s:
        s.announce_device()
        s.run_to_its_end()
        assert s.notes.count("No space left on device") == 1
        assert not any(closed.repeated for closed in RunStore(s.folder).rounds.all())


def test_a_flood_of_garbage_costs_no_round_and_fills_no_log(vit: Built, broker: Broker, tmp_path: Path) -> None:
    garbage = SPARE_MESSAGES - 100
    with scene(vit, broker, tmp_path / "run", "flood") as s:
        s.announce_device()
        s.observer.wait(Round, lambda r: True, "the first round")
        for number in range(garbage):
            s.link.publish(s.topics.update_chunk("a", "1", str(number)), number.to_bytes(8, "big"))
        s.run_to_its_end()
        assert not any(closed.repeated for closed in RunStore(s.folder).rounds.all())
        (refused,) = RunStore(s.folder).refusals.all()
        assert (refused.device, refused.kind, refused.count) == ("a", "unreadable", garbage)
        assert len(s.notes) < 2000


def test_a_round_lasts_longer_while_heartbeats_say_that_a_device_is_at_work(
    vit: Built, broker: Broker, tmp_path: Path
) -> None:
    with scene(vit, broker, tmp_path / "run", "slow", round_timeout=2.0) as s:
        health = Health(device="a", time=0, started=0, activity=Activity.WORKING)
        s.announce_device()
        s.observer.wait(Round, lambda r: True, "the first round")
        s.link.publish(s.topics.health("a"), encode(health), retain=True)
        wait_until(lambda: "still at work: a" in s.notes, "the server sees that the device is at work")
        s.run_to_its_end()
        assert not any(closed.repeated for closed in RunStore(s.folder).rounds.all())


def test_a_refused_update_is_logged_without_its_tensors(vit: Built, broker: Broker, tmp_path: Path) -> None:
    with scene(vit, broker, tmp_path / "run", "refused") as s:
        s.announce_device()
        first = s.observer.wait(Round, lambda r: True, "the first round")
        flawed = make_update(s.plan, first, "a", tensors={})
        for _ in range(2):
            begun = s.observer.catch_up()
            s.send(flawed)
            s.observer.wait(Ack, lambda a: a.verdict is Verdict.REJECTED, "the refusal", begun)
        store = RunStore(s.folder)
        assert [logged.event for logged in store.events()] == [UpdateRefused("a")]
        assert len([*store.blobs.folder.iterdir()]) == 1  # of the checkpoint
        s.send(make_update(s.plan, first, "a"))
        s.observer.wait(Round, lambda r: r.round == 2, "a valid update still counts")


def test_a_device_that_is_not_allowed_takes_no_part_and_metrics_count_it(
    vit: Built, broker: Broker, tmp_path: Path
) -> None:
    metrics = f"127.0.0.1:{free_port()}"
    with scene(vit, broker, tmp_path / "run", "allow", allowed=frozenset({"a"}), metrics=metrics) as s:
        s.link.publish(s.topics.status("b"), encode(CoordinatorRun(s.plan).status("b")), retain=True)
        wait_until(lambda: "b is not in --allow" in s.notes, "the refusal")
        s.announce_device()
        s.run_to_its_end()
        records = RunStore(s.folder).rounds.all()
        assert {name for closed in records for name in closed.missing} == set()
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        prefix = "fedfmsl_server"
        assert f'{prefix}_rounds_total{{result="closed"}} {len(records)}.0' in lines
        assert f"{prefix}_round_seconds_sum {sum(closed.seconds for closed in records)}" in lines
        assert f'{prefix}_stage{{stage="finished"}} 1.0' in lines
        assert any(line.startswith(f'{prefix}_refused_messages_total{{reason="not allowed"}}') for line in lines)


def test_a_server_that_is_stopped_before_it_is_online_leaves_its_name_to_another_run(
    vit: Built, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(loop, "remove_unneeded_globals", stop)
    store = open_run(tmp_path / "run", plan_for(vit, devices=1, run="stopped").config, vit.bundle)
    with pytest.raises(Killed):
        run_server(store, vit.bundle, broker.url, "", None, insecure=False)
    topics, link = Topics("stopped"), Link(broker.url, "reader")
    link.connect()
    left = [parse(ServerStatus, each.payload) for each in retained(link, topics, [topics.server_status], SECONDS)]
    link.close()
    assert left and all(each.ended and not each.online for each in left)  # amqtt delivers it twice


def test_a_run_rests_outside_of_its_hours_as_its_log_says(vit: Built, broker: Broker, tmp_path: Path) -> None:
    """The wall clock is moved. Between the hours no round opens or closes, and an update is acknowledged."""
    clock = [datetime(2026, 11, 27, 12).timestamp()]

    def says(text: str) -> None:
        wait_until(lambda: text in s.notes, text)

    night = (Hours.parse("22:00-06:00"),)
    with scene(vit, broker, tmp_path / "run", "night", wall=lambda: clock[0], schedule=night) as s:
        says("the run rests: until 2026-11-27 22:00 (--schedule 22:00-06:00)")
        s.announce_device()
        says("a is online")
        assert RunStore(s.folder).is_unstarted()  # another start may change its settings
        clock[0] += 10.5 * 3600
        first = s.observer.wait(Round, lambda r: r.round == 1, "the first round")
        says("the run rests no more")
        clock[0] += 8 * 3600
        says("the run rests: until 2026-11-28 22:00")
        s.send(make_update(s.plan, first, "a"))
        s.observer.wait(Ack, lambda ack: ack.round == 1, "its acknowledgement")
        state, _ = restore_state(RunStore(s.folder), s.plan)
        assert state.rests_at is not None and state.answered == {"a"}
        s.observer.catch_up()
        assert not any(isinstance(message, Round) and message.round > 1 for message in s.observer.seen)
        clock[0] += 16 * 3600
        s.observer.wait(Round, lambda r: r.round == 2, "the second round")


def test_a_reconnection_is_logged(vit: Built, tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as processes:
        broker = RestartableBroker(processes, tmp_path / "broker", kind="amqtt")
        with scene(vit, Broker(broker.kind, broker.url), tmp_path / "run", "again") as s:
            before = s.observer.catch_up()
            broker.kill()
            wait_until(lambda: "no connection to the broker" in s.notes, "the server notices")
            wait_until(lambda: RunStore(s.folder).files.outage()[0] > 0, "its status says so")
            broker.start()
            s.observer.wait(ServerStatus, lambda status: status.online, "the server reconnects", since=before)
            s.announce_device()
            s.run_to_its_end()
            assert "connected to the broker again" in s.notes
            assert RunStore(s.folder).files.outage() == (0, "")


def test_the_log_never_exceeds_two_files(vit: Built, broker: Broker, tmp_path: Path) -> None:
    with scene(vit, broker, tmp_path / "run", "notes", log_bytes=1000) as s:
        s.announce_device()
        for online in (False, True) * 200:  # each of them is logged
            s.link.publish(s.topics.status("a"), encode(CoordinatorRun(s.plan).status("a", online=online)), retain=True)
        s.run_to_its_end()
        assert (s.folder / "notes.log.1").stat().st_size < 1200
        assert len(s.notes) < 1200
