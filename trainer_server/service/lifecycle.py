"""Starting a run, going on with one, and doing one over: what stands between the commands and the service."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedfmsl.errors import BundleError, ConfigError, RunError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Round, ServerStatus, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Will
from trainer_server.config import RunConfig
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import AnnounceRound
from trainer_server.coordinator.state import Plan, State, initial_state
from trainer_server.service.loop import Service
from trainer_server.storage.run_store import DATABASE, Origin, RunStore


def open_run(folder: Path, config: RunConfig, bundle: Bundle) -> RunStore:
    """A new run, or the one that the same settings have started at `folder`.

    Raises ConfigError naming the first setting in which the run there differs, RunError if the folder cannot be used.
    """
    if not (folder / DATABASE).is_file():
        origin = Origin(
            config=config, session=secrets.token_hex(8), bundle=bundle.root.absolute(), sha256=bundle.sha256
        )
        try:
            return RunStore.create(folder, origin)
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"{folder} cannot be written ({error}); choose another --out, or free some space") from error
    store = RunStore(folder)
    if store.is_unstarted():  # a start that got no further, for want of a broker perhaps, binds nobody
        store.reset(config, bundle)
    was = store.origin
    if was.sha256 != bundle.sha256:
        raise ConfigError(f"{folder} holds a run with another bundle ({was.bundle}); choose another --out")
    for name, value in config:
        if getattr(was.config, name) != value:
            raise ConfigError(
                f"{folder} holds run {was.config.run!r} with {name} = {getattr(was.config, name)}, not {value}; go on "
                "with python -m trainer_server resume, or choose another --out"
            )
    return store


def open_bundle(store: RunStore) -> Bundle:
    """The bundle that a run was started with. Raises BundleError if it is not there any more."""
    bundle = Bundle(store.origin.bundle)
    if bundle.sha256 != store.origin.sha256:
        raise BundleError(f"{bundle.root} is not the bundle that the run was started with; put that one back")
    return bundle


def run_server(
    store: RunStore, bundle: Bundle, broker: str, bundle_url: str, identity: Path | None, insecure: bool
) -> None:
    """Coordinates until the run has ended. Raises RunError if it had to be given up or another server is at work."""
    with store.locked():
        plan = plan_of(store, bundle)
        state, at = restore_state(store, plan)
        if state.announced is None:  # the wait for devices begins anew
            state = replace(state, since=at)
        status = ServerStatus(
            online=True,
            run=plan.config.run,
            session=plan.session,
            bundle=bundle.sha256,
            bundle_url=bundle_url,
            model=bundle.manifest.model,
        )
        offline = status.model_copy(update={"online": False})
        will = Will(Topics(plan.config.run).server_status, encode(offline))
        link = Link(broker, f"fedfmsl-server-{plan.config.run}", will, identity=identity, insecure=insecure)
        Service(plan, state, at, store, link, status).run()


def plan_of(store: RunStore, bundle: Bundle) -> Plan:
    return Plan(store.origin.config, bundle, store.origin.session, store.read)


def restore_state(store: RunStore, plan: Plan) -> tuple[State, float]:
    """Where a run stands, and at which second of its clock: what was kept last, and all that was logged since."""
    state, at = store.state() or (initial_state(plan, 0.0), 0.0)
    for logged in store.events():
        state, _ = advance(plan, state, logged.event, logged.at)
        at = logged.at
    return state, at


def replay_rounds(store: RunStore, plan: Plan) -> Iterator[Round]:
    """The rounds as they follow from the run's log alone, from its first event on.

    Raises RunError if the log was not kept (it is with --audit).
    """
    if not store.origin.config.audit:
        raise RunError(f"{store.folder} was run without --audit, so its updates were not kept")
    state = initial_state(plan, 0.0)
    for logged in store.events(since_checkpoint=False):
        state, commands = advance(plan, state, logged.event, logged.at)
        yield from (command.round for command in commands if isinstance(command, AnnounceRound))
