"""The server's shell on a real broker: a disk that refuses, and a device that floods it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.bundles import Built
from support.coordinators import CoordinatorRun, make_update, plan_for
from support.processes import Broker, Observer, Processes, wait_until

from fedfmsl.protocol.chunks import chunks
from fedfmsl.protocol.messages import Ack, Round, Stage, Verdict, encode
from fedfmsl.protocol.tensors import pack
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link
from trainer_server.coordinator.state import Plan
from trainer_server.service.lifecycle import open_run, run_server
from trainer_server.service.run_log import LOG_BYTES
from trainer_server.storage.run_store import DATABASE, RunStore


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Processes(tmp_path_factory.mktemp("logs")) as processes:
        yield processes.start_broker()


@dataclass
class Scene:
    """A server at work in a thread of this process, one device `a` that has not shown itself, and who sees it all."""

    plan: Plan
    folder: Path
    link: Link
    observer: Observer
    server: threading.Thread

    @property
    def topics(self) -> Topics:
        return Topics(self.plan.config.run)

    @property
    def notes(self) -> str:
        path = self.folder / "notes.log"
        return path.read_text() if path.is_file() else ""

    def show(self) -> None:
        self.link.publish(self.topics.status("a"), encode(CoordinatorRun(self.plan).status("a")), retain=True)

    def run_to_its_end(self) -> None:
        since = 0
        while True:
            announced = self.observer.wait(Round, lambda r, since=since: r.round > since, "the next round")
            if announced.stage is Stage.FINISHED:
                break
            since = announced.round
            update = make_update(self.plan, announced, "a")
            for index, chunk in enumerate(chunks(pack(update.update, update.tensors))):
                self.link.publish(self.topics.update_chunk("a", str(since), str(index)), chunk)
            ack = self.observer.wait(Ack, lambda a, since=since: a.round == since, "its acknowledgement")
            assert ack.verdict is Verdict.ACCEPTED
        self.server.join(30)
        assert not self.server.is_alive()
        assert RunStore(self.folder).ended == "finished"


@contextmanager
def scene(vit: Built, broker: Broker, folder: Path, run: str, log_bytes: int = LOG_BYTES) -> Iterator[Scene]:
    config = plan_for(vit, devices=1, run=run, stage1_rounds=1, stage2_rounds=1).config
    folder.mkdir()

    def serve() -> None:
        open_run(folder, config, vit.bundle).close()
        store = RunStore(folder, busy_seconds=0.05)
        run_server(store, vit.bundle, broker.url, "", None, insecure=False, log_bytes=log_bytes)

    server = threading.Thread(target=serve, daemon=True)
    link = Link(broker.url, f"device-{run}")
    with Observer(broker, run) as observer:
        link.connect()
        server.start()
        wait_until(lambda: bool(observer.catch_up()), "the server is online")
        plan = Plan(config, vit.bundle, RunStore(folder).origin.session, plan_for(vit).read)
        yield Scene(plan, folder, link, observer, server)
    link.close()


def test_a_device_that_comes_while_the_disk_refuses_is_not_forgotten(
    vit: Built, broker: Broker, tmp_path: Path
) -> None:
    with scene(vit, broker, tmp_path / "run", "disk") as s:
        with closing(sqlite3.connect(s.folder / DATABASE, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # whatever the reason: nothing can be committed
            s.show()
            wait_until(lambda: "cannot write" in s.notes, "the server notices")
            assert not [m for m in s.observer.seen if isinstance(m, Round)]
            other.execute("ROLLBACK")
        s.run_to_its_end()
        assert s.notes.count("cannot write") == 1


def test_a_flood_of_garbage_costs_no_round_and_fills_no_log(vit: Built, broker: Broker, tmp_path: Path) -> None:
    garbage = 3000
    with scene(vit, broker, tmp_path / "run", "flood") as s:
        s.show()
        s.observer.wait(Round, lambda r: True, "the first round")
        for number in range(garbage):
            s.link.publish(s.topics.update_chunk("a", "1", str(number)), number.to_bytes(8, "big"))
        s.run_to_its_end()
        assert not any(closed.repeated for closed in RunStore(s.folder).rounds())
        (refused,) = RunStore(s.folder).refusals()
        assert (refused.device, refused.kind, refused.count) == ("a", "unreadable", garbage)
        assert len(s.notes) < 2000


def test_the_notes_take_no_more_room_than_two_files_whatever_a_device_causes(
    vit: Built, broker: Broker, tmp_path: Path
) -> None:
    with scene(vit, broker, tmp_path / "run", "notes", log_bytes=1000) as s:
        s.show()
        for online in (False, True) * 200:  # every one of them is noted
            s.link.publish(s.topics.status("a"), encode(CoordinatorRun(s.plan).status("a", online=online)), retain=True)
        s.run_to_its_end()
        assert (s.folder / "notes.log.1").stat().st_size < 1200
        assert len(s.notes) < 1200
