"""Creates, resumes, coordinates and replays a run, for the commands of the server."""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedfmsl.errors import BundleError, ConfigError, RunError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.class_names import describe_classes
from fedfmsl.protocol.messages import Round, ServerStatus, encode
from fedfmsl.protocol.secure_sums import SignedKeys
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.topics import ROOT, Topics
from fedfmsl.transport.identity import read_identity
from fedfmsl.transport.link import KEEPALIVE_SECONDS, Link, Will
from fedfmsl.transport.signatures import Authorities
from trainer_server.config import RunConfig
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import AnnounceRound, LimitsChanged, Log
from trainer_server.coordinator.limits import check_change
from trainer_server.coordinator.state import CheckKeys, Plan, State, initial_state, unsigned
from trainer_server.service.figures import Figures
from trainer_server.service.loop import Service
from trainer_server.service.run_log import LOG_BYTES, log_to_folder
from trainer_server.service.same_name import require_own_run
from trainer_server.service.start_from import read_start
from trainer_server.service.stored import differing_settings, in_force, without_ignored
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.origin import Origin
from trainer_server.storage.run_status import limits_in_force
from trainer_server.storage.run_store import DATABASE, RunStore, require_folder
from trainer_server.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

NO_CHANGES: Mapping[str, Any] = MappingProxyType({})


def open_run(folder: Path, config: RunConfig, bundle: TaskBundle, source: Path | None = None) -> RunStore:
    """Creates a run in `folder`, or opens the one that was started there with the same settings, or has them now. Warns
    of settings that are ignored, because `resume` or the operator has changed them. `source`: the folder of the run or
    adapter that it goes on from, which is read only once.

    Raises ConfigError naming the settings that differ, or if `folder` is a file. Raises RunError if the folder
    cannot be used.
    """
    require_folder(folder)
    if not config.stage1_rounds and source is None:
        raise ConfigError("--stage1-rounds 0 needs --from: without stage 1 there is no global expert; add one of them")
    if not (folder / DATABASE).is_file():
        start = read_start(source, bundle, config) if source else None
        origin = Origin(
            config=config,
            session=secrets.token_hex(8),
            bundle=bundle.root.absolute(),
            sha256=bundle.sha256,
            task=bundle.task.sha256,
        )
        try:
            return RunStore.create(folder, origin, bundle.task, start)
        except (OSError, sqlite3.Error) as error:
            why = getattr(error, "strerror", None) or error
            raise RunError(
                f"{folder} cannot be written ({why}); choose another --out, or free some disk space"
            ) from error
    store = RunStore(folder)
    if store.is_unstarted():  # an earlier start failed before its first event, for example without a broker
        store.reset(config, bundle, read_start(source, bundle, config) if source else None)
    origin = store.origin
    first = origin.first
    if first.source != (str(source.absolute()) if source else None):
        raise ConfigError(
            f"{folder} holds run {config.run!r}, which "
            f"{f'goes on from {first.source}' if first.source else 'starts afresh'}; give the same --from, or "
            "choose another --out"
        )
    if origin.sha256 != bundle.sha256:
        raise ConfigError(f"{folder} holds a run with another bundle ({origin.bundle}); choose another --out")
    if bundle.task.sha256 not in (first.task, origin.task):
        raise ConfigError(
            f"{folder} holds run {origin.config.run!r} with another task ({describe_classes(store.task().classes)}); "
            f"resume it with python -m trainer_server resume --out {folder}, or choose another --out"
        )
    now = in_force(origin.config, limits_in_force(store))
    config, warning = without_ignored(origin.config, now, config)
    if config != now:
        differences, changes = differing_settings(now, config)
        if store.ended is not None:
            raise ConfigError(
                f"{folder} holds run {origin.config.run!r} with {differences}; it has ended, so choose another "
                "--out for a new run"
            )
        raise ConfigError(
            f"{folder} holds run {origin.config.run!r} with {differences}; resume it with python -m trainer_server "
            f"resume{changes} --out {folder}, or choose another --out"
        )
    if warning and store.ended is None:
        logger.warning(warning)
    return store


def open_bundle(store: RunStore) -> TaskBundle:
    """The bundle that the run was started with, and the task of its present session. Raises BundleError if the bundle's
    folder is missing or holds another one, RunError if the task is missing or altered."""
    restore = "restore it there, or repeat the start command with the --bundle of its new place"
    try:
        bundle = Bundle.load(store.origin.bundle)
    except BundleError as error:
        raise BundleError(f"the bundle of this run is not at {store.origin.bundle} ({error}); {restore}") from error
    if bundle.sha256 != store.origin.sha256:
        raise BundleError(f"{bundle.root} is not the bundle that the run was started with; {restore}")
    return TaskBundle(bundle, store.task(), f"the task of {store.folder}")


def run_server(
    store: RunStore,
    bundle: TaskBundle,
    broker: str,
    bundle_url: str,
    identity: Path | None,
    insecure: bool,
    log_bytes: int = LOG_BYTES,
    keepalive: int = KEEPALIVE_SECONDS,
    topic_prefix: str = ROOT,
    changes: Mapping[str, Any] = NO_CHANGES,
    allowed: frozenset[str] | None = None,
    metrics: str | None = None,
    track: Sequence[str] = (),
    wall: Callable[[], float] = time.time,
) -> None:
    """Coordinates all sessions until the run is finished. `changes`: fields of `Limits` that change from now on.
    `allowed`: the devices that may take part; None: all. `metrics`: where Prometheus metrics are served.
    `track`: trackers that get the figures of every closed round (see `trainer_server.tracking`). `wall`: the clock on
    the wall, in unix seconds, which decides when the run rests.

    Raises ConfigError if the run cannot have these limits or the metrics cannot be served, RunError if the run failed,
    another server runs in its folder, another run has its name, or a newer server took over.
    """

    def connection(will: Will | None = None) -> Link:
        # a client id of its own: amqtt would not tell the older one of two servers with one client id
        client_id = topics.client_id("server", secrets.token_hex(8))
        return Link(broker, client_id, will, identity=identity, insecure=insecure, keepalive=keepalive)

    def opened(bundle: TaskBundle, changes: Mapping[str, Any] = NO_CHANGES) -> Service:
        """The service of the present session."""
        # a file of a crashed server in this folder is removed with the next checkpoint
        plan = replace(make_plan(store, bundle), scratch=store.blobs.folder)
        state, at = restore_state(store, plan)
        plan = replace(plan, check_keys=_key_check(identity))
        state = change_limits(store, plan, state, at, changes)
        if state.announced is None:  # the join timeout starts again
            state = replace(state, since=at if state.held_at is None else state.held_at)
        status = ServerStatus(
            online=True,
            run=plan.config.run,
            session=plan.session,
            first_session=store.origin.first.session,
            instance=secrets.token_hex(8),
            bundle=bundle.sha256,
            task=bundle.task.sha256,
            bundle_url=bundle_url,
            model=bundle.manifest.model,
        )
        offline = status.model_copy(update={"online": False})
        link = connection(Will(topics.server_status, encode(offline)))
        return Service(plan, state, at, store, link, status, topics, figures, flooding, allowed, wall)

    topics = Topics(store.origin.config.run, topic_prefix)
    with store.files.locked(), log_to_folder(store.folder, log_bytes):
        require_own_run(connection(), topics, store.origin.first.session)
        figures, flooding = Figures.of_run(store), set[str]()
        service = opened(bundle, changes)
        if metrics:
            from fedfmsl.transport.metrics import serve_metrics
            from trainer_server.service.metrics import families  # takes 12 MB of memory

            serve_metrics(metrics, lambda: families(service.snapshot()), insecure)
        tracker = Tracker(store.folder, track, bundle.manifest.model) if track else None
        try:
            while service.run():  # until the last session
                service = opened(TaskBundle(bundle, store.task()))
        finally:
            if tracker:
                tracker.close()


def _key_check(identity: Path | None) -> CheckKeys:
    """With a certificate, the server accepts only keys for secure sums that a device of its CA has signed."""
    own = read_identity(identity) if identity else None
    if own is None or own.name is None:
        return unsigned
    authorities = Authorities(own.authorities)

    def check(name: str, signed: SignedKeys, message: bytes) -> None:
        authorities.check(name, signed.certificate, signed.signature, message)

    return check


def change_limits(store: RunStore, plan: Plan, state: State, at: float, changes: Mapping[str, Any]) -> State:
    """The state after these fields of its limits have changed. Raises ConfigError if the run cannot have them."""
    limits = state.limits.model_copy(update=dict(changes))
    if limits == state.limits or store.ended is not None:
        return state
    check_change(plan.config, limits)
    event = LimitsChanged(limits)
    after, commands = advance(plan, state, event, at)
    store.commit([LoggedEvent(at, event)])
    for command in commands:
        if isinstance(command, Log):
            logger.info(command.text)
    return after


def make_plan(store: RunStore, bundle: TaskBundle) -> Plan:
    return Plan(store.origin.session_config, bundle, store.origin.session, store.blobs.read, warm=store.warm_start())


def restore_state(store: RunStore, plan: Plan) -> tuple[State, float]:
    """The run's present state and second of its clock: the last checkpoint and the events logged after it."""
    state, at = store.state() or (initial_state(plan, 0.0), 0.0)
    for logged in store.events():
        state, _ = advance(plan, state, logged.event, logged.at)
        at = logged.at
    return state, at


def replay_rounds(store: RunStore, plan: Plan) -> Iterator[Round]:
    """Announces every round again, computed from the event log alone, from the first kept state on (--keep-rounds).

    Raises RunError if the run was started without --audit, which keeps the whole log.
    """
    if not store.origin.config.audit:
        raise RunError(f"{store.folder} was run without --audit, which keeps the updates; start a new run with --audit")
    state, _ = store.first_state() or (initial_state(plan, 0.0), 0.0)
    for logged in store.events(since_checkpoint=False):
        state, commands = advance(plan, state, logged.event, logged.at)
        yield from (command.round for command in commands if isinstance(command, AnnounceRound))
