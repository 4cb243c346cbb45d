"""A run of three devices that is held in the middle of a round by one of them."""

from __future__ import annotations

from typing import Any

from edge_runtime.daemon.state import required_globals
from edge_runtime.store import DeviceStore
from fedfmsl.protocol.messages import Round, Stage
from support.processes import Federation, Observer

FIRST, HOLDER = "device-0", "device-1"
ROUNDS = ("--stage1-rounds", "6", "--stage2-rounds", "2", "--head-sums", "none")


def start_all(federation: Federation, *but: str) -> None:
    federation.start_server(*ROUNDS)
    for name in set(federation.photos) - set(but):
        federation.start_device(name, "--bundle", str(federation.bundle))


def hold_in_mid_round(federation: Federation, observer: Observer) -> Round:
    """Stops one device in a round of stage 1 that it knows all about and has not finished, so that it stays open."""
    holder, store = federation.devices[HOLDER], DeviceStore(federation.state(HOLDER))
    begun = observer.wait(Round, lambda r: r.stage is Stage.GLOBAL, "stage 1")
    while begun.stage is Stage.GLOBAL:
        holder.pause()
        finished = store.outbox.acknowledged >= begun.round or store.outbox.read(begun.round) is not None
        if not finished and all(store.globals.read(sha256) for sha256 in required_globals(begun)):
            return begun
        holder.resume()
        newer = begun.round + 1 if finished else begun.round
        begun = observer.wait(Round, lambda r, newer=newer: r.round >= newer, f"round {newer}")
    raise AssertionError("the holder was never caught in the middle of a round")


def finished_rounds(federation: Federation, observer: Observer) -> list[dict[str, Any]]:
    """The log of a run that has ended well for the server and every device of it, in which nobody was missed."""
    observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end")
    server = federation.processes.started["server"]
    ended = {name: process.wait() for name, process in {"server": server, **federation.devices}.items()}
    assert {name: each.code for name, each in ended.items()} == dict.fromkeys(ended, 0), ended
    assert not any("Traceback" in each.stdout + each.stderr for each in ended.values())
    rounds = federation.rounds()
    assert all(sorted(line["updates"]) == sorted(federation.photos) for line in rounds)
    assert not any(line["repeated"] for line in rounds)
    return rounds
