"""SIGKILL in the middle of stage 2, and the same device started again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from support.processes import Broker, Federation, Observer, Processes

from fedfmsl.protocol.messages import Ack, DeviceStatus, Round, Stage, Verdict
from fedfmsl.protocol.tensors import unpack

STAGE2 = 5
VICTIM, HOLDER, OTHER = "device-0", "device-1", "device-2"
DEADLINE_SECONDS = 8
NEVER_SECONDS = 90


class LocalExpert(BaseModel):
    """What a device's local expert says of itself: its last round of stage 2, and how many it has gone through."""

    round: int
    seen: int


def local_expert(federation: Federation) -> LocalExpert:
    """The victim's, as it lies on disk."""
    header, tensors = unpack((federation.state(VICTIM) / "personal").read_bytes(), LocalExpert)
    assert set(tensors) == {"theta", "best"}
    return header


def wait_for_round(observer: Observer, number: int) -> Round:
    return observer.wait(Round, lambda r: r.round == number, f"round {number}")


def wait_for_update(observer: Observer, device: str, number: int) -> Ack:
    return observer.wait(Ack, lambda a: a.device == device and a.round == number, f"{device}'s update of {number}")


def kill_in_mid_round(federation: Federation, observer: Observer) -> Round:
    """SIGKILL for the victim, which has a local expert, in a round of stage 2 that it has begun but not finished."""
    victim = federation.devices[VICTIM]
    before = observer.wait(Round, lambda r: r.stage is Stage.PERSONAL, "stage 2")
    while before.index < STAGE2 - 2:
        wait_for_update(observer, VICTIM, before.round)
        victim.pause()
        begun = wait_for_round(observer, before.round + 1)
        if local_expert(federation).round == before.index:  # else it was quicker than the pause: try again
            victim.kill()
            return begun
        victim.resume()
        before = begun
    raise AssertionError("the victim was never caught in the middle of a round")


def start_all(federation: Federation, round_timeout: int) -> None:
    federation.start_server(
        *("--stage1-rounds", "1", "--stage2-rounds", str(STAGE2), "--round-timeout", str(round_timeout))
    )
    for name in federation.photos:
        federation.start_device(name, "--bundle", str(federation.bundle))


def start_again(federation: Federation, observer: Observer) -> DeviceStatus:
    """The victim with nothing but its state folder; its status once it is back."""
    observer.wait(DeviceStatus, lambda s: s.device == VICTIM and not s.online, "the victim's last will")
    since = len(observer.seen)
    federation.start_device(VICTIM, "--bundle", str(federation.bundle), again=True)
    return observer.wait(DeviceStatus, lambda s: s.device == VICTIM and s.online, "the victim's return", since)


def finished_rounds(federation: Federation, observer: Observer) -> list[dict[str, Any]]:
    """The log of a run in which everybody has left with exit code 0."""
    observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end")
    server = federation.processes.started["server"]
    assert {process.wait().code for process in (server, *federation.devices.values())} == {0}
    return federation.rounds()


def assert_the_local_expert_has_lived_on(federation: Federation, rounds: list[dict[str, Any]]) -> None:
    """It has gone through as many rounds as the server got updates of stage 2: it did not start over."""
    stages = Counter(line["round"]["stage"] for line in rounds if VICTIM in line["updates"])
    assert local_expert(federation).seen == stages["personal"]
    assert stages["evaluate"] == 1
    assert (federation.state(VICTIM) / "personalized.onnx").is_file()


def test_a_round_ends_at_its_deadline_without_a_killed_daemon_which_then_rejoins(
    broker: Broker, bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    with Processes(tmp_path / "logs") as processes, Observer(broker, "late") as observer:
        federation = Federation("late", broker, bundle, photos, tmp_path, processes)
        start_all(federation, DEADLINE_SECONDS)
        begun = kill_in_mid_round(federation, observer)
        kept = (federation.state(VICTIM) / "personal").read_bytes()
        seen = local_expert(federation).seen

        wait_for_update(observer, HOLDER, begun.round)
        holder = federation.devices[HOLDER]
        holder.pause()  # so that the next round is still open when the victim is back
        wait_for_round(observer, begun.round + 1)  # after the deadline

        assert (federation.state(VICTIM) / "personal").read_bytes() == kept
        assert start_again(federation, observer).device == VICTIM
        ack = observer.wait(Ack, lambda a: a.device == VICTIM and a.round > begun.round, "an update after the return")
        assert ack.verdict is Verdict.ACCEPTED
        assert local_expert(federation).seen > seen
        holder.resume()

        rounds = finished_rounds(federation, observer)
        shortened = next(line for line in rounds if line["round"]["round"] == begun.round)
        assert shortened["missing"] == [VICTIM]
        assert sorted(shortened["updates"]) == [HOLDER, OTHER]
        assert DEADLINE_SECONDS <= shortened["seconds"] < DEADLINE_SECONDS + 3
        assert VICTIM in rounds[-1]["updates"]
        assert_the_local_expert_has_lived_on(federation, rounds)
        notes = (federation.server_folder / "notes.log").read_text()
        assert f"round {begun.round} closed without {VICTIM}" in notes
        assert f"{VICTIM} is offline" in notes


def test_a_daemon_killed_and_started_again_within_a_round_is_not_missed(
    broker: Broker, bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    with Processes(tmp_path / "logs") as processes, Observer(broker, "soon") as observer:
        federation = Federation("soon", broker, bundle, photos, tmp_path, processes)
        start_all(federation, NEVER_SECONDS)
        begun = kill_in_mid_round(federation, observer)
        start_again(federation, observer)
        ack = observer.wait(Ack, lambda a: a.device == VICTIM and a.round >= begun.round, "an update after the return")
        assert (ack.round, ack.verdict) == (begun.round, Verdict.ACCEPTED)

        rounds = finished_rounds(federation, observer)
        assert not any(line["missing"] or line["repeated"] for line in rounds)
        assert all(sorted(line["updates"]) == sorted(photos) for line in rounds)
        assert_the_local_expert_has_lived_on(federation, rounds)
