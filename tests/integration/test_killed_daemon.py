"""A daemon that is killed in the middle of stage 2 and started again."""

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
    """The header of the local expert: its last round of stage 2, and its number of rounds."""

    round: int
    seen: int


def local_expert(federation: Federation) -> LocalExpert:
    """The header of the victim's local expert on disk."""
    header, tensors = unpack((federation.state(VICTIM) / "personal").read_bytes(), LocalExpert)
    assert set(tensors) == {"theta", "best"}
    return header


def wait_for_round(observer: Observer, number: int) -> Round:
    return observer.wait(Round, lambda r: r.round == number, f"round {number}")


def wait_for_update(observer: Observer, device: str, number: int) -> Ack:
    return observer.wait(Ack, lambda a: a.device == device and a.round == number, f"{device}'s update of {number}")


def kill_in_mid_round(federation: Federation, observer: Observer) -> Round:
    """Kills the victim, which has a local expert, in a round of stage 2 that it has begun and not finished."""
    victim = federation.devices[VICTIM]
    before = observer.wait(Round, lambda r: r.stage is Stage.PERSONAL, "stage 2")
    while before.index < STAGE2 - 2:
        wait_for_update(observer, VICTIM, before.round)
        victim.pause()
        begun = wait_for_round(observer, before.round + 1)
        if local_expert(federation).round == before.index:  # otherwise it finished before the pause
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
    """Starts the victim with its state folder. Returns its first status."""
    observer.wait(DeviceStatus, lambda s: s.device == VICTIM and not s.online, "the victim's last will")
    since = len(observer.seen)
    federation.start_device(VICTIM, "--bundle", str(federation.bundle), again=True)
    return observer.wait(DeviceStatus, lambda s: s.device == VICTIM and s.online, "the victim's return", since)


def finished_rounds(federation: Federation, observer: Observer) -> list[dict[str, Any]]:
    """The records of a run after every process has exited with 0."""
    observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end")
    server = federation.processes.started["server"]
    assert {process.wait().code for process in (server, *federation.devices.values())} == {0}
    return federation.rounds()


def assert_the_local_expert_was_kept(federation: Federation, rounds: list[dict[str, Any]]) -> None:
    """Its number of rounds is that of the server's updates of stage 2: it was not initialized again."""
    stages = Counter(line["round"]["stage"] for line in rounds if VICTIM in line["updates"])
    assert local_expert(federation).seen == stages["personal"]
    assert stages["evaluate"] == 1
    assert (federation.state(VICTIM) / "personalized.onnx").is_file()


def test_a_round_closes_at_its_deadline_without_a_killed_daemon_which_rejoins_later(
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
        assert_the_local_expert_was_kept(federation, rounds)
        notes = (federation.server_folder / "notes.log").read_text()
        assert f"round {begun.round} closed without {VICTIM}" in notes
        assert f"{VICTIM} is offline" in notes


def test_a_daemon_that_restarts_within_a_round_still_contributes_to_it(
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
        assert_the_local_expert_was_kept(federation, rounds)
