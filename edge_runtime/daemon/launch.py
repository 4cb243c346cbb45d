"""From settings to a daemon at work: all is opened, measured and put together, in the order in which it can fail."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from edge_runtime.daemon.announce import device_link, progress_to
from edge_runtime.daemon.download import fetch_bundle, wait_for_server
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.lock import locked
from edge_runtime.daemon.loop import Service
from edge_runtime.daemon.worker import Worker
from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache, Report
from edge_runtime.data.folder import SampleFolder, largest
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.sample_reader import SampleReader
from edge_runtime.engines.factory import open_engine
from edge_runtime.inference.home_assistant import DeviceDescription, discovery_message
from edge_runtime.inference.watcher import Watcher
from edge_runtime.resources.level_cap import LevelCap
from edge_runtime.resources.probe import make_plan
from edge_runtime.resources.sensors import Sensors, board
from edge_runtime.resources.throttle import Pace, PacedEngine
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.gate import Gate
from fedfmsl.common.logs import fields, set_up_logging
from fedfmsl.errors import InputError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Activity
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.identity import device_name
from fedfmsl.transport.link import Link

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 3.0  # that the first look at the folder waits for files that may still be being written


def launch(settings: Settings) -> None:
    """Takes part in the run until it has finished. Raises FedFMSLError if that is not possible."""
    set_up_logging(settings.log, settings.log_file)
    if not settings.images.is_dir():
        raise InputError(f"--images folder {settings.images} does not exist; make or mount it, or give another")
    topics, store = Topics(settings.run), DeviceStore(settings.state)
    name = store.identity(device_name(settings.device, settings.identity))
    with locked(store.root, "end it first, or give this one another --state"), contextlib.ExitStack() as until_the_end:
        link = device_link(settings.broker, topics, name, settings.identity, settings.insecure)
        sensors = Sensors(zones=settings.thermal_zones)
        if settings.max_temperature is not None and sensors.read().temperature is None:
            logger.warning("--max-temperature is without effect: no thermal zone can be read; see --thermal-zones")
        health_reporter = HealthReporter(link, topics, name, store, sensors.read)
        if settings.metrics:
            from edge_runtime.daemon.metrics import serve_metrics  # 12 MB that others can do without

            serve_metrics(settings.metrics, lambda: health_reporter.newest, settings.insecure)
        link.connect()
        health_reporter.ready()
        starting = _Starting(
            progress_to(link, topics, name), lambda: health_reporter.heartbeat(None, Activity.STARTING)
        )
        worker = _worker(settings, link, topics, store, name, sensors, starting)
        health_reporter.pace = worker.pace
        introduction = None
        if settings.watch and settings.home_assistant:
            described = DeviceDescription(
                settings.run, name, worker.device.bundle.manifest.classes, board(), version("fedfmsl-edge")
            )
            introduction = discovery_message(settings.home_assistant, described, topics.status(name), health=True)
        stays = settings.stay or settings.watch is not None
        service = Service(worker, settings.run, link, health_reporter, introduction, stays)
        if settings.watch:
            bundle = worker.device.bundle.root
            until_the_end.enter_context(Watcher(settings.watch, store.root, bundle, service.predicted))
        service.serve()


def _worker(
    settings: Settings, link: Link, topics: Topics, store: DeviceStore, name: str, sensors: Sensors, starting: _Starting
) -> Worker:
    """The device with all that it computes with, measured."""
    threads = settings.threads or os.cpu_count() or 1
    if settings.bundle:
        bundle = Bundle.load(settings.bundle)
    else:
        logger.info(f"waiting for the server of run {settings.run!r}, which has the bundle")
        server = wait_for_server(link, topics, starting.heartbeat)
        bundle = fetch_bundle(server, store.bundles, settings.identity, starting.heartbeat)
    bundle.verify()
    engine = open_engine(settings.engine, bundle, threads).name
    reader = SampleReader(reader_of(bundle))
    kind = reader.kind
    folder = SampleFolder(settings.images, bundle, store, settings.labels, starting.progress, reader)
    scanned = folder.scan(wait=SETTLE_SECONDS)
    starting.progress("measuring", 0, 1)
    most = largest(scanned.samples, kind)
    plan = make_plan(bundle, store, engine, threads, most, settings.memory, settings.step_seconds)
    logger.info(
        f"device {name}: {len(scanned.train)} {kind.noun}s to train on, {len(scanned.held_out)} held out, "
        f"{len(scanned.test)} to test on; engine {engine}, level cap {plan.level_cap}",
        **fields(device=name, engine=engine, level_cap=plan.level_cap),
    )
    pace = Pace(settings.limits, sensors.read, LevelCap.planned(plan, settings.step_seconds), starting)
    trainer = PacedEngine(open_engine(engine, bundle, threads, plan.memory_plans), pace)
    disk = DiskCache(store.cache, settings.cache, settings.keep_free)
    cache = FeatureCache(disk, bundle, threads, pace, plan.feature_batch, trainer.release, reader=reader)
    device = TrainingContext(
        device_name=name,
        bundle=bundle,
        scanned=scanned,
        cache=cache,
        engine=trainer,
        gate=Gate(bundle, threads),
        store=store,
        level_cap=plan.level_cap,
        report=pace,
    )
    return Worker(device, folder, pace)


@dataclass(frozen=True)
class _Starting:
    """The host of a pace before the service is there."""

    tell: Report
    heartbeat: Callable[[], None]

    def progress(self, activity: str, done: int, total: int) -> None:
        self.tell(activity, done, total)
        self.heartbeat()

    def pause(self, reason: str) -> None:
        self.heartbeat()
        time.sleep(1.0)
