"""How this device is, as its daemon last wrote it down: `python -m edge_runtime status`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

from pydantic import ValidationError

from edge_runtime.store import DeviceStore
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.messages import HEALTH_SECONDS, Activity, Health

SILENCE = 3 * HEALTH_SECONDS + 30  # seconds after which a daemon that has written nothing is taken for dead
SHOWN = 20  # of the files that are set aside


def read_health(store: DeviceStore) -> Health:
    """Raises RunError if no daemon has ever worked on this state folder."""
    try:
        return Health.model_validate_json(store.health.read_bytes())
    except PermissionError as error:
        raise ConfigError(
            f"{store.root} may not be read by this user; ask as its daemon's (sudo -u fedfmsl)"
        ) from error
    except (OSError, ValidationError) as error:
        raise RunError(
            f"no daemon has worked with --state {store.root} yet; is that the right folder (--config, --state)?"
        ) from error


def check_alive(health: Health) -> None:
    """Raises RunError if the daemon has stopped, or has not been heard of for too long."""
    silence = time.time() - health.time
    if health.activity is Activity.STOPPED:
        raise RunError(f"the daemon has stopped, {_ago(silence)}; start it again")
    if silence > SILENCE:
        raise RunError(f"the daemon was last heard of {_ago(silence)}; see its log, and start it again")


def describe(health: Health, store: DeviceStore) -> Iterator[tuple[str, str]]:
    """What and how it is, line by line."""
    yield "device", " · ".join(filter(None, (health.device, health.board, f"version {health.version}")))
    doing = health.activity.value + (f": {health.paused}" if health.paused else "")
    yield "now", f"{doing}, heard of {_ago(time.time() - health.time)}, up for {_span(health.time - health.started)}"
    yield "round", f"{health.round} ({health.stage}), level {health.level}" if health.round else "none yet"
    slower = f", steps take {health.slowdown:.1f} times as long as measured" if health.slowdown > 1.1 else ""
    yield "level cap", f"{health.level_cap}{slower}"
    yield "samples", f"{health.train} to train on, {health.held_out} held out, {health.test} to test on"
    yield "updates", f"{health.rounds_done} rounds done, {health.unacknowledged} updates not acknowledged yet"
    facts = [f"{health.temperature:.1f} °C"] if health.temperature is not None else []
    facts += ["on battery"] if health.on_battery else []
    facts += [f"others use {health.others:.0%} of the processors"] if health.others is not None else []
    facts += ["metered network"] if health.metered else []
    yield "board", ", ".join(facts) or "says nothing"
    sizes = {"memory": health.memory, "features": health.cache, "disk free": health.disk_free}
    yield "room", ", ".join(f"{what} {size / 1e6:.0f} MB" for what, size in sizes.items())
    lines = store.skipped.read_text(errors="replace").splitlines() if store.skipped.is_file() else []
    for line in lines[:SHOWN]:
        yield "set aside", line
    if len(lines) > SHOWN:
        yield "", f"and {len(lines) - SHOWN} more, in {store.skipped}"


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    return str(timedelta(seconds=max(round(seconds), 0)))
