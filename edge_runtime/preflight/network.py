"""Checks of the connection: identity, broker, server."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from edge_runtime.daemon.download import receive_server_status
from edge_runtime.daemon.receive_task import receive_task
from edge_runtime.preflight.context import Context, Finding
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.errors import BrokerError, ConfigError
from fedfmsl.protocol.chunks import CHUNK_BYTES, CHUNK_SIZES, HEADER_BYTES
from fedfmsl.protocol.messages import ServerStatus
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.address import parse_address
from fedfmsl.transport.identity import describe_expiry, device_name, read_identity
from fedfmsl.transport.link import Link
from fedfmsl.transport.message_size import largest_message

SERVER_SECONDS = 10.0  # to wait for the status of a server
NEW_DEVICE = "new-device"  # one whose name is made at its first start


def check_identity(settings: Settings, context: Context) -> Iterator[Finding]:
    name = device_name(settings.device, settings.identity)
    yield from _check_password(settings, context.config)
    if settings.identity is None:
        yield Finding("identity", "none; the broker must allow anonymous clients, or a user and password")
        return
    valid = read_identity(settings.identity).valid
    if valid is None:
        yield Finding("identity", f"{settings.identity} holds only the CA's certificates, none of this device")
        return
    start, end = valid
    now = datetime.now(timezone.utc)
    if not start <= now <= end:
        raise ConfigError(
            f"the certificate in {settings.identity} is valid from {start:%Y-%m-%d} to {end:%Y-%m-%d}, but the clock "
            f"says {now:%Y-%m-%d}; set the clock, or ask the operator for another certificate"
        )
    text, is_soon = describe_expiry(end.timestamp(), now.timestamp(), name or NEW_DEVICE)
    yield Finding("identity", f"{name}, {text}", warning=is_soon)


def _check_password(settings: Settings, config: Path | None) -> Iterator[Finding]:
    """A note if the file of the settings has a password that other users may read."""
    if config is None or not parse_address(settings.broker).password or not config.stat().st_mode & 0o077:
        return
    if settings.broker in config.read_text("utf-8", errors="replace"):
        yield Finding("identity", f"other users may read the password in {config}; chmod 600 {config}", warning=True)


def check_broker(settings: Settings, context: Context) -> Iterator[Finding]:
    if context.running:
        yield Finding("broker", "the daemon runs and uses this device's name; see python -m edge_runtime status")
        return
    topics, address = Topics(settings.run, settings.topic_prefix), parse_address(settings.broker)
    client = topics.client_id("check", secrets.token_hex(8))
    link = Link(settings.broker, client, identity=settings.identity, insecure=settings.insecure)
    link.connect()
    try:
        yield Finding(
            "broker",
            f"{address.host}:{address.port} accepts this device; waiting up to {SERVER_SECONDS:g} s for the server",
        )
        if link.broker_until:
            text, is_soon = describe_expiry(link.broker_until, time.time(), "broker")
            yield Finding("broker", f"its certificate is valid {text}", warning=is_soon)
        context.server = receive_server_status(link, topics, SERVER_SECONDS)
        if link.outage.count:
            raise BrokerError(
                "the broker has ended this idle connection; if a daemon with this identity runs elsewhere, each ends "
                "the other's connection: stop it, or use another --identity"
            )
        name = device_name(settings.device, settings.identity) or DeviceStore(settings.state).name()
        yield from _check_messages(link, topics, name, context.server)
        if context.server is not None and context.server.task:
            store = DeviceStore(settings.state).tasks
            context.task = store.task(context.server.task) or receive_task(
                link, topics, context.server, DeviceStore(context.scratch).tasks, timeout=SERVER_SECONDS
            )
    finally:
        link.close()
    if context.server is None:
        yield Finding("server", f"no server of run {settings.run!r} now; a device waits for it", warning=True)
    else:
        yield Finding("server", f"run {settings.run!r} is online, model {context.server.model}")


def _check_messages(link: Link, topics: Topics, known: str | None, server: ServerStatus | None) -> Iterator[Finding]:
    """Subscribes to what a device subscribes to, and sends a message as large as a chunk there and back. Raises
    BrokerError if the broker refuses or drops any of it. `known`: the device's name, if it has one already."""
    name = known or NEW_DEVICE
    for topic in (topics.round, topics.ack(name), topics.status(name), topics.globals_chunk("0" * 64, "+")):
        link.subscribe(topic)
    wanted = server.chunk_bytes if server else CHUNK_BYTES
    sizes = [size + HEADER_BYTES for size in CHUNK_SIZES if size <= wanted]
    try:
        largest = largest_message(link, topics.check(name), sizes)
    except BrokerError as error:
        if known or name not in str(error):
            raise
        raise BrokerError(
            f"{error}; this device has no name yet: give it one that they allow, with --device"
        ) from error
    text = f"the broker returns messages of {largest} bytes, access rules allow what a device subscribes to"
    smaller = f"{text}; larger ones are dropped, so that rounds take longer: raise the broker's limit"
    yield Finding("messages", smaller if largest < sizes[0] else text, warning=largest < sizes[0])
