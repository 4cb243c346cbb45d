"""The daemon's decisions, and the device's disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_runtime.daemon.retransmit import Retransmissions
from edge_runtime.daemon.state import (
    MOST_RETURNS,
    Acknowledge,
    AckOverdue,
    AckSeen,
    Command,
    Event,
    Fetch,
    GlobalArrived,
    Idle,
    Log,
    OwnStatusSeen,
    PublishStatus,
    Reconnected,
    RoundSeen,
    Send,
    ServerSeen,
    State,
    Stop,
    Work,
    WorkDone,
    WorkFailed,
    WorkSkipped,
    advance,
    is_outdated,
)
from edge_runtime.daemon.timing import ACK_TIMEOUT
from edge_runtime.store import DeviceStore
from edge_runtime.store.device_store import name_of_host
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.duplicate_name import DuplicateNameGuard
from fedfmsl.protocol.messages import Ack, DeviceStatus, Round, ServerStatus, Stage, Training, Update, Verdict
from fedfmsl.protocol.tensors import blob_hash, pack
from fedfmsl.protocol.topics import check_name

BUNDLE, OTHER_BUNDLE, E, E1, E2, G, H = (digit * 64 for digit in "0123456")
SAL = Sal(CapabilityQueue(2, 0.1), max_level=2)
HERE = ServerSeen(ServerStatus(online=True, run="r", session="s", bundle=BUNDLE))


def round_(number: int, stage: Stage = Stage.GLOBAL, session: str = "s", **globals_: str) -> Round:
    fields: dict[str, Any] = {"index": 0, "of": 1, "level": 1, "sal": SAL, **globals_}
    training = Training(epochs=1, learning_rate=1.0)
    return Round(run="r", session=session, round=number, stage=stage, training=training, **fields)


def ack(number: int, verdict: Verdict = Verdict.ACCEPTED, session: str = "s") -> Ack:
    return Ack(run="r", session=session, round=number, device="d", verdict=verdict)


def device(**fields: Any) -> State:
    return State(device="d", guard=DuplicateNameGuard("me"), bundle=BUNDLE, **fields)


def drive(events: Sequence[Event], state: State | None = None) -> tuple[State, list[Command]]:
    """The state after some events, and all commands."""
    state, commands = state or device(), []
    for event in events:
        state, more = advance(state, event)
        commands += more
    return state, commands


def test_a_round_is_fetched_computed_sent_and_acknowledged() -> None:
    task = round_(1, expert=E, start=H, gate=G)
    state, commands = drive([HERE, RoundSeen(task), Idle()])
    assert commands == [Fetch(E), Fetch(G), Fetch(H)]
    state, commands = drive([GlobalArrived(E), Idle(), GlobalArrived(G), GlobalArrived(H), Idle()], state)
    assert commands == [Work(task)]
    state, commands = drive([WorkDone(1), AckSeen(ack(1)), Idle()], state)
    assert commands == [Send(1), Acknowledge(ack(1))]
    assert not state.unacknowledged


def test_only_globals_that_are_not_held_are_fetched() -> None:
    state, _ = drive([HERE, RoundSeen(round_(1, expert=E1, gate=G)), GlobalArrived(E1), GlobalArrived(G), Idle()])
    state, commands = drive([WorkDone(1), RoundSeen(round_(2, expert=E2, gate=G))], state)
    assert commands[0] == Send(1)
    commands = commands[1:]
    assert commands == [Fetch(E2)]
    state, commands = drive([GlobalArrived(E2), Idle()], state)
    assert commands == [Work(round_(2, expert=E2, gate=G))]
    assert state.stored == {E2, G}  # what is no longer named is no longer kept


def test_a_round_that_cannot_be_computed_is_skipped_and_not_tried_again() -> None:
    state, _ = drive([HERE, RoundSeen(round_(1)), Idle(), WorkSkipped(1)])
    assert drive([Idle()], state)[1] == []
    assert drive([RoundSeen(round_(2)), Idle()], state)[1] == [Work(round_(2))]


@pytest.mark.parametrize("order", [(HERE, RoundSeen(round_(1, expert=E))), (RoundSeen(round_(1, expert=E)), HERE)])
def test_server_and_round_may_be_announced_in_either_order(order: tuple[Event, ...]) -> None:
    assert drive([*order, GlobalArrived(E), Idle()])[1] == [Fetch(E), Work(round_(1, expert=E))]


def test_of_several_waiting_rounds_only_the_newest_is_worked_on() -> None:
    rounds = [RoundSeen(round_(number)) for number in (1, 2, 3)]
    assert drive([HERE, *rounds, Idle(), Idle()])[1] == [Work(round_(3))]


def test_a_newer_round_waits_until_the_computation_has_ended() -> None:
    state, commands = drive([HERE, RoundSeen(round_(1)), Idle(), RoundSeen(round_(1)), Idle()])
    assert commands == [Work(round_(1))] and not is_outdated(state)
    state, commands = drive([RoundSeen(round_(2)), Idle()], state)
    assert commands == [] and is_outdated(state)
    for ended, update in ((WorkDone(1), [Send(1)]), (WorkFailed(1), [])):
        after, commands = drive([ended, Idle()], state)
        assert commands == [*update, Work(round_(2))] and not is_outdated(after)


def test_a_finished_run_is_left_only_after_the_computation() -> None:
    state, _ = drive([HERE, RoundSeen(round_(1)), Idle()])
    state, commands = drive([RoundSeen(round_(9, Stage.FINISHED)), Idle()], state)
    assert commands == [] and is_outdated(state)
    assert drive([WorkDone(1), Idle()], state)[1] == [Send(1), Stop()]


def test_an_update_is_sent_once_its_server_is_back() -> None:
    state, _ = drive([HERE, RoundSeen(round_(1)), Idle(), GONE])
    state, commands = drive([WorkDone(1)], state)
    assert commands == []
    assert Send(1) in drive([HERE], state)[1]


def test_a_round_announced_again_is_not_worked_on_again() -> None:
    state, _ = drive([HERE, RoundSeen(round_(1)), Idle(), WorkDone(1)])
    assert drive([RoundSeen(round_(1)), Idle()], state)[1] == []
    restarted = device(session="s", last_started=1)  # its update is in the outbox, or was acknowledged
    assert drive([HERE, RoundSeen(round_(1)), Idle()], restarted)[1] == []


def test_a_round_that_selects_other_devices_is_ignored() -> None:
    for_others, for_all = round_(1, expert=E, chosen=("a", "b")), round_(2, Stage.EVALUATE, expert=E)
    state, commands = drive([HERE, RoundSeen(for_others), Idle(), Idle()])
    assert commands == []
    assert drive([RoundSeen(for_all), GlobalArrived(E), Idle()], state)[1] == [Fetch(E), Work(for_all)]
    for_us = round_(2, chosen=("b", "d"))
    assert drive([RoundSeen(for_us), Idle()], state)[1] == [Work(for_us)]


def test_a_failed_round_is_computed_again_unless_there_is_a_newer_one() -> None:
    state, _ = drive([HERE, RoundSeen(round_(4)), Idle()])
    assert drive([WorkFailed(4), Idle()], state)[1] == [Work(round_(4))]
    assert drive([WorkFailed(4), RoundSeen(round_(5)), Idle(), Idle()], state)[1] == [Work(round_(5))]


UNACKNOWLEDGED = device(session="s", last_started=4, unacknowledged=frozenset({4, 2}))
GONE = ServerSeen(HERE.status.model_copy(update={"online": False}))
OTHER_SESSION = ServerSeen(HERE.status.model_copy(update={"session": "s2"}))


@pytest.mark.parametrize("event", [HERE, Reconnected(), AckOverdue()], ids=str)
def test_unacknowledged_updates_are_sent_again_whenever_they_may_have_been_lost(event: Event) -> None:
    state, commands = drive([HERE], UNACKNOWLEDGED)
    assert commands == [Send(2), Send(4)]
    state, commands = drive([event, AckSeen(ack(2, Verdict.LATE)), event], state)
    assert commands == [Send(2), Send(4), Acknowledge(ack(2, Verdict.LATE)), Send(4)]


@pytest.mark.parametrize("event", [Reconnected(), AckOverdue(), Idle()], ids=str)
@pytest.mark.parametrize("server", [GONE, OTHER_SESSION], ids=["gone", "of another session"])
def test_unacknowledged_updates_are_sent_to_the_server_of_their_session_and_to_no_other(
    event: Event, server: ServerSeen
) -> None:
    state, _ = drive([HERE, server], UNACKNOWLEDGED)
    state, commands = drive([event], state)
    assert commands == []
    assert drive([HERE], state)[1][-2:] == [Send(2), Send(4)]


def test_a_server_that_goes_offline_is_logged_once_and_so_is_its_return() -> None:
    said = [command for command in drive([HERE, GONE, GONE, Idle(), HERE, HERE])[1] if isinstance(command, Log)]
    assert [say.text for say in said] == [
        "the server of run r is offline; waiting for it",
        "the server of run r is online",
    ]
    assert drive([HERE, RoundSeen(round_(9, Stage.FINISHED)), GONE])[1] == []  # it has nothing more to do


def test_ack_timeouts_grow_to_a_limit_and_differ_between_devices() -> None:
    waits = [ACK_TIMEOUT.delay(attempt, "d") for attempt in range(9)]
    assert all(30 * 2**n <= wait <= 45 * 2**n for n, wait in enumerate(waits[:4]))
    assert all(300 <= wait <= 450 for wait in waits[4:])
    assert ACK_TIMEOUT.delay(2000, "d") <= 450
    fleet = [ACK_TIMEOUT.delay(0, f"device-{n}") for n in range(300)]
    assert all(sum(30 + 1.5 * tenth <= wait < 31.5 + 1.5 * tenth for wait in fleet) >= 20 for tenth in range(10))


def test_missing_chunks_are_sent_again_and_nothing_else() -> None:
    state = device(session="s", unacknowledged=frozenset({1}))
    asked = ack(1, Verdict.INCOMPLETE).model_copy(update={"missing": (2, 5)})
    state, commands = drive([AckSeen(asked)], state)
    assert commands == [Send(1, (2, 5))]
    assert drive([AckSeen(asked.model_copy(update={"round": 2}))], state)[1] == []
    assert drive([AckSeen(ack(1))], state)[1] == [Acknowledge(ack(1))]


@pytest.mark.parametrize("verdict", [each for each in Verdict if each is not Verdict.INCOMPLETE])
def test_any_verdict_acknowledges_an_update_once(verdict: Verdict) -> None:
    state = device(session="s", unacknowledged=frozenset({1}))
    assert drive([AckSeen(ack(1, verdict)), AckSeen(ack(1, verdict))], state)[1] == [Acknowledge(ack(1, verdict))]
    assert drive([AckSeen(ack(1, verdict, session="before"))], state)[1] == []


def test_a_device_that_took_part_stops_when_the_run_has_finished() -> None:
    finished = RoundSeen(round_(9, Stage.FINISHED))
    state, _ = drive([HERE, RoundSeen(round_(1)), Idle(), WorkDone(1)])
    assert drive([finished, Idle()], state)[1] == [Stop()]
    assert drive([HERE, finished, Idle()])[1] == []  # without globals, it waits for the next run of that name


@pytest.mark.parametrize("end", [HERE, GONE])
@pytest.mark.parametrize("earlier", ["", "before"])
def test_a_device_that_took_no_part_personalizes_itself_from_the_finished_run(end: ServerSeen, earlier: str) -> None:
    finished = round_(9, Stage.FINISHED, expert=E, gate=G)
    before = device(session=earlier, last_started=4, unacknowledged=frozenset({4}))
    for order in ([end, RoundSeen(finished)], [RoundSeen(finished), end]):
        state, commands = drive([*order, Idle()], before)
        assert [each for each in commands if isinstance(each, Fetch)] == [Fetch(E), Fetch(G)]
        state, (say, work) = drive([GlobalArrived(E), Idle(), GlobalArrived(G), Idle()], state)
        assert isinstance(say, Log) and work == Work(finished)
        failed, commands = drive([WorkFailed(9), Idle()], state)
        assert commands == [work] and failed.last_started == 4  # again, and the log says so once
        assert is_outdated(drive([RoundSeen(round_(1, session="s2"))], state)[0])
        state, commands = drive([WorkDone(9), Idle()], state)
        assert commands == [Stop()]  # nothing is sent
        assert (state.session, state.run, state.last_started, state.unacknowledged) == ("s", "r", 9, frozenset())


def test_a_late_device_needs_the_bundle_and_the_task_of_the_finished_run() -> None:
    finished = RoundSeen(round_(9, Stage.FINISHED, expert=E, gate=G))
    for change in ({"bundle": OTHER_BUNDLE}, {"session": "s2"}):
        gone = ServerSeen(GONE.status.model_copy(update=change))
        assert not any(isinstance(each, Fetch | Stop) for each in drive([finished, gone, Idle()])[1])
    _, commands = drive([finished, ServerSeen(GONE.status.model_copy(update={"task": "7" * 64})), Idle()])
    assert commands[-1] == Stop(anew=True)


def test_the_end_of_an_earlier_run_does_not_end_a_device_of_the_next_one() -> None:
    finished, restarted = RoundSeen(round_(9, Stage.FINISHED)), device(session="s", last_started=8)
    gone = ServerSeen(OTHER_SESSION.status.model_copy(update={"online": False}))
    for server in (OTHER_SESSION, gone):
        for events in ([server, finished, Idle()], [finished, Idle(), server, Idle()]):
            state, commands = drive(events, restarted)
            assert not any(isinstance(command, Stop) for command in commands)
            work = Work(round_(1, session="s2"))
            assert work in drive([OTHER_SESSION, RoundSeen(round_(1, session="s2")), Idle()], state)[1]
    assert Stop() in drive([GONE, finished, Idle()], restarted)[1]


def test_a_run_with_another_bundle_is_an_error() -> None:
    other = ServerStatus(online=True, run="r", session="s", bundle=OTHER_BUNDLE, model="vit-b16")
    _, (command,) = drive([ServerSeen(other)])
    assert isinstance(command, Stop)
    assert "another bundle (model vit-b16" in command.error
    (say,) = drive([ServerSeen(other.model_copy(update={"online": False}))])[1]
    assert isinstance(say, Log)


def test_a_run_with_another_task_begins_anew() -> None:
    other = HERE.status.model_copy(update={"task": "7" * 64})
    _, (say, command) = drive([ServerSeen(other)])
    assert isinstance(say, Log) and "another task (SHA-256 777777777777…)" in say.text
    assert command == Stop(anew=True)


def test_a_round_of_a_server_that_is_gone_waits_for_the_next_server() -> None:
    state, commands = drive([HERE, GONE, RoundSeen(round_(5, expert=E)), Idle()])
    assert [command for command in commands if not isinstance(command, Log)] == []
    state, commands = drive([OTHER_SESSION, Idle(), RoundSeen(round_(1, session="s2")), Idle()], state)
    assert commands[1:] == [Work(round_(1, session="s2"))]


def test_a_run_that_is_started_anew_is_logged() -> None:
    state, _ = drive([HERE, RoundSeen(round_(3)), Idle(), WorkDone(3)])
    _, commands = drive([OTHER_SESSION, RoundSeen(round_(1, session="s2")), Idle()], state)
    assert commands == [
        Log("run 'r' was started anew (session s2); starting with round 1"),
        Work(round_(1, session="s2")),
    ]
    _, (log, _) = drive([OTHER_SESSION, RoundSeen(round_(4, session="s2")), Idle()], state)
    assert log == Log("run 'r' goes on (session s2); starting with round 4")
    _, (log, _) = drive([OTHER_SESSION, RoundSeen(round_(1, session="s2")), Idle()], device(session="s", run="other"))
    assert log == Log("this device changed from run 'other' to 'r'; starting with round 1")


def seen(instance: str, online: bool = True) -> OwnStatusSeen:
    return OwnStatusSeen(DeviceStatus(device="d", online=online, instance=instance))


def test_a_status_from_before_its_own_is_from_an_earlier_process() -> None:
    former = [seen("before"), seen("me"), seen("before"), seen("me", online=False)]
    state, commands = drive([HERE, RoundSeen(round_(1)), *former, Idle()])
    assert commands == [Work(round_(1))]
    assert drive([seen("before", online=False)], state)[1] == [PublishStatus()]  # its last will comes late


def test_a_device_stops_for_a_newer_process_of_its_name_and_names_the_remedy() -> None:
    _, commands = drive([seen("me"), seen("newer")])
    (leave,) = commands
    assert isinstance(leave, Stop)
    assert leave.quietly
    assert "duplicate device name 'd'" in leave.error and "--device" in leave.error


def test_of_two_processes_that_end_each_others_connection_the_older_one_leaves() -> None:
    """A broker with one connection per identity: each one that connects receives the other one's last will."""
    older, commands = drive([seen("me"), seen("newer", online=False)])
    assert commands == [PublishStatus()]  # the newer process may have ended
    newer = State(device="d", guard=DuplicateNameGuard("newer"), bundle=BUNDLE)
    newer, _ = drive([seen("me", online=False), seen("newer")], newer)
    for _ in range(3):
        newer, commands = drive([seen("me", online=False), seen("newer")], newer)
        assert commands == [PublishStatus()]
    (leave,) = drive([seen("me"), seen("newer", online=False)], older)[1]
    assert isinstance(leave, Stop) and leave.quietly and "a newer process took over" in leave.error


@pytest.mark.parametrize("online", [True, False], ids=["status", "last will"])
def test_of_two_processes_that_take_each_other_for_the_earlier_one_exactly_one_leaves(online: bool) -> None:
    """On such a broker each may see the other's last will before its own status, if they start at the same time."""
    states = {
        name: drive(
            [seen(other, online=False), seen(name)], State(device="d", guard=DuplicateNameGuard(name), bundle=BUNDLE)
        )[0]
        for name, other in (("a", "b"), ("b", "a"))
    }
    left = []
    for _ in range(MOST_RETURNS):
        for name, other in (("a", "b"), ("b", "a")):
            statuses = [seen(other, online)] * 3  # one connection, and so one return
            states[name], commands = drive([Reconnected(), *statuses, seen(name)], states[name])
            left += [name for command in commands if isinstance(command, Stop)][:1]
    assert left == ["a"]


@given(st.permutations("abcde"), st.data())
def test_of_any_number_of_processes_with_one_name_the_newest_stays(names: list[str], data: st.DataObject) -> None:
    """Each subscribes at any time before it publishes its status, and receives the retained status first."""
    since = [data.draw(st.integers(0, position)) for position in range(len(names))]
    stay = []
    for name, first in zip(names, since, strict=True):
        state = State(device="d", guard=DuplicateNameGuard(name), bundle=BUNDLE)
        _, commands = drive([seen(other) for other in names[max(first - 1, 0) :]], state)
        stay += [] if any(isinstance(command, Stop) for command in commands) else [name]
    assert stay == [names[-1]]


SESSIONS = st.sampled_from(["s", "s2"])
EVENTS = st.one_of(
    st.just(Idle()),
    st.just(Reconnected()),
    st.just(AckOverdue()),
    st.builds(
        lambda session, online: ServerSeen(HERE.status.model_copy(update={"session": session, "online": online})),
        SESSIONS,
        st.booleans(),
    ),
    st.builds(
        lambda number, session, expert, chosen: RoundSeen(
            round_(number, session=session, expert=expert, chosen=chosen)
        ),
        st.integers(1, 4),
        SESSIONS,
        st.sampled_from(["", E1, E2]),
        st.sampled_from([(), ("d",), ("e",)]),
    ),
    st.sampled_from([E1, E2]).map(GlobalArrived),
    st.builds(ack, st.integers(1, 4), st.sampled_from(sorted(set(Verdict) - {Verdict.INCOMPLETE})), SESSIONS).map(
        AckSeen
    ),
    st.sampled_from(["me", "before"]).map(seen),
)


@given(st.lists(EVENTS, max_size=40))
def test_whatever_happens_work_has_its_globals_and_a_present_server(events: list[Event]) -> None:
    state = device()
    for event in events:
        before = state
        state, commands = advance(state, event)
        for command in commands:
            assert not isinstance(command, Fetch) or command.sha256 not in before.stored
            if isinstance(command, Work):
                assert isinstance(event, Idle)
                assert command.round == before.announced
                assert command.round.session == before.online_session == state.session
                assert {command.round.expert} - {""} <= before.stored
                assert command.round.chosen in ((), ("d",))
                state, (send,) = advance(state, WorkDone(command.round.round))
                assert send == Send(command.round.round)


class Outbox(RuleBasedStateMachine):
    """A device and what a broker, a server and a crash may do to it, against a model that remembers everything."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.session = device(), ""
        self.worked: Counter[tuple[str, int]] = Counter()  # by session and round, without the attempts that failed
        self.kept: set[int] = set()  # updates of the session that nobody has acknowledged
        self.acknowledged = 0
        self.working: Round | None = None

    def happen(self, event: Event) -> list[Command]:
        """Carries the commands out, as the I/O loop does, and returns them."""
        self.state, commands = advance(self.state, event)
        for command in list(commands):
            if isinstance(command, Work):
                task = command.round
                if task.session != self.session:
                    self.kept, self.acknowledged = set(), 0
                self.session = task.session
                assert task.round > self.acknowledged
                assert self.working is None
                self.working = task
            elif isinstance(command, Acknowledge):
                assert command.ack.round in self.kept
                self.kept.discard(command.ack.round)
                self.acknowledged = max(self.acknowledged, command.ack.round)
        return commands

    @rule(event=EVENTS)
    def something_happens(self, event: Event) -> None:
        self.happen(event)

    @precondition(lambda self: self.working is not None)
    @rule(fails=st.booleans())
    def the_computation_ends(self, fails: bool) -> None:
        assert self.working is not None
        task, self.working = self.working, None
        if fails:
            assert self.happen(WorkFailed(task.round)) == []
        else:
            self.worked[task.session, task.round] += 1
            self.kept.add(task.round)
            sent = self.happen(WorkDone(task.round))
            assert sent == ([Send(task.round)] if self.state.online_session == task.session else [])

    @rule(session=SESSIONS)
    def the_server_shows_itself(self, session: str) -> None:
        sent = self.happen(ServerSeen(HERE.status.model_copy(update={"session": session})))
        expected = sorted(self.kept) if session == self.session else []
        assert [command.round for command in sent if isinstance(command, Send)] == expected

    @rule(event=st.sampled_from([Reconnected(), AckOverdue()]))
    def an_update_may_be_lost(self, event: Event) -> None:
        sent = self.happen(event)
        expected = sorted(self.kept) if self.state.online_session == self.session else []
        assert [command.round for command in sent if isinstance(command, Send)] == expected

    @rule()
    def the_device_is_killed_and_started_again(self) -> None:
        done = max({self.acknowledged, *self.kept})
        self.working = None
        self.state = device(session=self.session, last_started=done, unacknowledged=frozenset(self.kept))

    @invariant()
    def nothing_is_dropped_and_nothing_done_twice(self) -> None:
        assert self.state.unacknowledged == self.kept
        assert not self.worked or max(self.worked.values()) == 1


TestOutbox = Outbox.TestCase
TestOutbox.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


# the device's disk


def blob_of(number: int, session: str = "s") -> bytes:
    update = Update(run="r", session=session, round=number, device="d", stage=Stage.GLOBAL, level=1, samples=1)
    return pack(update, {"a": np.full(3, number, np.float32)})


def test_a_devices_name_is_made_once_and_kept(tmp_path: Path) -> None:
    assert DeviceStore(tmp_path / "a").name() is None
    name = DeviceStore(tmp_path / "a").ensure_name(None)
    assert DeviceStore(tmp_path / "a").name() == name
    assert DeviceStore(tmp_path / "a").ensure_name(None) == DeviceStore(tmp_path / "a").ensure_name(name) == name
    assert DeviceStore(tmp_path / "b").ensure_name(None) != name
    assert DeviceStore(tmp_path / "c").ensure_name("pi-4") == "pi-4"
    with pytest.raises(ConfigError, match="belongs to device 'pi-4', not 'pi-5'"):
        DeviceStore(tmp_path / "c").ensure_name("pi-5")
    with pytest.raises(ConfigError, match="invalid"):
        DeviceStore(tmp_path / "d").ensure_name("a/b")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("pi", "pi"),
        ("küche", "kuche"),
        ("_pi", "pi"),
        (".-pi-", "pi"),
        ("raspberry pi", "raspberry-pi"),
        ("x.y.example", "x-y-example"),
        ("カメラ", "device"),
        ("", "device"),
        ("\udcff\udcfe", "device"),
        ("a" * 64, "a" * 40),
    ],
)
def test_every_host_name_makes_a_device_name(host: str, name: str) -> None:
    assert name_of_host(host) == name
    assert check_name("device", f"{name_of_host(host)}-01234567")


def test_a_state_folder_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--state .*file cannot be written to \(File exists\)"):
        DeviceStore(tmp_path / "file").ensure_name(None)


def test_the_outbox_survives_a_restart_and_drops_what_is_of_another_session_or_torn(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    store.outbox.enter("s", "r")
    for number in (2, 10):
        store.outbox.write(number, blob_of(number))
    store.outbox.write(3, blob_of(3, session="before"))
    store.outbox.write(4, blob_of(4)[:-5])
    store.outbox.write(5, blob_of(6))
    again = DeviceStore(tmp_path)
    assert again.outbox.unacknowledged(again.outbox.session) == {2, 10}
    assert {path.name for path in (tmp_path / "outbox").iterdir()} == {"2", "10"}
    assert again.outbox.read(2) == blob_of(2)
    again.outbox.acknowledge(2)
    assert again.outbox.read(2) is None
    assert DeviceStore(tmp_path / "new").outbox.unacknowledged("s") == frozenset()


def test_an_acknowledged_round_is_remembered_for_as_long_as_its_session_lasts(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    assert store.outbox.acknowledged == 0
    assert store.outbox.enter("s", "r")
    store.outbox.write(3, blob_of(3))
    store.outbox.acknowledge(7)
    store.outbox.acknowledge(2)  # late
    assert (DeviceStore(tmp_path).outbox.session, DeviceStore(tmp_path).outbox.acknowledged) == ("s", 7)
    assert not store.outbox.enter("s", "r")
    assert store.outbox.enter("s2", "r")
    assert (DeviceStore(tmp_path).outbox.session, DeviceStore(tmp_path).outbox.acknowledged) == ("s2", 0)
    assert list((tmp_path / "outbox").iterdir()) == []


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    store.outbox.write(1, blob_of(1))
    store.ensure_name("d")
    for temporary in (tmp_path / ".personalized.onnx.17", tmp_path / "outbox" / ".2.17"):
        temporary.write_bytes(b"half")
    (tmp_path / ".bashrc.old").write_text("somebody else's")
    store.remove_temporary_files()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".bashrc.old", "1", "identity", "outbox"]


@dataclass
class Delivery:
    published: bool = False

    def is_published(self) -> bool:
        return self.published


def test_an_answer_is_overdue_only_after_the_whole_update_has_reached_the_broker() -> None:
    unanswered, last_chunk = Retransmissions("d", Backoff(first=0.0, longest=0.0)), Delivery()
    assert not unanswered.overdue()
    unanswered.sent(3, last_chunk)
    assert unanswered.is_in_flight(3) and not unanswered.overdue()
    last_chunk.published = True
    assert not unanswered.is_in_flight(3) and unanswered.overdue()
    unanswered.acknowledged(3)
    assert not unanswered.overdue()


def test_globals_are_kept_by_content_and_a_torn_one_is_not_there(tmp_path: Path) -> None:
    store, one, two = DeviceStore(tmp_path), b"one", b"two"
    for blob in (one, two):
        store.globals.write(blob)
    assert store.globals.read(blob_hash(one)) == one
    (tmp_path / "globals" / blob_hash(two)).write_bytes(b"tw")
    assert store.globals.read(blob_hash(two)) is None
    store.globals.keep_only({blob_hash(two)})
    assert store.globals.read(blob_hash(one)) is None
    store.globals.write(two)
    assert store.globals.read(blob_hash(two)) == two


def test_the_session_a_device_works_in_survives_a_restart(tmp_path: Path) -> None:
    assert DeviceStore(tmp_path).outbox.session == ""
    DeviceStore(tmp_path).outbox.enter("s", "r")
    assert DeviceStore(tmp_path).outbox.session == "s"
