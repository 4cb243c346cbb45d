"""What a server does with what the broker has of an earlier server of its name."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from support.processes import Broker, Processes
from support.training_contexts import announced_round

from fedfmsl.errors import RunError
from fedfmsl.protocol.chunks import CHUNK_BYTES
from fedfmsl.protocol.messages import ServerStatus, Stage, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link
from trainer_server.service.retained import remove_unneeded_globals, retained
from trainer_server.service.same_name import require_own_run

OWN, OTHER = "own", "other"
SECONDS = 30.0  # far more than a broker needs


@pytest.fixture(scope="module", params=["amqtt", pytest.param("mosquitto", marks=pytest.mark.needs("mosquitto"))])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Processes(tmp_path_factory.mktemp("logs")) as processes:
        yield processes.start_broker(request.param)


def link_to(broker: Broker) -> Link:
    return Link(broker.url, secrets.token_hex(8))  # amqtt may close a connection with the client id of the one before


@pytest.mark.parametrize(
    ("first_session", "online", "ended", "refused"),
    [
        (OWN, True, False, ""),  # this run's earlier process
        (OWN, False, False, ""),
        (OTHER, False, True, ""),
        (OTHER, True, False, "online"),
        (OTHER, False, False, "offline"),
    ],
)
def test_another_run_of_the_name_that_has_not_ended_keeps_its_devices(
    broker: Broker, first_session: str, online: bool, ended: bool, refused: str
) -> None:
    topics = Topics("orchard", "farm/fedfmsl")
    status = ServerStatus(online=online, run="orchard", session="2", first_session=first_session, ended=ended)
    publisher = link_to(broker)
    publisher.connect()
    publisher.publish(topics.server_status, encode(status), retain=True).wait_for_publish(SECONDS)
    publisher.close()
    if refused:
        remedy = "purge --run orchard --topic-prefix farm/fedfmsl with"
        with pytest.raises(RunError, match=f"another folder: its server is {refused}.*{remedy}") as caught:
            require_own_run(link_to(broker), topics, OWN, SECONDS)
        assert ("stop that server if it runs" in str(caught.value)) != online
    else:
        require_own_run(link_to(broker), topics, OWN, SECONDS)


def test_globals_that_a_killed_server_has_left_are_deleted(broker: Broker) -> None:
    topics, link = Topics("orchard"), link_to(broker)
    link.connect()
    kept, *gone = blobs = "a" * 64, "b" * 64, "c" * 64
    former = announced_round(Stage.PERSONAL, expert=kept, gate=gone[0])
    status = ServerStatus(online=True, run="orchard", session="1", task=gone[1])
    chunks = [topics.globals_chunk(sha256, index) for sha256 in blobs for index in range(2)]
    left = {topics.round: encode(former), topics.server_status: encode(status), **dict.fromkeys(chunks, b"chunk")}
    for topic, payload in left.items():
        link.publish(topic, payload, retain=True).wait_for_publish(SECONDS)
    remove_unneeded_globals(link, topics, frozenset({kept}), 2 * CHUNK_BYTES)
    found = [each.topic for each in retained(link, topics, chunks, SECONDS)]
    link.close()
    assert found == chunks[:2]


def test_a_name_that_is_new_to_the_broker_is_free(broker: Broker) -> None:
    require_own_run(link_to(broker), Topics("new"), OWN, SECONDS)
