"""A hostile client on a broker without access control: its messages do not change the model and cost no round."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from support.fault_records import Row
from support.hostile_client import publish
from support.processes import SECONDS, Observer
from support.recovery import strike_each
from support.run_oracle import Undisturbed
from support.simulation import RUN, Simulation

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.protocol.chunks import chunks
from fedfmsl.protocol.messages import DeviceStatus, Round, Update, encode
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack
from fedfmsl.protocol.topics import Topics
from trainer_server.storage.run_store import RunStore

DELAY = (0.4, 0.8)
LONG_DELAY = (1.0, 1.6)  # a round lasts longer than the forging of messages for it
LONGER = 5  # times as many rounds where sending takes several of them
HOSTILE, VICTIM = "hostile", "device-0000"
TOPICS = Topics(RUN)
NOISE = np.random.default_rng(0).bytes(5000)
HUGE = 100_000_000  # bytes, of one message
LARGE = 60_000_000  # bytes, of a blob
Messages = list[tuple[str, bytes]]
FAULTS = {
    "updates of NaN, infinities, wrong shapes, a norm that is too large": (
        "NaN in an update",
        "infinities in an update",
        "wrong shapes in an update",
        "an update that is too long",
    ),
    "yesterday's updates, earlier and later ones, another device's name and topic": (
        "yesterday's update (another session)",
        "an update of an earlier round",
        "an update of a round to come",
        "another device's name in an update",
        "an update on another device's topic",
    ),
    "random bytes, strange JSON, too many chunks, 100 MB in one message": (
        "random bytes on every topic",
        "JSON that is none of ours",
        "chunks of a blob that is too large",
        "100 MB in one message",
    ),
}


def sent(begun: Round, tensors: Tensors, **changes: object) -> Messages:
    """The chunks of a forged update on the hostile client's own topic."""
    header = {
        "run": RUN,
        "session": begun.session,
        "round": begun.round,
        "device": HOSTILE,
        "stage": begun.stage,
        "level": 1,
        "samples": 1000,
    }
    update = Update.model_validate({**header, **changes})
    return [(TOPICS.update_chunk(HOSTILE, update.round, 0), chunk) for chunk in chunks(pack(update, tensors))]


def messages(bundle: TaskBundle, begun: Round) -> dict[str, tuple[str, Messages]]:
    """The messages of each fault, by its name in the table, and the reason with which the server refuses them."""
    ones = bundle.expert.split(np.ones(bundle.expert.size(1), np.float32))

    def filled(value: float) -> Messages:
        return sent(begun, {name: tensor * np.float32(value) for name, tensor in ones.items()})

    own, victims = (TOPICS.update_chunk(name, begun.round, 0) for name in (HOSTILE, VICTIM))
    noisy = (own, victims, TOPICS.status(HOSTILE), TOPICS.ack(HOSTILE), TOPICS.progress(VICTIM))
    odd: tuple[object, ...] = ({}, [], {"device": HOSTILE}, float("inf"), "x" * 99)
    return {
        "NaN in an update": ("tensors", filled(float("nan"))),
        "infinities in an update": ("tensors", filled(float("inf"))),
        "wrong shapes in an update": ("tensors", sent(begun, {"x": np.ones(3, np.float32)})),
        "an update that is too long": ("tensors", filled(1e6)),
        "yesterday's update (another session)": ("other run", sent(begun, ones, session="yesterday")),
        "an update of an earlier round": ("late", sent(begun, ones, round=1)),
        "an update of a round to come": ("other round", sent(begun, ones, round=begun.round + 1000)),
        "another device's name in an update": ("unreadable", sent(begun, ones, device=VICTIM)),
        "an update on another device's topic": ("unreadable", [(victims, chunk) for _, chunk in sent(begun, ones)]),
        "100 MB in one message": ("flood", [(own, bytes(HUGE))]),
        "chunks of a blob that is too large": ("unreadable", [(own, next(iter(chunks(bytes(LARGE)))))]),
        "random bytes on every topic": ("unreadable", [(topic, NOISE) for topic in noisy]),
        "JSON that is none of ours": (
            "unreadable",
            [(TOPICS.status(HOSTILE), json.dumps(value).encode()) for value in odd],
        ),
    }


@pytest.mark.parametrize("group", FAULTS)
def test_messages_of_a_hostile_client_cost_nothing(
    simulation: Simulation, undisturbed: Undisturbed, row: Row, times: int, group: str, full: bool
) -> None:
    """In the middle of a round, of a client that the server knows and does not wait for: so that each message is
    refused for what it is."""
    if not full and (simulation.broker.kind == "amqtt" or not group.startswith("random bytes")):
        pytest.skip("group by group, and on amqtt, in the long form only (--full)")
    row.name = f"{group}, {simulation.broker.kind}"
    prompt = simulation.broker.kind == "mosquitto"  # amqtt may not take it all, or only when the round is over
    seconds = SECONDS if prompt else 2.0
    introduction = DeviceStatus(device=HOSTILE, online=False, bundle=simulation.bundle.sha256)
    reasons: set[str] = set()
    with Observer(simulation.broker, RUN) as observer:

        def attack(number: int) -> None:
            closed = RunStore(simulation.out).rounds.all()[-1].round.round
            begun = observer.wait(Round, lambda announced: announced.round > closed, "the present round")
            assert (
                publish(simulation.broker.url, [(TOPICS.status(HOSTILE), encode(introduction))], seconds) or not prompt
            )
            for fault in FAULTS[group]:
                reason, forged = messages(simulation.bundle, begun)[fault]
                reasons.add(reason)
                assert publish(simulation.broker.url, forged, seconds) or not prompt, fault

        simulation.stage1 *= LONGER if full and not prompt else 1
        simulation.start_server()
        simulation.start_fleet(delay=LONG_DELAY if full else DELAY)
        strike_each(simulation.out, row, times, attack)
        outcome = simulation.check(row, undisturbed)
    assert HOSTILE not in {name for closed in RunStore(outcome.out).rounds.all() for name in closed.updates}
    refused = set(re.findall(r"refused from \S+ \((.+?)\)", simulation.servers[-1].stdout))
    assert refused >= reasons or not prompt, refused
