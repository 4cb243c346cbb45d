"""Topics, and names that cannot be part of one."""

from __future__ import annotations

import inspect

import pytest

from fedfmsl.errors import ConfigError
from fedfmsl.protocol.topics import Topics


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "-x", "a" * 65, "ü", "a b", "a\n"])
def test_names_that_cannot_be_part_of_a_topic_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="invalid"):
        Topics(name)


def test_only_device_topics_of_the_run_have_a_device() -> None:
    topics = Topics("r")
    for topic in (topics.status("d"), topics.ack("d"), topics.update_chunk("d", 1, 0), topics.progress("d")):
        assert topics.device_of(topic) == "d"
    for topic in (topics.round, topics.server_status, topics.globals_chunk("ab", 0), Topics("s").status("d")):
        assert topics.device_of(topic) is None


@pytest.mark.parametrize("prefix", ["", "/a", "a/", "a//b", "a/+", "#", "ü", "a b", "a/" * 9 + "a"])
def test_prefixes_that_cannot_begin_a_topic_are_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="topic prefix"):
        Topics("r", prefix)


def test_topics_of_another_prefix_are_not_read() -> None:
    topics, other = Topics("r", "tenant-7/fedfmsl"), Topics("r")
    chunk = topics.update_chunk("d", 1, 0)
    assert chunk == "tenant-7/fedfmsl/r/devices/d/update/1/0"
    assert (topics.update_of(chunk), other.update_of(chunk)) == (("d", 1), None)
    assert topics.globals_of(topics.globals_chunk("a" * 64, 0)) == "a" * 64
    assert topics.device_of(other.status("d")) is None


def test_every_topic_of_a_run_is_known_and_no_topic_of_a_tenant_below_it() -> None:
    values = {"device": "d", "sha256": "a" * 64, "round_": 1, "index": 0}
    topics, others = Topics("r"), [Topics(run, f"fedfmsl/r{more}") for run in ("x", "d") for more in ("", "/devices")]
    found = set()
    for name, member in vars(Topics).items():
        if name.startswith("_") or name in ("root", "run", "prefix", "client_id", "has") or name.endswith("_of"):
            continue
        for each in (topics, *others):
            if isinstance(member, property):
                topic = getattr(each, name)
            else:
                keys = [*inspect.signature(member).parameters][1:]
                topic = getattr(each, name)(*(values[key] for key in keys))
            assert topics.has(topic) == (each is topics), topic
        found.add(name)
    assert found >= {"round", "ack", "server_check", "globals_chunk", "update_chunk", "prediction_status"}
    assert topics.has("fedfmsl/r/devices/d/update/any/thing/at/all")


def test_client_ids_are_short_and_unique() -> None:
    long = Topics("r" * 64, "tenant/" * 7 + "fedfmsl")
    ids = [topics.client_id(*parts) for topics in (Topics("r"), long) for parts in (["server"], ["d" * 64, "0a"])]
    ids.append(long.client_id("d" * 64, "0b"))
    assert ids[0] == "fedfmsl-r-server"
    assert len(set(ids)) == len(ids)
    assert max(map(len, ids)) <= 100


HOSTILE_TOPICS = [
    "",
    "/",
    "#",
    "fedfmsl",
    "fedfmsl/r/devices",
    "fedfmsl/r/devices//update/1/0",
    "fedfmsl/r/devices/../update/1/0",
    "fedfmsl/r/devices/[/x]/update/1/0",
    "fedfmsl/r/devices/d\n/update/1/0",
    "fedfmsl/r/devices/ü/update/1/0",
    f"fedfmsl/r/devices/{'d' * 65}/update/1/0",
    "fedfmsl/r/globals//0",
    "fedfmsl/r/globals/../0",
    f"fedfmsl/r/globals/{'A' * 64}/0",
    "/" * 65_535,
]


@pytest.mark.parametrize("topic", HOSTILE_TOPICS, ids=range(len(HOSTILE_TOPICS)))
def test_a_hostile_topic_has_no_device_round_or_hash(topic: str) -> None:
    topics = Topics("r")
    assert topics.device_of(topic) is None
    assert topics.update_of(topic) is None
    assert topics.globals_of(topic) is None


@pytest.mark.parametrize(
    "number", ["", "-1", "+1", "01", "1.0", "1e3", "0x1", " 1", "1_0", "²", "١", "2147483649", "9" * 5000]
)
def test_the_round_of_an_update_topic_is_a_plain_number(number: str) -> None:
    topics = Topics("r")
    assert topics.update_of(topics.update_chunk("d", 2**31, 7)) == ("d", 2**31)
    assert topics.update_of(topics.update_chunk("d", number, 0)) is None
    assert topics.update_of(topics.update_chunk("d", 0, number)) is None
