"""The commands of the server. `trainer_server.__main__` lists them.

Those that only read are in `trainer_server.inspect`, those that ask a server for an action in `trainer_server.operate`.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from fedfmsl.common.cli import application
from fedfmsl.common.logs import set_up_logging, signals_logged
from fedfmsl.common.options import with_settings
from fedfmsl.common.settings import read_settings
from fedfmsl.errors import ConfigError, RunError, no_permission
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link
from trainer_server.coordinator.records import number_of
from trainer_server.inspect import export, replay, rounds, status
from trainer_server.operate import classes, rollback
from trainer_server.service.bundle_http import BundleServer
from trainer_server.service.console_job import console_job, start_console
from trainer_server.service.lifecycle import NO_CHANGES, open_bundle, open_run, run_server
from trainer_server.service.loop import FINISHED
from trainer_server.service.purge import purge as remove_retained
from trainer_server.service.run_log import log_operator_state
from trainer_server.service.stored import refuse_changes, require_unchanged
from trainer_server.settings import ConsoleSettings, PurgeSettings, ResumeSettings, ServerSettings, ServiceSettings
from trainer_server.storage.run_status import paused_and_excluded
from trainer_server.storage.run_store import RunStore, require_folder

logger = logging.getLogger(__name__)
app = application()

FROM = typer.Option(
    None,
    "--from",
    help="Go on from this folder, of an earlier run or of a PEFT adapter of the same base, and not from zeros. Classes "
    "are matched by name.",
)


@app.command()
@with_settings(ServerSettings)
def start(settings: ServerSettings, source: Path | None = FROM) -> None:
    """Coordinate one run until it is finished. The same command resumes an interrupted run."""
    bundle = settings.open_task(settings.bundle)
    bundle.verify()
    store = open_run(settings.folder, settings.run_config(bundle), bundle, source)
    _coordinate(store, TaskBundle(bundle, store.task()), settings)


def _read_resume(config: Path | None, flags: Mapping[str, Any]) -> ResumeSettings:
    settings = read_settings(ResumeSettings, config, flags, file_model=ServerSettings)
    require_unchanged(RunStore(settings.out).origin.config, config)
    return settings


@app.command()
@with_settings(ResumeSettings, read=_read_resume)
def resume(settings: ResumeSettings) -> None:
    """Resume an interrupted run with its stored configuration.

    Only --round-timeout, --min-updates, --max-repeats, --enough, --schedule, --every and --min-new may change.
    Connection and log settings are not stored; pass them again or use --config.
    """
    store = RunStore(settings.out)
    refuse_changes(store, settings.changes)
    bundle = open_bundle(store)
    bundle.verify()
    _coordinate(store, bundle, settings, settings.changes)


def _coordinate(
    store: RunStore, bundle: TaskBundle, settings: ServiceSettings, changes: Mapping[str, Any] = NO_CHANGES
) -> None:
    os.umask(0o027)  # the run's files hold updates of devices
    set_up_logging(settings.log, settings.log_file)
    run = store.origin.config.run
    if store.ended is None:
        for text in filter(None, (store.origin.config.exposure, store.origin.config.lacks_sums)):
            logger.warning(text)
    if store.ended == FINISHED:
        logger.info(f"run {run!r} has finished; announcing it again")
    elif store.ended is not None:
        logger.info(f"run {run!r} at {store.folder} has ended ({store.ended}); for a new one choose another --out")
    elif store.checkpoint() is not None:
        logger.info(f"resuming run {run!r} at {store.folder}")
    elif store.origin.start is not None:
        logger.info(f"run {run!r} goes on from {store.origin.start.text}")
        if text := store.origin.uncounted:
            logger.warning(text)
    if store.ended is None:
        log_operator_state(*paused_and_excluded(store))
    identity, insecure = settings.identity, settings.insecure
    if settings.allowed is not None and len(settings.allowed) < store.origin.config.devices:
        raise ConfigError(
            f"--allow has {number_of(len(settings.allowed), 'device')}, and the run waits for "
            f"{store.origin.config.devices}; add names, or lower --devices"
        )
    with ExitStack() as served:
        served.enter_context(signals_logged(logger, "to go on, give the same command again"))
        url = ""
        if settings.serve:
            bundle_server = BundleServer(
                bundle.root, settings.serve, identity, insecure, settings.revoked, settings.allowed
            )
            served.callback(bundle_server.close)
            url = bundle_server.url
        if settings.console:
            job = console_job(settings.console, store.folder, identity, settings.revoked, settings.console_token)
            served.callback(start_console(job).close)
        run_server(
            store,
            bundle,
            settings.broker,
            url,
            identity,
            insecure,
            topic_prefix=settings.topic_prefix,
            changes=changes,
            allowed=settings.allowed,
            metrics=settings.metrics,
            track=settings.track,
        )
    logger.info("run finished")


@app.command(name="console")
@with_settings(ConsoleSettings, ServerSettings)
def show_console(settings: ConsoleSettings) -> None:
    """Serve the operator's console for the runs in a folder: running, interrupted and finished ones."""
    from trainer_server.console.process import serve

    set_up_logging(settings.log, settings.log_file)
    require_folder(settings.out)
    if not settings.out.is_dir():
        raise RunError(f"--out {settings.out} does not exist; give the folder of a run, or of several runs")
    if not os.access(settings.out, os.R_OK | os.X_OK):
        raise ConfigError(no_permission(f"--out {settings.out}"))
    job = console_job(settings.console, settings.out, settings.identity, settings.revoked, settings.console_token)
    with signals_logged(logger, "the runs go on"), serve(job):
        logger.info(job.where)
        threading.Event().wait()


@app.command()
@with_settings(PurgeSettings, ServerSettings)
def purge(settings: PurgeSettings) -> None:
    """Remove everything that a run has left on the broker: its retained messages, and devices in Home Assistant.

    The folder of the run stays. Devices that still run publish their status again.
    """
    from fedfmsl.common.cli import console

    topics = Topics(settings.run, settings.topic_prefix)
    link = Link(
        settings.broker,
        topics.client_id("purge", secrets.token_hex(4)),
        identity=settings.identity,
        insecure=settings.insecure,
    )
    removed = remove_retained(link, topics, settings.home_assistant)
    console.print(f"removed {removed} retained messages of run {settings.run!r} from the broker")


for command in (status, rounds, export, replay, rollback, classes):
    app.command()(command)
