"""The daemon's decisions, and the device's disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.daemon import (
    AckSeen,
    Command,
    Event,
    Fetch,
    GlobalArrived,
    Idle,
    Leave,
    Reconnected,
    RoundSeen,
    Send,
    ServerSeen,
    Settle,
    State,
    Work,
    WorkDone,
    advance,
)
from edge_runtime.store import DeviceStore
from protocol.errors import ConfigError
from protocol.messages import Ack, Round, Sal, ServerStatus, Stage, Training, Update, Verdict
from protocol.tensors import blob_hash, pack

BUNDLE, OTHER_BUNDLE, E, E1, E2, G, H = (digit * 64 for digit in "0123456")
SAL = Sal(window=2, epsilon=0.1, step=1, max_level=2)
HERE = ServerSeen(ServerStatus(online=True, run="r", session="s", bundle=BUNDLE))


def round_(number: int, stage: Stage = Stage.GLOBAL, session: str = "s", **globals_: str) -> Round:
    fields: dict[str, Any] = {"index": 0, "of": 1, "level": 1, "seconds": 1.0, "sal": SAL, **globals_}
    training = Training(epochs=1, learning_rate=1.0)
    return Round(run="r", session=session, round=number, stage=stage, training=training, **fields)


def ack(number: int, verdict: Verdict = Verdict.ACCEPTED, session: str = "s") -> Ack:
    return Ack(run="r", session=session, round=number, device="d", verdict=verdict)


def drive(events: Sequence[Event], state: State | None = None) -> tuple[State, list[Command]]:
    """The state after some events, and all commands."""
    state, commands = state or State(bundle=BUNDLE), []
    for event in events:
        state, more = advance(state, event)
        commands += more
    return state, commands


def test_a_round_is_fetched_worked_on_sent_and_settled() -> None:
    task = round_(1, expert=E, start=H, gate=G)
    state, commands = drive([HERE, RoundSeen(task), Idle()])
    assert commands == [Fetch(E), Fetch(G), Fetch(H)]
    state, commands = drive([GlobalArrived(E), Idle(), GlobalArrived(G), GlobalArrived(H), Idle()], state)
    assert commands == [Work(task)]
    state, commands = drive([WorkDone(1), AckSeen(ack(1)), Idle()], state)
    assert commands == [Send(1), Settle(ack(1))]
    assert not state.unsettled


def test_only_globals_that_are_not_held_are_fetched() -> None:
    state, _ = drive([HERE, RoundSeen(round_(1, expert=E1, gate=G)), GlobalArrived(E1), GlobalArrived(G), Idle()])
    state, commands = drive([RoundSeen(round_(2, expert=E2, gate=G))], state)
    assert commands == [Fetch(E2)]
    state, commands = drive([GlobalArrived(E2), Idle()], state)
    assert commands == [Work(round_(2, expert=E2, gate=G))]
    assert state.held == {E2, G}  # what is no longer named is no longer kept


@pytest.mark.parametrize("order", [(HERE, RoundSeen(round_(1, expert=E))), (RoundSeen(round_(1, expert=E)), HERE)])
def test_server_and_round_may_show_themselves_in_either_order(order: tuple[Event, ...]) -> None:
    assert drive([*order, GlobalArrived(E), Idle()])[1] == [Fetch(E), Work(round_(1, expert=E))]


def test_of_several_waiting_rounds_only_the_newest_is_worked_on() -> None:
    rounds = [RoundSeen(round_(number)) for number in (1, 2, 3)]
    assert drive([HERE, *rounds, Idle(), Idle()])[1] == [Work(round_(3))]


def test_a_round_announced_again_is_not_worked_on_again() -> None:
    state, _ = drive([HERE, RoundSeen(round_(1)), Idle(), WorkDone(1)])
    assert drive([RoundSeen(round_(1)), Idle()], state)[1] == []
    restarted = State(bundle=BUNDLE, session="s", unsettled=frozenset({1}))  # its update lies in the outbox
    assert drive([HERE, RoundSeen(round_(1)), Idle()], restarted)[1] == []


def test_unsettled_updates_are_sent_again_after_every_reconnection() -> None:
    state, _ = drive([HERE], State(bundle=BUNDLE, session="s", unsettled=frozenset({4, 2})))
    state, commands = drive([Reconnected(), AckSeen(ack(2, Verdict.LATE)), Reconnected()], state)
    assert commands == [Send(2), Send(4), Settle(ack(2, Verdict.LATE)), Send(4)]


@pytest.mark.parametrize("verdict", Verdict)
def test_any_verdict_settles_an_update_once(verdict: Verdict) -> None:
    state = State(bundle=BUNDLE, session="s", unsettled=frozenset({1}))
    assert drive([AckSeen(ack(1, verdict)), AckSeen(ack(1, verdict))], state)[1] == [Settle(ack(1, verdict))]
    assert drive([AckSeen(ack(1, verdict, session="before"))], state)[1] == []


def test_a_finished_run_is_left_by_those_who_took_part() -> None:
    finished = RoundSeen(round_(9, Stage.FINISHED))
    state, _ = drive([HERE, RoundSeen(round_(1)), Idle(), WorkDone(1)])
    assert drive([finished, Idle()], state)[1] == [Leave()]
    assert drive([HERE, finished, Idle()])[1] == []  # a newcomer waits for the next run of that name


def test_a_run_with_another_bundle_is_left_with_a_reason() -> None:
    other = ServerStatus(online=True, run="r", session="s", bundle=OTHER_BUNDLE, model="vit-b16")
    _, (command,) = drive([ServerSeen(other)])
    assert isinstance(command, Leave)
    assert "another bundle (model vit-b16" in command.error
    assert drive([ServerSeen(other.model_copy(update={"online": False}))])[1] == []


def test_a_round_of_a_server_that_is_gone_waits_for_the_next_server() -> None:
    gone = ServerSeen(HERE.status.model_copy(update={"online": False}))
    again = ServerSeen(HERE.status.model_copy(update={"session": "s2"}))
    state, commands = drive([HERE, gone, RoundSeen(round_(5, expert=E)), Idle()])
    assert commands == []
    state, commands = drive([again, Idle(), RoundSeen(round_(1, session="s2")), Idle()], state)
    assert commands == [Work(round_(1, session="s2"))]


EVENTS = st.one_of(
    st.just(Idle()),
    st.just(Reconnected()),
    st.sampled_from(["s", "s2"]).map(lambda s: ServerSeen(HERE.status.model_copy(update={"session": s}))),
    st.builds(
        lambda number, session, expert: RoundSeen(round_(number, session=session, expert=expert)),
        st.integers(1, 4),
        st.sampled_from(["s", "s2"]),
        st.sampled_from(["", E1, E2]),
    ),
    st.sampled_from([E1, E2]).map(GlobalArrived),
    st.builds(ack, st.integers(1, 4), st.sampled_from(Verdict), st.sampled_from(["s", "s2"])).map(AckSeen),
)


@given(st.lists(EVENTS, max_size=40))
def test_whatever_happens_work_has_its_globals_and_a_present_server(events: list[Event]) -> None:
    state = State(bundle=BUNDLE)
    for event in events:
        before = state
        state, commands = advance(state, event)
        for command in commands:
            assert not isinstance(command, Fetch) or command.sha256 not in before.held
            if isinstance(command, Work):
                assert isinstance(event, Idle)
                assert command.round == before.announced
                assert command.round.session == before.present == state.session
                assert {command.round.expert} - {""} <= before.held
                state, (send,) = advance(state, WorkDone(command.round.round))
                assert send == Send(command.round.round)


# the device's disk


def blob_of(number: int, session: str = "s") -> bytes:
    update = Update(run="r", session=session, round=number, device="d", stage=Stage.GLOBAL, level=1, samples=1)
    return pack(update, {"a": np.full(3, number, np.float32)})


def test_a_devices_name_is_made_once_and_kept(tmp_path: Path) -> None:
    name = DeviceStore(tmp_path / "a").identity(None)
    assert DeviceStore(tmp_path / "a").identity(None) == DeviceStore(tmp_path / "a").identity(name) == name
    assert DeviceStore(tmp_path / "b").identity(None) != name
    assert DeviceStore(tmp_path / "c").identity("pi-4") == "pi-4"
    with pytest.raises(ConfigError, match="belongs to device 'pi-4', not 'pi-5'"):
        DeviceStore(tmp_path / "c").identity("pi-5")
    with pytest.raises(ConfigError, match="unusable"):
        DeviceStore(tmp_path / "d").identity("a/b")
    assert not (tmp_path / "d").exists()


def test_the_outbox_survives_a_restart_and_drops_what_is_of_another_session_or_torn(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    for number in (2, 10):
        store.put_outbox(number, blob_of(number))
    store.put_outbox(3, blob_of(3, session="before"))
    store.put_outbox(4, blob_of(4)[:-5])
    assert DeviceStore(tmp_path).outbox("s") == {2: blob_of(2), 10: blob_of(10)}
    store.drop_outbox(2)
    store.drop_outbox(77)
    assert {path.name for path in (tmp_path / "outbox").iterdir()} == {"10"}
    assert DeviceStore(tmp_path / "new").outbox("s") == {}


def test_globals_are_kept_by_content_and_a_torn_one_is_not_there(tmp_path: Path) -> None:
    store, one, two = DeviceStore(tmp_path), b"one", b"two"
    for blob in (one, two):
        store.keep_global(blob)
    assert store.global_blob(blob_hash(one)) == one
    (tmp_path / "globals" / blob_hash(two)).write_bytes(b"tw")
    assert store.global_blob(blob_hash(two)) is None
    store.drop_globals(keep={blob_hash(two)})
    assert store.global_blob(blob_hash(one)) is None
    store.keep_global(two)
    assert store.global_blob(blob_hash(two)) == two


def test_the_session_a_device_works_in_survives_a_restart(tmp_path: Path) -> None:
    assert DeviceStore(tmp_path).session == ""
    DeviceStore(tmp_path).enter("s")
    assert DeviceStore(tmp_path).session == "s"
