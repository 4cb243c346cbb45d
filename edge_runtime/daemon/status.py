"""`python -m edge_runtime status`: describes the last health message of the daemon."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from edge_runtime.daemon.lock import is_locked
from edge_runtime.daemon.privacy_budget import describe_budget
from edge_runtime.data.ledger import open_ledger
from edge_runtime.data.proposals import describe_proposed
from edge_runtime.store import DeviceStore
from edge_runtime.training.stored_model import read_personal_model, served_accuracy
from fedfmsl.errors import BrokerError, InputError, RunError
from fedfmsl.protocol.messages import MAX_HEARTBEAT_AGE, Activity, Health, Stage
from fedfmsl.transport.identity import describe_expiry

LISTED = 20  # reasons for which files are skipped


def read_health(store: DeviceStore) -> Health:
    """Raises RunError if no daemon has used this state directory, ConfigError if this user may not read it."""
    try:
        return Health.model_validate_json(store.health.read_bytes())
    except PermissionError as error:
        raise store.permission_error() from error
    except (OSError, ValidationError) as error:
        raise RunError(f"no daemon has used --state {store.root} yet; check --state and --config") from error


def check_alive(health: Health, state: Path) -> None:
    """Raises RunError if the daemon has stopped, uses its state directory no longer, or sent no heartbeat for
    MAX_HEARTBEAT_AGE. Raises BrokerError if the broker refuses its certificate, for example a revoked one."""
    age = time.time() - health.time
    if health.activity is Activity.STOPPED and health.stage == Stage.FINISHED.value:
        raise RunError(
            f"the run has finished, and the daemon stopped {_ago(age)}; start it again for a new run of this name, or "
            "with --stay so that it waits for one"
        )
    if health.activity is Activity.STOPPED:
        raise RunError(f"the daemon stopped {_ago(age)}; start it again")
    if is_locked(state) is False:
        raise RunError(f"the daemon ended after its heartbeat {_ago(age)}; check its log and start it again")
    if age > MAX_HEARTBEAT_AGE:
        raise RunError(f"the daemon's last heartbeat was {_ago(age)}; check its log and start it again")
    if health.rejected:
        raise BrokerError(f"the broker refuses this device: {health.disconnected}")


def describe(health: Health, store: DeviceStore, now: float) -> Iterator[tuple[str, str]]:
    """Pairs of a label and a description. `now`: unix seconds."""
    yield "device", " · ".join(filter(None, (health.device, health.board, f"version {health.version}")))
    doing = health.activity.value + (f": {health.paused}" if health.paused else "")
    if _is_alive(health, now):
        lifetime = f"up for {_span(now - health.started)}"
    else:
        lifetime = f"ran for {_span(health.time - health.started)}"
    yield "now", f"{doing}, last heartbeat {_ago(now - health.time)}, {lifetime}"
    if health.disconnected_since:
        since = datetime.fromtimestamp(health.disconnected_since).isoformat(" ", "seconds")
        yield "broker", f"no connection since {since} because: {health.disconnected}"
    if health.refused:
        yield "broker", health.refused
    for label, until, who in (
        ("identity", health.certificate_until, health.device),
        ("", health.broker_certificate_until, "broker"),
    ):
        if until:
            yield label, f"certificate of {who} valid {describe_expiry(until, now, who)[0]}"
    if health.not_renewed:
        yield "renewal", f"failed: {health.not_renewed}; the daemon tries again"
    if health.stage == Stage.FINISHED.value:
        waits = "; this device waits for a new run of this name" if _is_alive(health, now) else ""
        yield "round", f"the run has finished{waits}"
    else:
        yield "round", f"{health.round} ({health.stage}), level {health.level}" if health.round else "none yet"
    yield "model", describe_model(store)
    yield "accuracy", describe_accuracy(store)
    slowdown = f", steps take {health.slowdown:.1f} times as long as measured" if health.slowdown > 1.1 else ""
    yield "level cap", f"{health.level_cap}{slowdown}"
    if health.provider:
        yield "provider", health.provider
    if budget := describe_budget(store.budget.read()):
        yield "privacy", budget
    new = f" ({health.new_samples} new)" if health.new_samples else ""
    yield "samples", f"{health.train} train{new}, {health.held_out} held-out, {health.test} test"
    if rehearsed := _rehearsed(store):
        yield "rehearsal", f"{rehearsed} deleted samples are trained with (--rehearse)"
    if health.proposed:
        yield "proposes", f"new classes: {describe_proposed(health.proposed)}; the operator can add them to the run"
    yield "updates", f"rounds done: {health.rounds_done}, not acknowledged yet: {health.unacknowledged}"
    facts = [f"{health.temperature:.1f} °C"] if health.temperature is not None else []
    facts += ["on battery"] if health.on_battery else []
    facts += [f"other processes use {health.others:.0%} of the processors"] if health.others is not None else []
    facts += ["metered network"] if health.metered else []
    yield "board", ", ".join(facts) or "no sensors"
    sizes = {"memory": health.memory, "features": health.cache, **store.sizes(), "disk free": health.disk_free}
    yield "storage", ", ".join(f"{what} {size / 1e6:.0f} MB" for what, size in sizes.items())
    lines = store.skipped.read_text("utf-8", errors="replace").splitlines() if store.skipped.is_file() else []
    reasons = list(itertools.takewhile(bool, lines))
    for line in reasons[:LISTED]:
        yield "skipped", line
    if reasons:
        yield "", f"{store.skipped} lists every file"


def describe_model(store: DeviceStore) -> str:
    """Which personalized model predictions use, like "of run orchard, round 12"."""
    try:
        header = read_personal_model(store).header
    except InputError:
        return "none yet"
    kept = f"; that of round {header.kept_at} is not used: {header.kept_because}" if header.kept_at else ""
    chosen = "; chosen by hand, python -m edge_runtime rollback --undo ends this" if header.by_hand else ""
    return f"of run {header.run}, round {header.round}{kept}{chosen}"


def describe_accuracy(store: DeviceStore) -> str:
    """Of the model that predictions use, on the device's test samples."""
    served = served_accuracy(store)
    if served is None:
        return "of this model not measured yet: a run measures it at its end"
    return f"{served.accuracy:.0%} of {served.samples} test samples right"


def _rehearsed(store: DeviceStore) -> int:
    """How many deleted samples the last round trained with; 0 if that is unknown."""
    if store.samples.is_file():
        with contextlib.suppress(OSError, InputError), open_ledger(store.samples) as ledger:
            return ledger.deleted_kept_for_rehearsal()
    return 0


def _is_alive(health: Health, now: float) -> bool:
    return health.activity is not Activity.STOPPED and now - health.time <= MAX_HEARTBEAT_AGE


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    return str(timedelta(seconds=max(round(seconds), 0)))
