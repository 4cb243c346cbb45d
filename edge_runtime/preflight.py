"""All that a run will need, looked at before it does: nothing is written, and what is wrong says what to do (ours)."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from edge_runtime.daemon.download import fetch_manifest, receive_server_status
from edge_runtime.daemon.lock import is_locked
from edge_runtime.data.folder import SampleFolder, largest
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.sample_reader import SampleReader
from edge_runtime.engines.factory import open_engine
from edge_runtime.resources.governor import pause_reason
from edge_runtime.resources.plan import measure_minimum
from edge_runtime.resources.sensors import Sensors
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.errors import BundleError, ConfigError, FedFMSLError
from fedfmsl.protocol.bundle import MANIFEST, Bundle
from fedfmsl.protocol.messages import ServerStatus
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.address import parse_address
from fedfmsl.transport.identity import device_name, read_identity
from fedfmsl.transport.link import Link

SERVER_SECONDS = 10.0  # in which a server that is there has been heard
SOON = timedelta(days=30)  # before a certificate ends
_UNSYNCHRONIZED = 5  # TIME_ERROR of adjtimex(2)


@dataclass(frozen=True)
class Finding:
    """`code` is the exit code that a run would end with; 0 where nothing is wrong. `doubtful`: it may become wrong."""

    what: str
    text: str
    code: int = 0
    doubtful: bool = False


@dataclass
class _Seen:
    """What earlier looks have found, for later ones."""

    server: ServerStatus | None = None
    bundle: Bundle | None = None
    running: bool = False
    largest: Path | None = None  # of the samples
    scratch: Path = field(default_factory=Path)


Look = Callable[[Settings, _Seen], Iterator[Finding]]


def run_preflight(settings: Settings) -> Iterator[Finding]:
    """One after the other, as they are found."""
    looks: dict[str, Look] = {
        "state": _state,
        "clock": _clock,
        "identity": _identity,
        "broker": _broker,
        "bundle": _bundle,
        "samples": _samples,
        "memory": _memory,
        "governor": _governor,
        "watch": _watch,
    }
    with tempfile.TemporaryDirectory() as scratch:
        seen = _Seen(scratch=Path(scratch))
        for what, look in looks.items():
            try:
                yield from look(settings, seen)
            except FedFMSLError as error:
                yield Finding(what, str(error), error.exit_code)


def _state(settings: Settings, seen: _Seen) -> Iterator[Finding]:
    state = settings.state
    seen.running = is_locked(state)
    existing = next(path for path in (state.absolute(), *state.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{existing} cannot be written to by this user; check as the daemon's user, or give it the folder"
        )
    free = shutil.disk_usage(existing).free
    text = f"{state}, {_size(free)} free"
    if free < settings.keep_free:
        yield Finding(
            "state", f"{text}, less than --keep-free: no features are kept, every round takes longer", doubtful=True
        )
    else:
        yield Finding("state", text)


def _clock(settings: Settings, seen: _Seen) -> Iterator[Finding]:
    now = datetime.now(timezone.utc)
    written = max((path.stat().st_mtime for path in settings.state.glob("*")), default=0.0)
    if now.timestamp() < written - 60:
        raise ConfigError(
            f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC, and the state folder was written after that; set it"
        )
    text = f"{now:%Y-%m-%d %H:%M} UTC"
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == _UNSYNCHRONIZED:
        yield Finding("clock", f"{text}, not synchronized; certificates and --hours need the right time", doubtful=True)
    else:
        yield Finding("clock", f"{text}, synchronized")


def _identity(settings: Settings, seen: _Seen) -> Iterator[Finding]:
    name = device_name(settings.device, settings.identity)
    if settings.identity is None:
        yield Finding("identity", "none; the broker has to let everybody in, or a user and password")
        return
    valid = read_identity(settings.identity).valid
    if valid is None:
        yield Finding("identity", f"{settings.identity} knows whom to trust, and is nobody itself")
        return
    start, end = valid
    now = datetime.now(timezone.utc)
    if not start <= now <= end:
        raise ConfigError(
            f"the certificate in {settings.identity} is valid from {start:%Y-%m-%d} to {end:%Y-%m-%d}, and this "
            f"machine's clock says {now:%Y-%m-%d}; set the clock, or ask the operator for another"
        )
    yield Finding("identity", f"{name}, until {end:%Y-%m-%d}", doubtful=end - now < SOON)


def _broker(settings: Settings, seen: _Seen) -> Iterator[Finding]:
    if seen.running:
        yield Finding("broker", "the daemon is at work and speaks for this device: see edge_runtime status")
        return
    topics, address = Topics(settings.run), parse_address(settings.broker)
    client = f"fedfmsl-check-{secrets.token_hex(8)}"
    link = Link(settings.broker, client, identity=settings.identity, insecure=settings.insecure)
    link.connect()
    try:
        yield Finding("broker", f"{address.host}:{address.port} lets this device in")
        seen.server = receive_server_status(link, topics, SERVER_SECONDS)
    finally:
        link.close()
    if seen.server is None:
        yield Finding("server", f"none of run {settings.run!r} at present; a device waits for it", doubtful=True)
    else:
        yield Finding("server", f"run {settings.run!r} is there, model {seen.server.model}")


def _bundle(settings: Settings, seen: _Seen) -> Iterator[Finding]:
    announced = seen.server.bundle if seen.server else ""
    store = DeviceStore(settings.state)
    root = settings.bundle or (store.bundles / announced if announced else _newest(store.bundles))
    if (root is not None and (root / MANIFEST).is_file()) or settings.bundle:
        assert root is not None
        bundle = Bundle.load(root)
        bundle.verify()
        if announced and bundle.sha256 != announced:
            raise BundleError(
                f"bundle {root} is not that of run {settings.run!r}; leave --bundle away to fetch it from the server"
            )
        seen.bundle = bundle
        yield Finding("bundle", f"{bundle.manifest.model} at {root}, every byte as it should be")
        return
    if seen.server is None:
        yield Finding("bundle", "none here yet; it is fetched from the server", doubtful=not seen.running)
        return
    manifest = fetch_manifest(seen.server, seen.scratch, settings.identity).manifest
    size, free = sum(entry.size for entry in manifest.files.values()), shutil.disk_usage(store.root.parent).free
    if size > free:
        raise BundleError(f"the run's bundle takes {_size(size)}, and {_size(free)} are free; free some disk")
    yield Finding("bundle", f"{manifest.model} can be fetched, {_size(size)}")


def _samples(settings: Settings, seen: _Seen) -> Iterator[Finding]:
    if seen.bundle is None:
        if not settings.images.is_dir():
            raise ConfigError(f"--images {settings.images} does not exist; give a folder")
        yield Finding("samples", f"{settings.images} is looked through once the bundle is here", doubtful=True)
        return
    reader = SampleReader(reader_of(seen.bundle))
    kind, scratch = reader.kind, DeviceStore(seen.scratch)
    slices = SampleFolder(settings.images, seen.bundle, scratch, settings.labels, reader=reader).scan()
    samples = slices.samples
    _, seen.largest = largest(samples, kind)
    classes = len({sample.label for sample in samples})
    text = f"{len(samples)} {kind.noun}s of {classes} classes in {settings.images}"
    yield Finding("samples", text)
    for one in slices.skipped:
        yield Finding("skipped", f"{one.path}: {one.reason}", doubtful=True)


def _memory(settings: Settings, seen: _Seen) -> Iterator[Finding]:
    if seen.bundle is None or seen.largest is None or seen.running:
        return
    threads = settings.threads or os.cpu_count() or 1
    engine = open_engine(settings.engine, seen.bundle, threads).name
    started = time.monotonic()
    least, seconds = measure_minimum(seen.bundle, engine, threads, seen.largest, settings.memory, settings.step_seconds)
    took = time.monotonic() - started
    yield Finding(
        "memory",
        f"a round at level 1 takes {_size(least)}, a step {seconds:.2f} s (measured in {took:.0f} s); engine {engine}",
    )


def _governor(settings: Settings, seen: _Seen) -> Iterator[Finding]:
    readings = Sensors(zones=settings.thermal_zones).read()
    limits = settings.limits
    if limits.max_temperature is not None and readings.temperature is None:
        raise ConfigError(
            f"--max-temperature {limits.max_temperature:g}: no thermal zone can be read; leave it away, or see "
            "--thermal-zones"
        )
    heat = "no temperature" if readings.temperature is None else f"{readings.temperature:.1f} °C"
    forbidden = pause_reason(limits, readings, datetime.now(), paused=False)
    power = "on battery" if readings.on_battery else "on mains"
    yield Finding(
        "governor", f"{heat}, {power}; " + (f"would pause now: {forbidden}" if forbidden else "would train now")
    )


def _watch(settings: Settings, seen: _Seen) -> Iterator[Finding]:
    if settings.watch is None:
        return
    if not os.access(settings.watch, os.R_OK | os.X_OK):
        raise ConfigError(f"--watch {settings.watch} is no folder that this user may read; make it, or give another")
    yield Finding("watch", f"{settings.watch} can be read")


def _newest(bundles: Path) -> Path | None:
    manifests = sorted(bundles.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    return manifests[-1].parent if manifests else None


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
