"""The run's task: announced with the server's status, received over MQTT like globals, and kept on disk."""

from __future__ import annotations

import contextlib
import logging
import math
import time

from edge_runtime.daemon.download import POLL_SECONDS, Heartbeat, no_heartbeat
from edge_runtime.daemon.globals import GlobalsReceiver
from edge_runtime.store.task_store import TaskStore
from fedfmsl.errors import BrokerError, BundleError, MessageError
from fedfmsl.protocol.messages import ServerStatus, parse
from fedfmsl.protocol.task import MAX_TASK_BYTES, Task
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received, SubscriptionRefused

logger = logging.getLogger(__name__)


def receive_task(
    link: Link,
    topics: Topics,
    server: ServerStatus,
    store: TaskStore,
    name: str = "",
    heartbeat: Heartbeat = no_heartbeat,
    timeout: float = math.inf,
) -> Task | None:
    """The task that `server` has announced. None if the server goes offline, comes back or announces another one
    meanwhile, or after `timeout` seconds. A stored task is not received again.

    Raises BundleError if the task is not valid or belongs to another bundle, BrokerError if the broker refuses it.
    """
    receiver = GlobalsReceiver(link, topics, store, MAX_TASK_BYTES, name)
    receiver.chunk_bytes = server.chunk_bytes
    complete, deadline = receiver.fetch(server.task), time.monotonic() + timeout
    full_disk = False
    while not complete:
        if time.monotonic() > deadline:
            return None
        event = link.next_event(POLL_SECONDS)
        heartbeat()
        if isinstance(event, SubscriptionRefused):
            raise BrokerError(event.error)
        if isinstance(event, Received) and event.payload:
            if event.topic == topics.server_status:
                if _is_another(server, event.payload):
                    receiver.keep_only(set())
                    return None
                continue
            with contextlib.suppress(MessageError):  # it is asked for again
                receiver.receive(event)
        receiver.fetch_missing()
        try:
            complete = receiver.store_next() is not None
        except OSError as error:
            if not full_disk:
                logger.error(f"the task cannot be stored ({error.strerror}); free some disk space, the device waits")
            full_disk = True
    task = store.read(server.task)
    try:
        opened = Task.unpack(task or b"")
    except MessageError as error:
        raise BundleError(f"the task of run {server.run!r} is not valid: {error}") from error
    opened.check_bundle(server.bundle, f"the task of run {server.run!r}")
    return opened


def _is_another(server: ServerStatus, payload: bytes) -> bool:
    """Whether a status is not that of the `server`, as far as its task is concerned."""
    try:
        status = parse(ServerStatus, payload)
    except MessageError:
        return False
    now = (status.online, status.task, status.bundle, status.bundle_url, status.chunk_bytes)
    return now != (server.online, server.task, server.bundle, server.bundle_url, server.chunk_bytes)
