"""python -m edge_runtime: the daemon, and the commands around it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import typer

from edge_runtime.cache import DiskCache
from edge_runtime.classifier import Classifier, FileClassifier, StateClassifier
from edge_runtime.device import Device
from edge_runtime.download import fetch_bundle, find_server
from edge_runtime.engine import Fit
from edge_runtime.engines import open_engine
from edge_runtime.features import FeatureCache
from edge_runtime.gate import Gate
from edge_runtime.inputs import reader_of
from edge_runtime.lock import locked
from edge_runtime.predict import predict_files, printer, quiet_without_a_reader
from edge_runtime.presence import device_link, progress_to
from edge_runtime.probe import make_plan, probe_levels
from edge_runtime.publish import Publisher
from edge_runtime.samples import scan
from edge_runtime.service import Service
from edge_runtime.settings import PredictSettings, with_settings
from edge_runtime.store import DeviceStore
from edge_runtime.stream import Inbox, wait_for_a_model, watched
from protocol.bundle import Bundle
from protocol.errors import ConfigError
from protocol.messages import EngineChoice, Prediction
from protocol.topics import Topics
from shell.cli import BROKER, IDENTITY, INSECURE, application, byte_size, console
from shell.identity import device_name

app = application("Adapt a foundation model to the images or texts of this device, in a federated run.")


@app.command()
def run(
    run: str = typer.Option(help="The run's name."),
    images: Path = typer.Option(help="Folder of images, or of texts: DIR/<class>/… or DIR/{train,test}/<class>/…"),
    broker: str = BROKER,
    identity: Path | None = IDENTITY,
    insecure: bool = INSECURE,
    state: Path = typer.Option(Path("device"), help="Where this device keeps what it must not lose."),
    device: str | None = typer.Option(
        None, help="This device's name, at its first start. Default: the identity's, or from the host's."
    ),
    bundle: Path | None = typer.Option(None, help="A bundle's folder. Default: fetched from the run's server."),
    engine: EngineChoice = typer.Option(
        "auto", help="What trains. auto: onnxruntime-training where it is installed and the bundle is built for it."
    ),
    threads: int = typer.Option(0, min=0, help="Threads to compute with. 0: one per core."),
    memory: str | None = typer.Option(None, help="Memory it may take, like 512MB. Default: half of what there is."),
    cache: str | None = typer.Option(
        None,
        help="Disk that features may take, like 2GB; others are computed each time. Default: half of what is free.",
    ),
    step_seconds: float = typer.Option(60.0, min=0.001, help="Longest time a training step may take."),
) -> None:
    """Take part in a run until it is finished."""
    memory_bytes, cache_bytes = byte_size("--memory", memory), byte_size("--cache", cache)
    topics, store = Topics(run), DeviceStore(state)
    name = store.identity(device_name(device, identity))
    threads = threads or os.cpu_count() or 1
    link = device_link(broker, topics, name, identity, insecure)
    link.connect()
    opened = Bundle(bundle) if bundle else fetch_bundle(find_server(link, topics), state / "bundles", identity)
    opened.verify()
    chosen = open_engine(engine, opened, threads).name
    kind = reader_of(opened).kind
    slices = scan(images, opened.manifest.classes, kind)
    for path in slices.unreadable:
        console.print(f"skipped, not a readable {kind.noun}: {path}")
    report = progress_to(link, topics, name)
    report("measuring", 0, 1)
    samples = slices.train + slices.held_out + slices.test
    largest = max((kind.extent(sample.path), sample.path) for sample in samples)
    plan = make_plan(opened, store, chosen, threads, largest, memory_bytes, step_seconds)
    console.print(
        f"device {name}: {len(slices.train)} {kind.noun}s to train on, {len(slices.held_out)} held out, "
        f"{len(slices.test)} to test on; engine {chosen}, level cap {plan.level_cap}"
    )
    trainer = open_engine(chosen, opened, threads, plan.fits)
    disk = DiskCache(store.cache, cache_bytes)
    node = Device(
        name=name,
        bundle=opened,
        scanned=slices,
        cache=FeatureCache(disk, opened, threads, report, plan.feature_batch, trainer.release),
        engine=trainer,
        gate=Gate(opened, threads),
        store=store,
        level_cap=plan.level_cap,
        report=report,
    )
    Service(node, run, link).serve()


@app.command()
@with_settings(PredictSettings)
def predict(
    settings: PredictSettings,
    files: list[Path] | None = typer.Argument(None, help="Images (or texts, as the model takes), or folders of them."),
    model: Path | None = typer.Option(
        None, help="A personalized model (.onnx). Default: the newest in the state folder."
    ),
    watch: Path | None = typer.Option(None, help="Classify what lies in this folder or arrives, until interrupted."),
    new: bool = typer.Option(False, "--new", help="Of the watched folder only what arrives from now on."),
    unknown: float | None = typer.Option(
        None, min=0, max=1, help="Confidence below which a file is unknown. Default: the model's own."
    ),
    top: int = typer.Option(3, min=1, help="Classes to show for each file."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per file, with every class."),
    publish: bool = typer.Option(False, "--publish", help="Also publish them in the run, where no daemon does."),
) -> None:
    """Classify images or texts with a personalized model."""
    if bool(files) == bool(watch) or (new and not watch):
        raise ConfigError("say what to classify: files or folders, or --watch FOLDER (--new: only what will arrive)")
    inbox = Inbox(watch, only_new=new) if watch else None
    with contextlib.ExitStack() as until_the_end, quiet_without_a_reader():
        if model is not None:
            classifier: Classifier = FileClassifier(model, unknown)
        else:
            store = DeviceStore(settings.state)
            if publish:
                until_the_end.enter_context(locked(store.root, "where a daemon runs, set its `watch` instead"))
            if inbox is not None:
                wait_for_a_model(store)
            classifier = StateClassifier(store, settings.bundle, unknown)
        tell: list[Callable[[Prediction | None], None]] = [printer(as_json, top)]
        if publish:
            tell.append(until_the_end.enter_context(Publisher(classifier, settings)).tell)
        for prediction in watched(classifier, inbox) if inbox else predict_files(classifier, files or []):
            for each in tell:
                each(prediction)


@app.command()
def personalize(
    state: Path = typer.Option(help="The device's state folder."),
    bundle: Path | None = typer.Option(None, help="The bundle's folder. Default: the model's, in the state folder."),
    out: Path | None = typer.Option(None, help="File to write. Default: personalized.onnx in the state folder."),
) -> None:
    """Write this device's personalized model, as of its last round, as one self-contained ONNX file."""
    from edge_runtime.personalize import write_model  # the only user of the onnx package

    store = DeviceStore(state)
    path = out or store.personalized
    write_model(store, path, bundle)
    print(path)


@app.command(hidden=True)
def probe(
    bundle: Path = typer.Option(),
    engine: EngineChoice = typer.Option("auto"),
    threads: int = typer.Option(1, min=1),
    sample: Path = typer.Option(help="What to pass through the backbone."),
    feature_batch: int = typer.Option(1, min=1),
    first: int = typer.Option(1, min=1),
    micro_batch: int = typer.Option(1, min=1),
    lean: bool = typer.Option(False),
) -> None:
    """Work as a daemon does, level by level from the first; print what each took as it ends."""
    fit = Fit(micro_batch, lean)
    for line in probe_levels(Bundle(bundle), engine, threads, sample, feature_batch, first, fit):
        print(line.model_dump_json(), flush=True)


if __name__ == "__main__":
    app()
