"""A stranger on a broker that lets everybody in: nothing it says reaches the model or costs a round."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import Undisturbed
from hostile import publish
from processes import Observer
from simulation import RUN, Simulation, in_stage_1, recovering
from table import FaultTable, Trial

from protocol.bundle import Bundle
from protocol.messages import DeviceStatus, Round, Update, encode
from protocol.tensors import Tensors, chunks, pack
from protocol.topics import Topics
from trainer_server.store import RunStore

THINK = (0.2, 0.8)
STRANGER, VICTIM = "stranger", "device-0000"
TOPICS = Topics(RUN)
NOISE = np.random.default_rng(0).bytes(5000)
HUGE = 100_000_000  # bytes, of one message
LARGE = 60_000_000  # bytes, of a blob
FAULTS = (
    "NaN in an update",
    "infinities in an update",
    "wrong shapes in an update",
    "an update that is too long",
    "yesterday's update (another session)",
    "an update of an earlier round",
    "an update of a round to come",
    "somebody else's name in an update",
    "an update on somebody else's topic",
    "100 MB in one message",
    "chunks of a blob that is too large",
    "random bytes on every topic",
    "JSON that is none of ours",
)
Said = list[tuple[str, bytes]]


def sent(begun: Round, tensors: Tensors, **changes: object) -> Said:
    """The chunks of an update that was made up, on the stranger's own topic."""
    header = {
        "run": RUN,
        "session": begun.session,
        "round": begun.round,
        "device": STRANGER,
        "stage": begun.stage,
        "level": 1,
        "samples": 1000,
    }
    update = Update.model_validate({**header, **changes})
    return [(TOPICS.update_chunk(STRANGER, update.round, 0), chunk) for chunk in chunks(pack(update, tensors))]


def messages(bundle: Bundle, begun: Round) -> dict[str, tuple[str, Said]]:
    """What the stranger says, by its name in the table, and what the server calls it."""
    ones = bundle.expert.split(np.ones(bundle.expert.size(1), np.float32))

    def filled(value: float) -> Said:
        return sent(begun, {name: tensor * np.float32(value) for name, tensor in ones.items()})

    own, victims = (TOPICS.update_chunk(name, begun.round, 0) for name in (STRANGER, VICTIM))
    noisy = (own, victims, TOPICS.status(STRANGER), TOPICS.ack(STRANGER), TOPICS.progress(VICTIM))
    odd: tuple[object, ...] = ({}, [], {"device": STRANGER}, float("inf"), "x" * 99)
    return {
        "NaN in an update": ("unreadable", filled(float("nan"))),
        "infinities in an update": ("unreadable", filled(float("inf"))),
        "wrong shapes in an update": ("tensors", sent(begun, {"x": np.ones(3, np.float32)})),
        "an update that is too long": ("tensors", filled(1e6)),
        "yesterday's update (another session)": ("other run", sent(begun, ones, session="yesterday")),
        "an update of an earlier round": ("late", sent(begun, ones, round=1)),
        "an update of a round to come": ("other round", sent(begun, ones, round=begun.round + 5)),
        "somebody else's name in an update": ("unreadable", sent(begun, ones, device=VICTIM)),
        "an update on somebody else's topic": ("unreadable", [(victims, chunk) for _, chunk in sent(begun, ones)]),
        "100 MB in one message": ("too large", [(own, bytes(HUGE))]),
        "chunks of a blob that is too large": ("unreadable", [(own, next(iter(chunks(bytes(LARGE)))))]),
        "random bytes on every topic": ("unreadable", [(topic, NOISE) for topic in noisy]),
        "JSON that is none of ours": (
            "unreadable",
            [(TOPICS.status(STRANGER), json.dumps(value).encode()) for value in odd],
        ),
    }


def said(simulation: Simulation, undisturbed: Undisturbed, faults: Sequence[str]) -> Trial:
    """All of it in the middle of a round, by one whom the server knows and does not wait for: so that each is refused
    for what it is."""
    introduction = DeviceStatus(device=STRANGER, online=False, bundle=simulation.bundle.sha256)
    with Observer(simulation.broker, RUN) as observer:
        simulation.start_server()
        simulation.start_fleet(think=THINK)
        begun = in_stage_1(observer)
        ready = messages(simulation.bundle, begun)
        with recovering(simulation, observer) as seconds:
            assert publish(simulation.broker.url, [(TOPICS.status(STRANGER), encode(introduction))])
            for fault in faults:
                assert publish(simulation.broker.url, ready[fault][1]), fault
        outcome = simulation.finish()
    store = RunStore(outcome.out)
    assert STRANGER not in {name for closed in store.rounds() for name in closed.updates}
    refused = {one.kind for one in store.refusals() if one.device in (STRANGER, VICTIM)}
    assert refused >= {ready[fault][0] for fault in faults}, store.refusals()
    return outcome.trial(undisturbed(simulation.devices), *seconds, len(faults))


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_stranger_says_costs_nothing(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, fault: str, full: bool
) -> None:
    if not full or simulation.broker.kind == "amqtt":
        pytest.skip("one by one in the long form only (--full), and on mosquitto")
    table.add(f"{fault}, {simulation.broker.kind}", said(simulation, undisturbed, [fault]))


def test_all_that_a_stranger_says_in_one_round_costs_nothing(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, full: bool
) -> None:
    if not full and simulation.broker.kind == "amqtt":
        pytest.skip("on amqtt in the long form only (--full)")
    table.add(f"all of a stranger's messages, {simulation.broker.kind}", said(simulation, undisturbed, FAULTS))
