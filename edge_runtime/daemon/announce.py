"""How a device shows itself on the broker: its connection with a last will, its status, its progress."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from edge_runtime.data.features import Report
from edge_runtime.training.context import TrainingContext
from fedfmsl.protocol.messages import DeviceStatus, Progress, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Will

INSTANCE = secrets.token_hex(8)  # this process, among all that ever have this device's name
PROGRESS_SECONDS = 0.5


def device_link(broker: str, topics: Topics, name: str, identity: Path | None = None, insecure: bool = False) -> Link:
    """A device's link, with the last will that says it is gone. Two processes of one name do not push each other off
    the broker; and nothing depends on what a broker keeps for somebody who is away."""
    will = Will(topics.status(name), encode(DeviceStatus(device=name, online=False, instance=INSTANCE)))
    return Link(broker, f"fedfmsl-{topics.run}-{name}-{INSTANCE}", will, identity=identity, insecure=insecure)


def progress_to(link: Link, topics: Topics, name: str) -> Report:
    """Tells whoever watches how far a computation is, now and then."""
    last = 0.0

    def report(activity: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last > PROGRESS_SECONDS:
            last = now
            progress = Progress(device=name, activity=activity, done=done, total=total)
            link.publish(topics.progress(name), encode(progress), qos=0)

    return report


def status_of(device: TrainingContext, online: bool, paused: str, error: str) -> DeviceStatus:
    slices = device.scanned
    return DeviceStatus(
        device=device.device_name,
        online=online,
        instance=INSTANCE,
        bundle=device.bundle.sha256,
        level_cap=device.level_cap,
        train=len(slices.train),
        held_out=len(slices.held_out),
        test=len(slices.test),
        paused=paused,
        error=error,
    )
