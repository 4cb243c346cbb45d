"""Checks of what a device trains: bundle, samples, memory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

from edge_runtime.daemon.download import fetch_manifest
from edge_runtime.data.folder import SampleFolder, largest
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.proposals import NothingToTrainError, describe_proposed
from edge_runtime.data.sample_reader import SampleReader
from edge_runtime.engines.factory import open_engine
from edge_runtime.preflight.context import Context, Finding, format_size
from edge_runtime.resources.plan import largest_extent, measure_minimum
from edge_runtime.resources.providers import describe_choice, first_that_fits, provider_for
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.common.class_folders import check_folder
from fedfmsl.common.folder_walk import summarize
from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import MANIFEST, Bundle
from fedfmsl.protocol.task_bundle import TaskBundle


def check_bundle(settings: Settings, context: Context) -> Iterator[Finding]:
    """The bundle that a run would use: --bundle, or the server's, which is not downloaded here. Without a server, the
    one that the device uses."""
    announced = context.server.bundle if context.server else ""
    store = DeviceStore(settings.state)
    expected = announced or store.present_bundle
    root = settings.bundle or (store.bundles / expected if expected else None)
    if root is not None and (settings.bundle or (root / MANIFEST).is_file()):
        bundle = Bundle.load(root)
        bundle.verify()
        if announced and bundle.sha256 != announced:
            raise BundleError(
                f"bundle {root} is not that of run {settings.run!r}; omit --bundle to download it from the server"
            )
        task = context.task or store.tasks.known_for(bundle)
        if task is not None:
            context.bundle = TaskBundle(bundle, task)
        yield Finding("bundle", f"{bundle.manifest.model} at {root}, checksums OK")
        return
    if context.server is None:
        yield Finding("bundle", "none yet; the daemon downloads it from the server", warning=not context.running)
        return
    manifest = fetch_manifest(context.server, context.scratch, settings.identity).manifest
    size, free = sum(entry.size for entry in manifest.files.values()), shutil.disk_usage(store.root.parent).free
    if size > free:
        raise BundleError(
            f"the run's bundle takes {format_size(size)}, and {format_size(free)} are free; free some space"
        )
    yield Finding("bundle", f"{manifest.model} can be downloaded, {format_size(size)}")


def check_samples(settings: Settings, context: Context) -> Iterator[Finding]:
    if context.bundle is None:
        check_folder(settings.images, "--images")
        yield Finding(
            "samples", f"{settings.images} exists; checking its files needs the bundle and the server", warning=True
        )
        return
    reader = SampleReader(reader_of(context.bundle))
    scratch = DeviceStore(context.scratch)
    most = largest_extent(settings.memory)
    folder = SampleFolder(
        settings.images, context.bundle, scratch, settings.labels, reader, most, proposes=settings.propose
    )
    try:
        splits = folder.scan()
    except NothingToTrainError as error:
        if not error.proposed:
            raise
        waits = f"the daemon proposes {describe_proposed(error.proposed)} and waits until one of them is added"
        yield Finding("samples", f"{error}; {waits}", warning=True)
        return
    _, context.largest = largest(splits.samples, reader.kind)
    classes = len({sample.label for sample in splits.samples})
    yield Finding("samples", f"{len(splits.samples)} {reader.kind.noun}s of {classes} classes in {settings.images}")
    if splits.proposed:
        yield Finding("proposes", f"new classes: {describe_proposed(splits.proposed)}", warning=True)
    missed = [each for each in splits.skipped if not each.is_leftover]
    leftovers = [each for each in splits.skipped if each.is_leftover]
    for group in (missed, leftovers):
        for line in summarize(group, settings.images):
            yield Finding("skipped", line, warning=group is missed)


def check_memory(settings: Settings, context: Context) -> Iterator[Finding]:
    """Measures a round at level 1."""
    if context.bundle is None or context.largest is None or context.running:
        return
    threads = settings.thread_count
    engine = open_engine(settings.engine, context.bundle, threads).name
    bundle, sample, scratch = context.bundle, context.largest, context.scratch
    memory, step_seconds = settings.memory, settings.step_seconds
    fastest = provider_for(engine, settings.provider, bundle, threads, DeviceStore(scratch))
    started = time.monotonic()
    choice, (needed, seconds) = first_that_fits(
        fastest, lambda name: measure_minimum(bundle, engine, threads, name, sample, memory, step_seconds, scratch)
    )
    yield Finding("provider", describe_choice(choice))
    yield Finding(
        "memory",
        f"a round at level 1 takes {format_size(needed)}, a step {seconds:.2f} s (measured in "
        f"{time.monotonic() - started:.0f} s); engine {engine}",
    )
