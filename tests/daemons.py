"""A daemon within the test's own process."""

from __future__ import annotations

from pathlib import Path

from support import CLASSES, Built

from edge_runtime.cache import DiskCache
from edge_runtime.device import Device
from edge_runtime.engines import open_engine
from edge_runtime.features import FeatureCache
from edge_runtime.folder import scan
from edge_runtime.gate import Gate
from edge_runtime.inputs import reader_of
from edge_runtime.presence import device_link
from edge_runtime.service import Service
from edge_runtime.store import DeviceStore
from protocol.topics import Topics
from shell.link import Link

RUN = "r"
NOWHERE = "mqtt://127.0.0.1:9"


def started(
    built: Built, photos: Path, folder: Path, name: str = "d", broker: str = NOWHERE
) -> tuple[Device, Service, Link]:
    """A daemon as `python -m edge_runtime run` makes one, before it talks to anybody; its link is not connected."""
    bundle = built.bundle
    store = DeviceStore(folder)
    slices = scan(photos, CLASSES, reader_of(bundle).kind)
    device = Device(
        name=store.identity(name),
        bundle=bundle,
        scanned=slices,
        cache=FeatureCache(DiskCache(store.cache, 2**30), bundle, threads=1),
        engine=open_engine("step-graph", bundle, 1),
        gate=Gate(bundle, 1),
        store=store,
        level_cap=2,
        report=lambda *_: None,
    )
    link = device_link(broker, Topics(RUN), device.name)
    return device, Service(device, RUN, link), link
