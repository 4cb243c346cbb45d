"""The coordinator and its store against a simple model of rounds: random events in random order, with crashes."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from benchmarks.layouts import layout_bundle, update_of
from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.discriminant import discriminant_head, with_former_rows
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.protocol.messages import DeviceStatus, Round, Stage, Sums, Update, Verdict
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import blob_hash, pack
from trainer_server.config import Aggregation, Head, Rule, RunConfig, Selection
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import (
    AnnounceRound,
    ClockTicked,
    Command,
    Event,
    LimitsChanged,
    SendAck,
    StatusSeen,
    Stop,
    StoreRound,
    UpdateRefused,
    UpdateSeen,
)
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.state import Plan, initial_state
from trainer_server.service.lifecycle import make_plan, open_run, replay_rounds, restore_state
from trainer_server.storage.checkpoint import vectors_of
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.run_store import RunStore

TIMEOUT, JOIN, MAX_NORM, MAX_SAMPLES = 100.0, 50.0, 50.0, 1000
DEVICES = ["a", "b", "c", "d"]
UNMERGED = (Stage.BASELINE, Stage.EVALUATE)
TRAINED = {Stage.GLOBAL: "expert", Stage.PERSONAL: "gate"}
# flaw of an update → what it changes in the header
HEADERS: dict[str, dict[str, Any]] = {
    "run": {"run": "other"},
    "session": {"session": "former"},
    "stage": {"stage": Stage.FINISHED},
    "samples": {"samples": MAX_SAMPLES + 1},
    "level": {"level": 1000},
    "accuracy": {"metrics": {"held_out_global": 1e308}},
}
FLAWS = ["", "", "", "", *HEADERS, "nan", "shape", "norm", "missing"]
BUNDLE: list[TaskBundle] = []
DONE: Counter[str] = Counter()


class Machine(RuleBasedStateMachine):
    """Feeds the same events to the coordinator and to the model, a few plain variables, and compares them."""

    @initialize(
        min_updates=st.integers(1, 2),
        enough=st.sampled_from([0.5, 1.0]),
        selection=st.sampled_from(Selection),
        staleness=st.integers(0, 2),
        max_repeats=st.sampled_from([None, 1]),
        aggregation=st.sampled_from([Rule.MEAN, Rule.MEDIAN]),
        baseline=st.booleans(),
        audit=st.booleans(),
        stored=st.sampled_from([False, False, True]),
    )
    def begin(
        self,
        min_updates: int,
        enough: float,
        selection: Selection,
        staleness: int,
        max_repeats: int | None,
        aggregation: Rule,
        baseline: bool,
        audit: bool,
        stored: bool,
    ) -> None:
        DONE["sequences"] += 1
        sal = Sal(CapabilityQueue(2, 0.02), max_level=2)
        self.config = RunConfig(
            run="r", devices=2, min_updates=min_updates, enough=enough, select=selection,
            fraction=0.5 if selection is Selection.RANDOM else 1.0, max_staleness=staleness, max_repeats=max_repeats,
            join_timeout=JOIN, round_timeout=TIMEOUT, max_norm=MAX_NORM, max_samples=MAX_SAMPLES, stage1_rounds=3,
            stage2_rounds=2, stage1_sal=sal, stage2_sal=sal, baseline=baseline, audit=audit, secure_sums=False,
            head=Head.CLASS_MEANS, head_sums=Sums.FEATURES,
            aggregation=Aggregation(rule=aggregation, norm_factor=None, weight_cap=None),
        )  # fmt: skip
        self.blobs: dict[str, Tensors] = {}
        self.folder = tempfile.TemporaryDirectory() if stored else None
        self.store: RunStore | None = None
        if self.folder:
            self.store = open_run(Path(self.folder.name) / "run", self.config, BUNDLE[0])
        self.plan = make_plan(self.store, BUNDLE[0]) if self.store else self._plan_in_memory()
        self.state, self.now = initial_state(self.plan, 0.0), 0.0
        self.announced: list[Round] = []
        # the model
        self.over = False
        self.stages = [Stage.STATISTICS, *[Stage.GLOBAL] * 3, Stage.HEAD, *[Stage.PERSONAL] * 2]
        self.stages += [*[Stage.BASELINE] * baseline, Stage.EVALUATE, Stage.FINISHED]
        self.position, self.round, self.opened, self.repeats = -1, 0, 0.0, 0
        self.timeout, self.least, self.stretch = TIMEOUT, min_updates, 1
        self.slowest: dict[Stage, float] = {}
        self.known: dict[str, bool] = {}  # device → whether it is online, and ours
        self.strange: set[str] = set()  # devices with another bundle
        self.refused: dict[str, tuple[int, int]] = {}  # device → rounds with a refused update, and the last of them
        self.asked: set[str] = set()
        self.history: dict[
            int, tuple[Stage, set[str] | None]
        ] = {}  # round → stage, and the selected devices unless all are
        self.accepted: dict[tuple[int, str], Update] = {}
        self.counted: set[tuple[int, str]] = set()
        self.taught: dict[tuple[int, str], Tensors] = {}
        for device in ("a", "b"):
            self.status(device, True, 1)

    def teardown(self) -> None:
        if getattr(self, "store", None):
            if self.config.audit:
                assert list(replay_rounds(self.store, self.plan)) == self.announced
            self.store.close()
        if getattr(self, "folder", None):
            self.folder.cleanup()

    def _plan_in_memory(self) -> Plan:
        return Plan(self.config, BUNDLE[0], "s", self.blobs.__getitem__)

    # rules

    @precondition(lambda self: not self.over)
    @rule(device=st.sampled_from(DEVICES), online=st.sampled_from([True, True, False]), ours=st.integers(0, 5))
    def status(self, device: str, online: bool, ours: int) -> None:
        bundle = BUNDLE[0].sha256 if ours else "f" * 64
        self.feed(StatusSeen(DeviceStatus(device=device, online=online, bundle=bundle, level_cap=len(device))))
        self.known[device] = online and bool(ours)
        if online:  # one that leaves keeps its error
            self.strange = self.strange - {device} if ours else self.strange | {device}
        assert self.state.online == {name for name, there in self.known.items() if there}

    @precondition(lambda self: not self.over and self.announced)
    @rule(
        device=st.sampled_from(DEVICES), shift=st.sampled_from([0, 0, 0, 0, -1, -2, -3, 1]), flaw=st.sampled_from(FLAWS)
    )
    def send(self, device: str, shift: int, flaw: str) -> None:
        present_round = self.announced[-1]
        number = max(present_round.round + shift, 0)
        invented = present_round.model_copy(update={"round": number})
        task = next((announced for announced in self.announced if announced.round == number), invented)
        update, tensors = update_of(BUNDLE[0], device, task, 2)
        flawed = flaw in HEADERS
        update = update.model_copy(update=HEADERS.get(flaw, {}))
        if tensors and flaw in ("nan", "shape", "norm", "missing"):
            first, flawed = next(iter(tensors)), True
            tensor = np.asarray(tensors[first], np.float32)
            changed = {"nan": tensor * np.nan, "shape": tensor[:1, :1], "norm": tensor + np.float32(1e9)}
            tensors = {**tensors, first: changed[flaw]} if flaw in changed else {"x": tensor}
        wanted = self.verdict(update, flawed)
        blob = pack(update, tensors)
        sha256 = blob_hash(blob)
        self.blobs[sha256] = tensors
        if wanted is Verdict.ACCEPTED and self.store:  # the file is whole before its event is committed
            (self.store.blobs.folder / sha256).write_bytes(blob)
        commands = self.feed(UpdateSeen(update, tensors, sha256, len(blob)))
        (reply,) = [c for c in commands if isinstance(c, SendAck)]
        assert reply.ack.verdict is wanted, (wanted, reply.ack)
        if wanted is Verdict.ACCEPTED:
            self.accepted[update.round, device] = update
            self.counted.add((update.round, device))
            self.taught[update.round, device] = tensors
            self.refused.pop(device, None)
            if update.round == self.round and update.stage not in UNMERGED:
                self.slowest[update.stage] = max(self.slowest.get(update.stage, 0.0), self.now - self.opened)
        elif self.counts_against(update, wanted):
            times, latest = self.refused.get(device, (0, 0))
            self.refused[device] = (times + (latest != self.round), self.round)
        assert self.state.updates.keys() == self.accepted.keys()

    @precondition(lambda self: not self.over and self.announced)
    @rule()
    def answers(self) -> None:
        """Every selected device sends an update and the round closes. Without this rule few runs get past a round."""
        for device in sorted(self.asked):
            if (self.round, device) not in self.counted:
                self.send(device, 0, "")
        self.tick(0.0, False)

    @precondition(lambda self: not self.over)
    @rule(timeout=st.sampled_from([TIMEOUT, 3 * TIMEOUT]), least=st.integers(1, 2))
    def resume(self, timeout: float, least: int) -> None:
        """The operator resumes the run with other limits."""
        self.timeout, self.least = timeout, least
        limits = Limits.of(self.config).model_copy(update={"round_timeout": timeout, "min_updates": least})
        self.feed(LimitsChanged(limits))
        assert self.state.limits == limits

    @precondition(lambda self: not self.over)
    @rule(
        seconds=st.sampled_from([0.0, 0.0, 0.0, 1.0, JOIN, TIMEOUT, 1e6]),
        dies=st.sampled_from([False, False, True]),
        busy=st.booleans(),
    )
    def tick(self, seconds: float, dies: bool, busy: bool = False) -> None:
        self.now += seconds
        before, closing = self.state, self.stages[self.position] if self.announced else None
        lasts_longer = busy and self.may_last_longer()
        closes = self.must_close() and not lasts_longer
        commands = self.feed(ClockTicked(frozenset(DEVICES if busy else [])), keep=not dies)
        if dies:
            self.crash()
        stops = [c for c in commands if isinstance(c, Stop)]
        opened = [c.round for c in commands if isinstance(c, AnnounceRound)]
        self.over = bool(stops)
        if closing is None:
            ready, late = len(before.online), self.now >= JOIN
            starts = ready >= 2 or (late and ready >= self.least)
            assert bool(opened) == starts
            assert self.over == (late and not starts)
            if starts:
                self.open(0, opened[0])
            return
        assert bool(opened) == closes
        if lasts_longer:
            self.stretch *= 2
            DONE["longer rounds"] += 1
        assert self.state.stretch == self.stretch or closes
        if not closes:
            return
        (record,) = [c.closed for c in commands if isinstance(c, StoreRound)]
        assert set(record.updates) == {device for _, device in self.accepted}
        enough = len(self.accepted) >= self.least
        assert bool(record.repeated) != enough
        for stage, kind in TRAINED.items():
            self.check_vector(
                kind, getattr(before, kind), closing is stage and enough, closing is Stage.HEAD and enough
            )
        assert self.state.sal.level >= before.sal.level
        given_up = not enough and self.config.max_repeats is not None and self.repeats >= self.config.max_repeats
        self.repeats = 0 if enough else self.repeats + 1
        quick = 2 * (self.now - self.opened) < self.seconds()
        self.stretch = 1 if not enough else max(self.stretch // 2, 1) if quick else self.stretch
        following = self.position + 1 if enough else len(self.stages) - 1 if given_up else self.position
        assert self.over == (following == len(self.stages) - 1)
        self.open(following, opened[0])
        DONE[f"rounds of {closing.value}"] += enough

    @precondition(lambda self: self.store and not self.over)
    @rule(leftover=st.booleans())
    def crash(self, leftover: bool = False) -> None:
        """The process is killed, with `leftover` between a tensor file and its event. Only the folder is left."""
        if self.store is None:
            return
        DONE["crashes"] += 1
        if leftover:
            (self.store.blobs.folder / ("0" * 64)).write_bytes(b"half a file")
        self.store.close()
        self.store = RunStore(self.store.folder)
        self.plan = make_plan(self.store, BUNDLE[0])
        before = self.state
        self.state, _ = restore_state(self.store, self.plan)
        for name, vector in vectors_of(before).items():
            assert vectors_of(self.state)[name].tobytes() == vector.tobytes()
        for field in (
            "position",
            "round",
            "repeats",
            "announced",
            "devices",
            "expected",
            "refused",
            "limits",
            "stretch",
            "slowest",
            "updates",
            "recent",
            "counted",
            "sal",
        ):
            assert getattr(self.state, field) == getattr(before, field), field

    @precondition(lambda self: self.over)
    @rule()
    def rest(self) -> None:
        """A finished run does not change."""

    # the I/O loop without the network

    def feed(self, event: Event, keep: bool = True) -> list[Command]:
        DONE["steps"] += 1
        before = self.state
        self.state, commands = advance(self.plan, before, event, self.now)
        self.announced += [c.round for c in commands if isinstance(c, AnnounceRound)]
        if self.store and self.state is not before:
            if isinstance(event, UpdateSeen) and (event.update.round, event.update.device) not in self.state.updates:
                event = UpdateRefused(event.update.device)
            self.store.commit([LoggedEvent(self.now, event)], [c.closed for c in commands if isinstance(c, StoreRound)])
            if any(isinstance(command, AnnounceRound) for command in commands) and keep:
                self.store.save_checkpoint(self.state, self.now)
                if not self.config.audit:
                    assert len(list(self.store.blobs.folder.iterdir())) == 1
        return commands

    # the model

    def open(self, position: int, opened: Round) -> None:
        online = {name for name, there in self.known.items() if there}
        self.position, self.round, self.opened = position, self.round + 1, self.now
        assert (opened.round, opened.stage) == (self.round, self.stages[position])
        if opened.stage in UNMERGED:
            self.stretch = 1
        able = {name for name in online if not self.is_left_out(name)}
        able = able if len(able) >= self.least else online
        self.asked = set(opened.chosen) or able
        self.history[self.round] = (opened.stage, set(opened.chosen) or None)
        assert self.asked <= able
        if opened.stage in TRAINED and not self.repeats and self.config.select is Selection.RANDOM:
            wanted = max(math.ceil(len(able) / 2), self.least)
            assert len(self.asked) == min(wanted, len(able))
        elif opened.stage not in TRAINED or self.repeats:
            assert self.asked == able
        self.accepted = {}
        oldest = self.round - max(2, self.config.max_staleness)
        self.counted = {key for key in self.counted if key[0] >= oldest}

    def is_left_out(self, device: str) -> bool:
        times, latest = self.refused.get(device, (0, 0))
        return times >= 3 and latest < self.round <= latest + 10

    def counts_against(self, update: Update, verdict: Verdict) -> bool:
        ours = update.run == "r" and update.session == self.plan.session
        refused = verdict is Verdict.REJECTED and update.round == self.round
        return ours and refused and update.device in self.asked

    def awaited(self) -> set[str]:
        """The asked devices that have not answered and may still do so."""
        refused = {name for name, (_, latest) in self.refused.items() if latest == self.round}
        return self.asked - self.strange - refused - {device for _, device in self.accepted}

    def seconds(self) -> float:
        """The length of the present round."""
        stage, repetitions = self.stages[self.position], self.announced[-1].repetitions
        alike = {
            Stage.BASELINE: self.slowest.get(Stage.GLOBAL, 0.0),
            Stage.EVALUATE: max(self.slowest.values(), default=0),
        }
        return self.stretch * max(self.timeout, 3 * repetitions * alike.get(stage, 0.0))

    def may_last_longer(self) -> bool:
        late = self.announced and not self.is_complete() and self.now - self.opened >= self.seconds()
        at_work = self.awaited() & {name for name, there in self.known.items() if there}
        return bool(late and len(self.accepted) < self.least and at_work and self.stretch < 16)

    def must_close(self) -> bool:
        return bool(self.announced) and (self.is_complete() or self.now - self.opened >= self.seconds())

    def is_complete(self) -> bool:
        share = self.config.enough if self.stages[self.position] in TRAINED else 1.0
        who = [device for _, device in self.accepted if self.config.max_staleness or device in self.asked]
        needed = self.awaited() | {device for _, device in self.accepted if device in self.asked}
        return len(self.accepted) >= self.least and len(who) >= share * len(needed)

    def verdict(self, update: Update, flawed: bool) -> Verdict:
        age = self.round - update.round
        if update.run != "r" or update.session != self.plan.session or update.device not in self.known:
            return Verdict.REJECTED
        if (update.round, update.device) in self.counted:
            return Verdict.DUPLICATE
        if age < 0:
            return Verdict.REJECTED
        stage, chosen = self.history.get(update.round, (None, None))
        if age > self.config.max_staleness or stage is not self.stages[self.position]:
            return Verdict.LATE
        uninvited = chosen is not None and update.device not in chosen
        return Verdict.REJECTED if uninvited or flawed or update.stage is not stage else Verdict.ACCEPTED

    def check_vector(self, kind: str, before: Any, learns: bool, has_new_head: bool) -> None:
        """Every part is the mean or median over the devices that trained it, computed in float64. A new head is that of
        all devices' sums."""
        if kind == "expert" and self.stages[self.position] is Stage.STATISTICS:
            return
        layout, wanted = getattr(BUNDLE[0], kind), np.asarray(before, np.float64)
        if learns:
            names = {key: self.state_of(key, layout) for key in self.accepted}
            for part in layout.parts.values():
                vectors = [(w, vector[part]) for w, vector in names.values() if vector.size >= part.stop]
                if vectors and self.config.aggregation.rule is Rule.MEAN:
                    wanted[part] += sum(w * v for w, v in vectors) / sum(w for w, _ in vectors)
                elif vectors:
                    wanted[part] += np.median([v for _, v in vectors], axis=0)
        if has_new_head and kind == "expert":
            names = ("class_sums", "class_counts", "second_moments")
            sums = [np.sum([self.taught[key][name] for key in sorted(self.accepted)], axis=0) for name in names]
            head = layout.parts["head"]
            wanted[head] = with_former_rows(discriminant_head(*sums), np.asarray(wanted[head], np.float32), sums[1])
            assert np.allclose(self.state.expert, wanted, rtol=1e-2, atol=1e-4 * np.abs(wanted).max())
        else:
            assert np.allclose(getattr(self.state, kind), wanted, rtol=1e-5, atol=1e-6)

    def state_of(self, key: tuple[int, str], layout: Any) -> tuple[float, Any]:
        update = self.accepted[key]
        tensors = self.taught[key]
        vector = np.concatenate([np.ravel(tensors[slot.name]) for slot in layout.slots if slot.name in tensors])
        return update.samples / math.sqrt(1 + self.round - update.round), vector.astype(np.float64)


def test_the_coordinator_agrees_with_a_simple_model_of_rounds(
    tmp_path_factory: pytest.TempPathFactory, full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    BUNDLE[:] = [layout_bundle(tmp_path_factory.mktemp("tiny"), 2, hidden=4, blocks=3, rank=1, classes=2)]
    DONE.clear()
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=10_000 if full else 100,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    with capsys.disabled():
        print(f" {dict(DONE)}", end="")
