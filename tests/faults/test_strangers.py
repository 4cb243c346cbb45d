"""A stranger on a broker that lets everybody in: nothing it says reaches the model or costs a round."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import Undisturbed
from hostile import publish
from processes import Observer
from simulation import RUN, Simulation, in_stage_1, recovering
from table import FaultTable

from protocol.bundle import Bundle
from protocol.messages import Round, Stage, Update
from protocol.tensors import Tensors, chunks, pack
from protocol.topics import Topics
from trainer_server.store import RunStore

THINK = (0.2, 0.8)
STRANGER, VICTIM = "stranger", "device-0000"
TOPICS = Topics(RUN)
NOISE = np.random.default_rng(0).bytes(5000)


def sent(bundle: Bundle, begun: Round, tensors: Tensors, device: str = STRANGER, **changes: object) -> list[bytes]:
    """The chunks of an update that was made up."""
    header = {
        "run": RUN,
        "session": begun.session,
        "round": begun.round,
        "device": device,
        "stage": begun.stage,
        "level": 1,
        "samples": 1000,
    }
    return list(chunks(pack(Update.model_validate({**header, **changes}), tensors)))


def messages(bundle: Bundle, begun: Round) -> dict[str, list[tuple[str, bytes]]]:
    """What the stranger says, by its name in the table."""
    expert = bundle.expert.split(np.ones(bundle.expert.size(1), np.float32))
    own, bare = TOPICS.update_chunk(STRANGER, begun.round, 0), {"x": np.ones(3, np.float32)}
    not_a_number = {name: np.full_like(tensor, np.nan) for name, tensor in expert.items()}
    updates = {
        "NaN in an update": sent(bundle, begun, not_a_number),
        "wrong shapes in an update": sent(bundle, begun, bare),
        "yesterday's update": sent(bundle, begun, expert, session="yesterday"),
        "an update of a round to come": sent(bundle, begun, expert, round=begun.round + 5),
        "somebody else's name in an update": sent(bundle, begun, expert, device=VICTIM),
    }
    said = {fault: [(own, chunk) for chunk in parts] for fault, parts in updates.items()}
    said["random bytes on every topic"] = [
        (topic, NOISE)
        for topic in (
            own,
            TOPICS.update_chunk(VICTIM, begun.round, 0),
            TOPICS.status(STRANGER),
            TOPICS.ack(STRANGER),
            TOPICS.progress(VICTIM),
            TOPICS.update_chunk(STRANGER, "x", "y"),
        )
    ]
    values = ({}, [], {"device": STRANGER}, float("inf"), "x" * 99)
    said["JSON that is none of ours"] = [(TOPICS.status(STRANGER), json.dumps(value).encode()) for value in values]
    return said


@pytest.mark.parametrize(
    "fault",
    [
        "NaN in an update",
        "wrong shapes in an update",
        "yesterday's update",
        "an update of a round to come",
        "somebody else's name in an update",
        "random bytes on every topic",
        "JSON that is none of ours",
    ],
)
def test_what_a_stranger_says_costs_nothing(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, fault: str
) -> None:
    with Observer(simulation.broker, RUN) as observer:
        simulation.start_server()
        simulation.start_fleet(think=THINK)
        begun = in_stage_1(observer)
        assert begun.stage is Stage.GLOBAL
        with recovering(simulation, observer) as seconds:
            assert publish(simulation.broker.url, messages(simulation.bundle, begun)[fault])
        outcome = simulation.finish()
    assert STRANGER not in {name for closed in RunStore(outcome.out).rounds() for name in closed.updates}
    table.add(f"{fault}, {simulation.broker.kind}", outcome.trial(undisturbed(simulation.devices), *seconds))
