"""The run's task on its way to a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime.daemon.receive_task import receive_task
from edge_runtime.store import DeviceStore
from fedfmsl.errors import BundleError
from fedfmsl.protocol.chunks import chunks
from fedfmsl.protocol.messages import ServerStatus, encode
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.tensors import blob_hash
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received

TOPICS = Topics("r")
TASK = Task("a" * 64, ("apple", "pear"))


def link_with(*events: Received) -> Link:
    link = Link("mqtt://127.0.0.1:9", "device")
    for event in events:
        link.events.put(event)
    return link


def status(task: Task = TASK, online: bool = True) -> ServerStatus:
    return ServerStatus(online=online, run="r", session="s", bundle="a" * 64, task=task.sha256)


def parts(blob: bytes) -> list[Received]:
    return [Received(TOPICS.globals_chunk(blob_hash(blob), index), chunk) for index, chunk in enumerate(chunks(blob))]


def announced(said: ServerStatus) -> Received:
    return Received(TOPICS.server_status, encode(said))


def test_a_task_is_received_once(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path).tasks
    for link in (link_with(announced(status()), *parts(TASK.blob)), link_with()):  # the second time it is on the disk
        received = receive_task(link, TOPICS, status(), store)
        assert received is not None and received.sha256 == TASK.sha256
    store.keep(received)
    assert (found := store.present()) is not None and found.classes == ("apple", "pear")


@pytest.mark.parametrize("other", [status(online=False), status(replace(TASK, version=2))], ids=["offline", "another"])
def test_a_device_looks_for_the_server_again_when_its_task_is_not_the_newest(
    tmp_path: Path, other: ServerStatus
) -> None:
    link = link_with(announced(other), *parts(TASK.blob))
    assert receive_task(link, TOPICS, status(), DeviceStore(tmp_path).tasks) is None


def test_a_task_that_does_not_come_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    assert receive_task(link_with(), TOPICS, status(), DeviceStore(tmp_path).tasks, timeout=0) is None


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (replace(TASK, bundle="b" * 64), "the task of run 'r' belongs to another bundle"),
        (replace(TASK, classes=("apple", "unknown")), "the task of run 'r' is not valid: .*'unknown'"),
    ],
    ids=["bundle", "names"],
)
def test_a_task_that_cannot_be_used_is_one_clear_error(tmp_path: Path, task: Task, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        receive_task(link_with(*parts(task.blob)), TOPICS, status(task), DeviceStore(tmp_path).tasks)


def test_only_the_present_task_and_those_of_the_models_are_kept(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path).tasks
    tasks = [replace(TASK, version=version) for version in (1, 2, 3)]
    for task in tasks:
        store.write(task.blob)
    store.keep(tasks[2], tasks[0].sha256)
    assert [store.task(task.sha256) is not None for task in tasks] == [True, False, True]
    assert (found := store.present()) is not None and found.version == 3
