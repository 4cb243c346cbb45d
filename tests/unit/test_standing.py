"""A standing run: one session after the other, each with news, and what is kept of them is bounded."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from support.bundles import Built
from support.coordinators import ABC, plan_for, started
from support.offline_server import OfflineServer
from support.samples import CLASSES

from fedfmsl.common import files
from fedfmsl.common.hours import Hours
from fedfmsl.protocol.messages import DeviceStatus, Stage
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import ClockTicked, OperatorActed, RestChanged, StatusSeen, Stop
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.standing import Standing
from trainer_server.service.batch import Batch
from trainer_server.service.lifecycle import make_plan, open_run, restore_state
from trainer_server.service.rest import Rest
from trainer_server.storage.kept_experts import KeptExperts
from trainer_server.storage.run_status import sizes_of

DAY = 86_400.0
NIGHT = (Hours.parse("22:00-06:00"),)


@pytest.fixture(autouse=True)
def _without_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power failures are not tested here, and a sync takes longer than all the rest."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)


class Nights(OfflineServer):
    """A standing run of the devices ABC. `wall`: the wall clock."""

    wall = 20_000 * DAY

    def tick(self) -> None:
        self.feed(ClockTicked(wall=self.wall))

    def sees(self, device: str, **change: object) -> None:
        fields = {"device": device, "online": True, "bundle": self.plan.bundle.sha256, **change}
        self.feed(StatusSeen(DeviceStatus.model_validate(fields)))

    def night(self) -> list[Stage]:
        """All rounds of a session. Their stages."""
        session, stages = self.plan.session, []
        self.tick()
        while self.state.announced is not None and self.plan.session == session:
            stages.append(self.state.announced.stage)
            for event in self.answers():
                if not isinstance(event, ClockTicked):
                    self.feed(event)
            self.tick()
        return stages


def opened(vit: Built, folder: Path, **config: object) -> Nights:
    rounds = {"stage1_rounds": 1, "stage2_rounds": 1, "schedule": NIGHT}
    store = open_run(folder, plan_for(vit, **{**rounds, **config}).config, vit.bundle)
    server = Nights(store, make_plan(store, vit.bundle))
    for name in ABC:
        server.sees(name)
    return server


def test_a_later_session_begins_with_news_only(vit: Built, tmp_path: Path) -> None:
    server = opened(vit, tmp_path / "run", min_new=5, head_sums="none")
    rounds = [Stage.GLOBAL, Stage.PERSONAL, Stage.EVALUATE]
    assert server.night() == [Stage.STATISTICS, *rounds]
    assert (server.store.ended, server.night()) == (None, [])
    server.sees("a", new_samples=3)
    server.sees("b", new_samples=9, paused="on battery")
    server.sees("c", new_samples=9, online=False)
    assert server.night() == []  # b and c cannot take part
    again = Nights(server.store, server.plan)
    again.sees("a", new_samples=5)
    assert again.night() == []  # fewer than --min-updates devices
    again.sees("b", new_samples=9)
    again.sees("c", new_samples=9)
    assert again.night() == rounds  # the classes are known
    numbers = [closed.round.round for closed in server.store.rounds.all()]
    assert numbers == list(range(1, 8))


def test_samples_that_a_session_did_not_use_are_no_news_again(vit: Built, tmp_path: Path) -> None:
    """Else a device that cannot train them would begin one session after the other."""
    server = opened(vit, tmp_path / "run")
    server.sees("a", new_samples=40)
    server.night()
    assert server.night() == []
    server.sees("a", online=False)  # a last will has no number
    server.sees("a", new_samples=40)
    assert server.night() == []
    server.sees("b", new_samples=1)
    assert server.night()
    server.sees("a", new_samples=2)  # it has used some
    assert server.night() == []
    server.sees("a", new_samples=3)
    assert server.night()


@pytest.mark.parametrize("counts", [(0, 40), (40, 3, 41), (3, 0, 7), (None, 5, None, 40, 2, 9, None)])
def test_the_log_says_that_a_device_has_used_samples_also_if_it_has_others_now(
    vit: Built, counts: tuple[int | None, ...]
) -> None:
    """Statuses are stored with the next commit, and a replay computes the same news from those that are stored."""
    run = started(vit)
    run.feed_only(StatusSeen(run.status("a", new_samples=40)))
    first = replace(run.state, standing=Standing(needs_news=True, unused={"a": 40}))
    batch = Batch(first, 1.0, {})
    for count in counts:  # None: its last will
        status = run.status("a", online=False) if count is None else run.status("a", new_samples=count)
        state, _ = advance(run.plan, batch.state, event := StatusSeen(status), 1.0)
        if state is not batch.state:
            batch.state = state
            batch.add_status(event)
    again = first
    for logged in batch.events:
        again, _ = advance(run.plan, again, logged.event, logged.at)
    assert (again.standing, again.devices) == (batch.state.standing, batch.state.devices)
    assert again.standing.unused["a"] == min(count for count in counts if count is not None)
    assert len(batch.events) <= 3


def test_new_classes_and_a_rollback_are_news(vit: Built, tmp_path: Path) -> None:
    server = opened(vit, tmp_path / "run")
    server.night()
    server.feed(OperatorActed(Operation(action=Action.CLASSES, classes=("quince",))))
    server.feed(RestChanged(True))
    assert server.night() == []
    server.feed(RestChanged(False))
    server.tick()  # the session that gathers ends, and the next one has the class
    assert server.plan.bundle.classes == (*CLASSES, "quince")
    assert [stage for stage in server.night() if stage is Stage.GLOBAL] == 3 * [Stage.GLOBAL]
    assert server.night() == []
    made = server.state.made
    KeptExperts(server.store.folder).write(made, server.state.expert)
    sha256 = KeptExperts(server.store.folder).copy(made, server.store.blobs.folder)
    server.feed(OperatorActed(Operation(action=Action.ROLLBACK, round=made, sha256=sha256)))
    server.tick()
    assert server.night().count(Stage.GLOBAL) == 1  # as many as the first session


def test_every_counts_from_the_begin_of_the_session_before(vit: Built, tmp_path: Path) -> None:
    server = opened(vit, tmp_path / "run", schedule=(), every="24h")
    limits, begun = server.state.limits, server.wall
    assert server.state.standing.due(limits, begun) == 0
    server.night()
    assert server.state.standing.due(limits, begun + 60) == begun + DAY
    assert restore_state(server.store, server.plan)[0].standing == server.state.standing
    assert server.state.standing.due(limits, begun - DAY) == 0  # the clock was set back
    server.feed(OperatorActed(Operation(action=Action.CLASSES, classes=("quince",))))
    server.tick()
    assert server.state.standing.due(limits, begun + 60) == begun + DAY  # it needs no news, but time
    server.wall += DAY + 60
    server.night()
    assert server.state.standing.due(limits, server.wall) == begun + 2 * DAY + 60


def test_the_log_says_what_the_next_session_waits_for(
    vit: Built, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = opened(vit, tmp_path / "run", schedule=(), every="24h", min_new=5)
    rest = Rest(lambda: server.wall)
    server.night()
    server.sees("a", new_samples=2)
    until = datetime.fromtimestamp(server.wall + DAY).isoformat(" ", "minutes")
    assert (rest.look(server.state), rest.text) == (True, f"until {until} (--every 24h)")
    server.wall += DAY
    assert (rest.look(server.state), rest.text) == (False, "2 new labelled samples, fewer than --min-new 5")
    server.sees("b", new_samples=3)
    assert (rest.look(server.state), rest.text) == (False, "")
    assert [record.message for record in caplog.records if "rests" in record.message] == [
        f"the run rests: until {until} (--every 24h)",
        "the run rests: 2 new labelled samples, fewer than --min-new 5",
        "the run rests no more",
    ]


def test_a_class_that_is_added_during_a_session_does_not_move_the_next_one() -> None:
    first = Standing().opened(1000.0)
    added = first.with_news()
    limits = Limits(round_timeout=1, min_updates=1, max_repeats=None, enough=1, every="24h")
    assert added.due(limits, 1500.0) == 0
    assert added.opened(1500.0).next([]).due(limits, 2000.0) == 1000.0 + DAY


def test_repeats_end_a_standing_run_as_well(vit: Built) -> None:
    run = started(vit, schedule=NIGHT, max_repeats=0, min_updates=2)
    run.now += 1e6
    run.feed()
    assert "the run ends" in run.of(Stop)[0].error


def test_what_a_hundred_sessions_leave_is_bounded(vit: Built, tmp_path: Path) -> None:
    """Photos, classes and devices come and go."""
    server = opened(vit, tmp_path / "run", keep_rounds=40, stage1_rounds=1, head_sums="none")
    sizes, kept = {}, KeptExperts(server.store.folder)
    for night in range(1, 121):
        assert server.night()
        kept.write(server.state.made, server.state.expert)
        if night % 30 == 0:
            server.feed(OperatorActed(Operation(action=Action.CLASSES, classes=(f"class-{night}",))))
            server.tick()
            assert server.night().count(Stage.GLOBAL) == 3
        for name in ABC:
            server.sees(name, new_samples=0, online=(night + ord(name)) % 5 != 0)
        server.sees("abc"[night % 3], new_samples=night % 7 + 1)
        server.sees("abc"[(night + 1) % 3])
        server.sees("abc"[(night + 2) % 3])
        if night in (60, 120):
            sizes[night] = sizes_of(server.store)
    assert len(server.plan.bundle.classes) == len(CLASSES) + 4
    assert len(server.store.rounds.all()) == 40
    assert len(list((server.store.folder / "tasks").iterdir())) == 2
    assert len(list(server.store.events())) < 20
    for kind in ("database", "tensors", "other"):
        assert sizes[120][kind] < 1.2 * sizes[60][kind]
    assert sum(server.store.rounds.counts().values()) == server.state.round
