"""Prepares a device for a run: fetches the bundle and the task, scans the samples, measures the machine."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edge_runtime.daemon.announce import INSTANCE, Announcer, rate_limited
from edge_runtime.daemon.download import (
    POLL_SECONDS,
    Heartbeat,
    fetch_bundle,
    no_heartbeat,
    receive_server_status,
    stored_bundle,
    wait_for_server,
)
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.measure import measure
from edge_runtime.daemon.receive_task import receive_task
from edge_runtime.daemon.state import other_bundle
from edge_runtime.daemon.status import describe_model
from edge_runtime.data.folder import SampleFolder, largest
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.proposals import NothingToTrainError, describe_proposed
from edge_runtime.data.sample_reader import SampleReader
from edge_runtime.data.samples import Splits
from edge_runtime.engines.factory import open_engine
from edge_runtime.resources.plan import Plan, largest_extent
from edge_runtime.resources.providers import describe_choice
from edge_runtime.resources.throttle import reported_and_checked
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from edge_runtime.store.verified_bundle import verify_if_changed
from edge_runtime.training.personal_model import ModelHeader
from edge_runtime.training.stored_model import read_personal_model, tasks_of_models
from fedfmsl.common.logs import fields
from fedfmsl.errors import BundleError, FedFMSLError, InputError, RunError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.class_names import describe_classes
from fedfmsl.protocol.messages import Activity, DeviceStatus, EngineName, Round, ServerStatus, encode
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link

logger = logging.getLogger(__name__)

HEAR_SECONDS = 3.0  # for the server to say that it has another task than the one that was known
SCAN_SECONDS = 5.0  # between scans of a folder with nothing to train on
FIRST_SCAN_SECONDS = 3.0  # wait before the first scan if another process may still write a file


class RunOverError(Exception):
    """The run has finished with this device."""


@dataclass(frozen=True)
class Daemon:
    """What the process has from its start to its end. `name`: the device's."""

    settings: Settings
    link: Link
    topics: Topics
    store: DeviceStore
    name: str
    health: HealthReporter

    def starting(self) -> None:
        """The heartbeat before the first round."""
        self.health.heartbeat(Activity.STARTING)


@dataclass(frozen=True)
class Prepared:
    """Everything that is fetched or measured before the first round."""

    bundle: TaskBundle
    engine: EngineName
    threads: int
    provider: str
    reader: SampleReader
    folder: SampleFolder
    scanned: Splits
    plan: Plan


def prepare(daemon: Daemon, anew: bool) -> Prepared:
    """Fetches bundle and task, scans the samples and measures the machine. `anew`: not for the first time, because the
    server has announced another task. Without anything to train on a service waits, as does a device that proposes
    classes or that could train before: `anew`. Raises RunOverError as `goes_on` does, and InputError as
    `SampleFolder.scan`."""
    settings, store = daemon.settings, daemon.store
    threads = settings.thread_count
    announcer = Announcer(daemon.link, daemon.topics, daemon.name)
    report = reported_and_checked(rate_limited(announcer.progress), daemon.starting)
    own = Bundle.load(settings.bundle) if settings.bundle else None
    if own:
        verify_if_changed(own, store.verified)
    known = store.tasks.known_for(own) if own and not anew else None  # without waiting for the server
    if own and known:
        bundle = TaskBundle(own, known)
    else:
        server, task = _wait_for_task(daemon, own.sha256 if own else "")
        try:
            if own and server.bundle != own.sha256:
                raise RunError(other_bundle(server, own.sha256))
            bundle = TaskBundle(own or bundle_of(server, store, settings.identity, daemon.starting), task)
        except (BundleError, RunError) as error:
            if _stays_online(daemon):
                raise
            logger.warning(f"{error}; the server has gone offline, so this device waits for it")
            return prepare(daemon, anew)
    of_model = _origin_of_model(store)
    if not settings.bundle:
        store.keep_bundles(bundle.sha256, of_model.bundle if of_model else "")
    store.tasks.keep(bundle.task, *tasks_of_models(store))
    logger.info(f"task of run {settings.run!r}: {describe_classes(bundle.classes)}")
    engine = open_engine(settings.engine, bundle, threads).name
    reader = SampleReader(reader_of(bundle))
    kind = reader.kind
    most = largest_extent(settings.memory)
    folder = SampleFolder(settings.images, bundle, store, settings.labels, reader, most, settings.run, settings.propose)
    try:
        scanned = folder.scan(FIRST_SCAN_SECONDS, report)
    except InputError as error:
        if not (known and _has_another_task(daemon, bundle)):
            empty = isinstance(error, NothingToTrainError)
            if not (anew or (empty and (stays(settings) or proposed_by(error)))):
                raise
            wait_for_samples(daemon, bundle, folder, error)
        return prepare(daemon, anew=True)
    report("measuring", 0, 1)
    choice, plan = measure(settings, store, engine, bundle, largest(scanned.samples, kind), daemon.starting)
    if choice.trials:
        daemon.health.provider = describe_choice(choice)
        logger.info(f"provider {daemon.health.provider}")
    logger.info(
        f"device {daemon.name}: {len(scanned.train)} {kind.noun}s to train on, {len(scanned.held_out)} held out, "
        f"{len(scanned.test)} to test on; engine {engine}, level cap {plan.level_cap}",
        **fields(device=daemon.name, engine=engine, level_cap=plan.level_cap),
    )
    if known:
        logger.info(f"waiting for the server of run {settings.run!r}")
    return Prepared(bundle, engine, threads, choice.provider, reader, folder, scanned, plan)


def _stays_online(daemon: Daemon) -> bool:
    """Whether the server is online, also in a moment. That of a finished run comes back to announce the end again."""
    _ignore_events(daemon.link, time.monotonic() + HEAR_SECONDS, daemon.starting)
    return receive_server_status(daemon.link, daemon.topics, HEAR_SECONDS, daemon.starting) is not None


def _has_another_task(daemon: Daemon, bundle: TaskBundle) -> bool:
    """Whether the server, if it is online, has announced another task."""
    heard = receive_server_status(daemon.link, daemon.topics, HEAR_SECONDS, daemon.starting)
    return heard is not None and heard.task != bundle.task.sha256


def wait_for_samples(daemon: Daemon, bundle: TaskBundle, folder: SampleFolder, error: InputError) -> None:
    """Waits until there is something to train on or the server announces another task. Meanwhile it publishes `error`,
    why there is nothing, and proposes the new classes of the device. Raises RunOverError as `goes_on` does."""
    link, topics = daemon.link, daemon.topics
    proposed = proposed_by(error)
    waits = f"proposes {describe_proposed(proposed)} and waits until one is added" if proposed else "waits for samples"
    logger.warning(f"{error}; the device {waits}")

    def finished(_: ServerStatus, end: Round) -> bool:
        leave_finished(daemon, end)
        return False

    while True:
        status = DeviceStatus(
            device=daemon.name,
            online=True,
            instance=INSTANCE,
            bundle=bundle.sha256,
            error=str(error),
            proposed=proposed_by(error),
        )
        link.publish(topics.status(daemon.name), encode(status), retain=True)
        heartbeat = partial(daemon.health.heartbeat, Activity.PAUSED, paused=str(error))
        until = time.monotonic() + SCAN_SECONDS
        heard = receive_server_status(link, topics, SCAN_SECONDS, heartbeat, finished)
        if heard is not None and heard.task != bundle.task.sha256:
            return
        _ignore_events(link, until, heartbeat)
        try:
            folder.scan()
        except InputError as again:  # also of a disk that is not mounted any more
            error = again
        else:
            return


def proposed_by(error: InputError) -> dict[str, int]:
    """The new classes of a device that cannot train because of `error`."""
    return dict(error.proposed) if isinstance(error, NothingToTrainError) else {}


def _wait_for_task(daemon: Daemon, own: str) -> tuple[ServerStatus, Task]:
    """The server's status and its task. Waits for them without limit; a run that has finished will do if this device
    can personalize itself from it. `own`: the SHA-256 of its --bundle, or "". Raises RunOverError, and RunError if the
    server is of an earlier version."""
    link, topics, store = daemon.link, daemon.topics, daemon.store
    logger.info(f"waiting for the server of run {topics.run!r}, which has the task")
    ended: set[str] = set()  # sessions that this device does not go on with
    told, task = False, None

    def finished(server: ServerStatus, end: Round) -> bool:
        if goes_on(daemon, own, server, end):
            return True
        ended.add(end.session)
        return False

    while task is None:
        server = wait_for_server(link, topics, daemon.starting, finished=finished)
        if server.session in ended and not server.bundle_url and not has_bundle(store, own, server):
            if not told:
                without = f"the server of run {topics.run!r} is back and does not serve its bundle"
                logger.info(f"{without}; waiting for a new run of this name (or give --bundle)")
            told = True
            _ignore_events(link, time.monotonic() + SCAN_SECONDS, daemon.starting)
            continue
        daemon.health.run_finished = False
        if not server.task:
            raise RunError(
                f"the server of run {topics.run!r} announces no task, so it is of an earlier version; install the same "
                "version on server and devices"
            )
        task = receive_task(link, topics, server, store.tasks, daemon.name, daemon.starting)
    return server, task


def _ignore_events(link: Link, until: float, heartbeat: Heartbeat) -> None:
    """Until a time of the monotonic clock. A new subscription brings what is retained again."""
    while time.monotonic() < until:
        link.next_event(POLL_SECONDS)
        heartbeat()


def bundle_of(
    server: ServerStatus, store: DeviceStore, identity: Path | None = None, heartbeat: Heartbeat = no_heartbeat
) -> Bundle:
    """The server's bundle, verified. Of a stored one only altered files are fetched again. Raises BundleError as
    `fetch_bundle` does."""
    stored = stored_bundle(store.bundles, server.bundle)
    if stored is not None:
        try:
            verify_if_changed(stored, store.verified)
        except BundleError as error:
            logger.warning(f"{error}; fetching it again")
        else:
            return stored
    fetched = fetch_bundle(server, store.bundles, identity, heartbeat)
    verify_if_changed(fetched, store.verified)
    return fetched


def goes_on(daemon: Daemon, own: str, server: ServerStatus, end: Round) -> bool:
    """Whether this device personalizes itself from the finished run of `server`: it took no part, and has the bundle.
    `own`: the SHA-256 of its --bundle, or "". Otherwise it waits for the next run. Raises RunOverError if it took part
    and does not stay."""
    settings, store = daemon.settings, daemon.store
    daemon.health.run_finished = True
    took_part = leave_finished(daemon, end)
    if not took_part and end.expert and end.gate and has_bundle(store, own, server):
        return True
    lacks = "" if took_part else f", and this device lacks what it needs of it (bundle {server.bundle[:12]}…)"
    waiting = f"run {settings.run!r} has finished{lacks}; waiting for a new run of this name"
    logger.info(f"{waiting}; the model for predictions is {describe_model(store)}")
    return False


def has_bundle(store: DeviceStore, own: str, server: ServerStatus) -> bool:
    """Whether the server's bundle is on this device. `own`: the SHA-256 of its --bundle, or ""."""
    return server.bundle == own if own else stored_bundle(store.bundles, server.bundle) is not None


def leave_finished(daemon: Daemon, end: Round) -> bool:
    """Whether this device took part in the run that has finished. Raises RunOverError if it did and does not stay."""
    took_part = end.session == daemon.store.outbox.session
    if took_part and not stays(daemon.settings):
        raise RunOverError
    return took_part


def stays(settings: Settings) -> bool:
    return settings.stay or settings.watch is not None


def _origin_of_model(store: DeviceStore) -> ModelHeader | None:
    """The header of the personalized model; None if there is none."""
    with contextlib.suppress(FedFMSLError):
        return read_personal_model(store).header
    return None
