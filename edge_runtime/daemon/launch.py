"""Starts the daemon: opens the link, prepares the device, runs the loop."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from importlib.metadata import version

from edge_runtime.daemon.announce import Announcer, Message, device_link, rate_limited
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.lock import locked
from edge_runtime.daemon.loop import STOPS, DaemonLoop
from edge_runtime.daemon.page import address_of, page_process
from edge_runtime.daemon.prepare import Daemon, Prepared, RunOverError, prepare, stays
from edge_runtime.daemon.round_runner import RoundRunner
from edge_runtime.daemon.status import describe_model
from edge_runtime.daemon.worker import Worker, progress_poster
from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import LEVELS_AHEAD, FeatureCache
from edge_runtime.data.labels import read_labels
from edge_runtime.engines.factory import open_engine
from edge_runtime.inference.home_assistant import DeviceDescription, discovery_message
from edge_runtime.inference.watcher import Watcher
from edge_runtime.resources.governor import Governor
from edge_runtime.resources.level_cap import LevelCap
from edge_runtime.resources.providers import require_provider
from edge_runtime.resources.sensors import Sensors, board
from edge_runtime.resources.throttle import ControlledEngine, LevelCapTracker, StepControl, reported_and_checked
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import DeviceContext
from edge_runtime.training.gate import Gate
from fedfmsl.common.backoff import Backoff
from fedfmsl.common.class_folders import check_folder
from fedfmsl.common.logs import set_up_logging, signals_logged
from fedfmsl.errors import ClockError
from fedfmsl.protocol.messages import Activity
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.identity import device_name
from fedfmsl.transport.link import Link

logger = logging.getLogger(__name__)

CLOCK = Backoff(first=2.0, longest=60.0)  # between attempts to connect while the clock is behind


def launch(settings: Settings) -> None:
    """Takes part in the run until it has finished. Raises FedFMSLError if that is not possible."""
    set_up_logging(settings.log, settings.log_file)
    check_folder(settings.images, "--images")
    if settings.watch:
        check_folder(settings.watch, "--watch")
    if settings.labels:
        read_labels(settings.labels)  # raises InputError now, and not only once the server is there
    require_provider(settings.provider)  # before a bundle is downloaded
    topics, store = Topics(settings.run, settings.topic_prefix), DeviceStore(settings.state)
    name = store.ensure_name(device_name(settings.device, settings.identity))
    with locked(store.root, "stop that process, or use another --state"), contextlib.ExitStack() as resources:
        resources.enter_context(signals_logged(logger, "when it is started again, it goes on with the run"))
        settings = with_newest_identity(settings, store)
        link = device_link(settings.broker, topics, name, settings.identity, settings.insecure)
        sensors = Sensors(zones=settings.thermal_zones)
        if settings.max_temperature is not None and sensors.read().temperature is None:
            logger.warning("--max-temperature has no effect: no thermal zone can be read; check --thermal-zones")
        health = HealthReporter(link, topics, name, store, sensors.read)
        if settings.metrics:
            from edge_runtime.daemon.metrics import families  # takes 12 MB of memory
            from fedfmsl.transport.metrics import serve_metrics

            serve_metrics(settings.metrics, lambda: families(health.newest), settings.insecure)
        if settings.page:
            resources.enter_context(page_process(settings, store))
        connect(link, health)
        health.ready()
        if settings.authority and settings.identity == store.renewed.path:
            from edge_runtime.daemon.renewal import Renewal  # takes 8 MB of memory

            resources.enter_context(
                Renewal(store.renewed, settings.authority, link.renew_identity, health.renewal_failed)
            )
        anew, daemon = False, Daemon(settings, link, topics, store, name, health)
        try:
            while _take_part(daemon, sensors, anew):
                anew = True
        except RunOverError:
            logger.info(
                f"run {settings.run!r} has finished; the model for predictions is {describe_model(store)}; {STOPS}"
            )
            health.heartbeat(Activity.STOPPED)
            link.close()


def _take_part(daemon: Daemon, sensors: Sensors, anew: bool) -> bool:
    """Prepares the device for a task, and takes part in the run until it has finished. `anew`: not for the first time.
    True: the server has announced another task. Raises RunOverError as `goes_on` does."""
    settings, link, topics = daemon.settings, daemon.link, daemon.topics
    with contextlib.ExitStack() as resources:
        prepared = prepare(daemon, anew)
        introduction = _introduction(settings, topics, daemon.name, prepared.bundle)
        announcer = Announcer(link, topics, daemon.name, introduction, settings.frigate)
        control = StepControl()
        runner = _runner(daemon, prepared, control)
        loop = DaemonLoop(
            topics,
            link,
            announcer,
            daemon.health,
            Governor(settings.limits, sensors.read),
            runner,
            Worker(control, link.post),
            stay=stays(settings),
        )
        if settings.watch:
            watcher = Watcher(
                settings.watch,
                daemon.store.root,
                prepared.bundle.root,
                announcer.prediction,
                questions=settings.page is not None,
            )
            resources.enter_context(watcher)
        return loop.serve()


def with_newest_identity(settings: Settings, store: DeviceStore) -> Settings:
    """With the identity that this device has renewed, or may renew (see `edge_runtime.daemon.renewal`)."""
    if settings.identity is None:
        return settings
    newest = store.renewed.newest(settings.identity)
    if settings.authority:
        with contextlib.suppress(OSError):  # a full disk: the next start tries again
            newest = store.renewed.adopt(settings.identity)
    return settings.model_copy(update={"identity": newest})


def connect(link: Link, health: HealthReporter, backoff: Backoff = CLOCK) -> None:
    """Connects to the broker. Waits while this machine's clock is behind: a board without a battery for its clock has
    the time only once a server of the network has told it. Raises BrokerError as `Link.connect` does."""
    for attempt in itertools.count():
        try:
            link.connect()
        except ClockError as error:
            link.outage.lost(str(error))
            health.ready()  # else systemd would end it
            retry = time.monotonic() + backoff.delay(attempt)
            while time.monotonic() < retry:
                health.heartbeat(Activity.STARTING)
                time.sleep(min(1.0, backoff.first))
        else:
            return


def _runner(daemon: Daemon, prepared: Prepared, control: StepControl) -> RoundRunner:
    """Opens the engine, the caches and the gate. Progress is posted to the link's queue."""
    settings, store = daemon.settings, daemon.store
    bundle, threads, plan = prepared.bundle, prepared.threads, prepared.plan
    progress = rate_limited(progress_poster(daemon.link.post))
    report = reported_and_checked(progress, control.check)
    tracker = LevelCapTracker(LevelCap.planned(plan, settings.step_seconds))
    engine = ControlledEngine(
        open_engine(prepared.engine, bundle, threads, plan.memory_plans, prepared.provider), control, tracker
    )
    disk = DiskCache(store.cache, settings.cache, settings.keep_free)
    device = DeviceContext(
        device_name=daemon.name,
        bundle=bundle,
        scanned=prepared.scanned,
        cache=FeatureCache(
            disk,
            bundle,
            threads,
            report,
            plan.feature_batch,
            engine.release,
            reader=prepared.reader,
            provider=prepared.provider,
            # states of deleted samples cannot be computed later
            ahead=bundle.manifest.levels if settings.rehearse else LEVELS_AHEAD,
        ),
        engine=engine,
        gate=Gate(bundle, threads),
        store=store,
        level_cap=plan.level_cap,
        report=report,
    )
    scan_report = reported_and_checked(progress, control.check_stopped)
    return RoundRunner(
        device,
        prepared.folder,
        control,
        tracker,
        scan_report,
        settings.identity,
        settings.secure,
        settings.max_epsilon,
        settings.rehearse,
        prepared.provider,
    )


def _introduction(settings: Settings, topics: Topics, name: str, bundle: TaskBundle) -> Message | None:
    """The message that introduces this device to Home Assistant, if it classifies a watched folder."""
    if not (settings.watch and settings.home_assistant):
        return None
    described = DeviceDescription(topics, name, bundle.classes, board(), version("fedfmsl-edge"), address_of(settings))
    return discovery_message(settings.home_assistant, described, topics.status(name), health=True)
