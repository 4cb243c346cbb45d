"""Checks of the machine: state directory, clock, governor, watched folder."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone

from edge_runtime.daemon.lock import is_locked
from edge_runtime.preflight.context import Context, Finding, format_size
from edge_runtime.resources.governor import pause_reason
from edge_runtime.resources.sensors import Sensors
from edge_runtime.settings import Settings
from fedfmsl.common.class_folders import check_folder
from fedfmsl.errors import ConfigError, InputError, no_permission

CLOCK_SECONDS = 60.0  # that the clock may be behind the newest file
UNSYNCHRONIZED = 5  # TIME_ERROR of adjtimex(2)


def check_state(settings: Settings, context: Context) -> Iterator[Finding]:
    state = settings.state
    context.running = bool(is_locked(state))
    existing = next(path for path in (state.absolute(), *state.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"this user cannot write to {existing}; check as the daemon's user, or change its owner")
    free = shutil.disk_usage(existing).free
    text = f"{state}, {format_size(free)} free"
    if free < settings.keep_free:
        note = "less than --keep-free: the feature cache stays empty, and every round takes longer"
        yield Finding("state", f"{text}, {note}", warning=True)
    else:
        yield Finding("state", text)


def check_clock(settings: Settings, context: Context) -> Iterator[Finding]:
    now = datetime.now(timezone.utc)
    text = f"{now:%Y-%m-%d %H:%M} UTC"
    newest = max((path.stat().st_mtime for path in settings.state.glob("*")), default=0.0)
    if now.timestamp() < newest - CLOCK_SECONDS:
        raise ConfigError(f"the clock says {text}, but a file in {settings.state} is newer; set the clock")
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == UNSYNCHRONIZED:
        yield Finding("clock", f"{text}, not synchronized; certificates and --hours need the right time", warning=True)
    else:
        yield Finding("clock", f"{text}, synchronized")


def check_governor(settings: Settings, context: Context) -> Iterator[Finding]:
    readings = Sensors(zones=settings.thermal_zones).read()
    limits = settings.limits
    if limits.max_temperature is not None and readings.temperature is None:
        raise ConfigError(
            f"--max-temperature {limits.max_temperature:g}: no thermal zone can be read; omit it, or see "
            "--thermal-zones"
        )
    temperature = "no temperature" if readings.temperature is None else f"{readings.temperature:.1f} °C"
    power = "on battery" if readings.on_battery else "on mains"
    reason = pause_reason(limits, readings, datetime.now(), paused=False)
    decision = f"would pause now: {reason}" if reason else "would train now"
    yield Finding("governor", f"{temperature}, {power}; {decision}")


def check_watch(settings: Settings, context: Context) -> Iterator[Finding]:
    if settings.watch is None:
        return
    check_folder(settings.watch, "--watch")
    if not os.access(settings.watch, os.R_OK | os.X_OK):
        raise InputError(no_permission(f"--watch {settings.watch}"))
    yield Finding("watch", f"{settings.watch} can be read")


def check_page(settings: Settings, context: Context) -> Iterator[Finding]:
    """Answers move files from the watched folder to the sample folder, and write the labels file."""
    if settings.page is None or settings.watch is None:
        return
    folders = [settings.watch, settings.labels.parent if settings.labels else settings.images]
    denied = [str(folder) for folder in folders if not os.access(folder, os.W_OK | os.X_OK)]
    if denied:
        text = f"this user cannot write to {' and '.join(denied)}, so answers cannot be stored; change its owner"
        yield Finding("page", text, warning=True)
    else:
        yield Finding("page", "answers can be stored")
