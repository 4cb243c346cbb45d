"""The commands of a device. `edge_runtime.__main__` lists them.

Each command imports what it needs. `status` runs often, on slow boards, and does not need ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edge_runtime.settings import PredictSettings, Settings, StateSettings
from fedfmsl.common.cli import application, print_json
from fedfmsl.common.options import with_settings
from fedfmsl.common.settings import read_settings
from fedfmsl.errors import ConfigError, FedFMSLError
from fedfmsl.protocol.setting_types import EngineChoice

if TYPE_CHECKING:
    from edge_runtime.inference.classifier import Classifier
    from fedfmsl.protocol.messages import Prediction

app = application()


@app.command()
@with_settings(Settings)
def run(settings: Settings) -> None:
    """Take part in a run until it is finished. With --watch, also classify new files, and continue after the run."""
    from edge_runtime.daemon.launch import launch

    launch(settings)


def _with_file(config: Path | None, flags: Mapping[str, Any]) -> tuple[Settings, Path | None]:
    return read_settings(Settings, config, flags), config


@app.command()
@with_settings(Settings, read=_with_file)
def check(read: tuple[Settings, Path | None]) -> None:
    """Check what a run needs: clock, disk, broker, certificate, bundle, samples, memory. Writes nothing."""
    from edge_runtime.preflight import run_preflight
    from fedfmsl.common.cli import console

    code = 0
    for finding in run_preflight(*read):
        code = code or finding.code
        mark = "error" if finding.code else "note" if finding.warning else "ok"
        console.print(f"{mark:5}  {finding.name:9}  {finding.text}")
    sys.exit(code)


@app.command()
def enroll(
    token: str | None = typer.Argument(
        None, envvar="FEDFMSL_TOKEN", help="What python -m devices.provision token printed. Not with --install."
    ),
    renew: Path | None = typer.Option(
        None, help="Instead of a token, this device's file: its present key signs the request for a new one."
    ),
    authority: str | None = typer.Option(
        None, help="HOST:PORT of python -m devices.provision serve, which answers at once."
    ),
    out: Path | None = typer.Option(None, help="Write the request to this file, for python -m devices.provision sign."),
    install: Path | None = typer.Option(None, help="Complete the device's file with this answer of sign."),
    folder: Path = typer.Option(Path(), help="Where the device's file is written, NAME.toml."),
) -> None:
    """Make this device's key, and get its certificate. The key stays on this device."""
    from edge_runtime.enrollment import Applicant, ask_authority, install_answer, write_request

    if [authority, out, install].count(None) != 2:
        raise ConfigError("pass one of --authority HOST:PORT, --out REQUEST and --install ANSWER")
    if install is not None:
        written = install_answer(install, folder)
    else:
        if (token is None) == (renew is None):
            raise ConfigError(
                "pass either what python -m devices.provision token NAME printed, or --renew with this device's file"
            )
        applicant = Applicant.with_token(token) if token is not None else Applicant.with_identity(renew or Path())
        if out is not None:
            print(write_request(applicant, out, folder))
            return
        written = ask_authority(applicant, authority or "", folder)
    print(
        f"wrote {written}; install the daemon with: python -m devices.install {written} --images DIR; if it is "
        f"installed already: python -m devices.install --renew {written}"
    )


@app.command()
@with_settings(StateSettings, Settings)
def status(
    settings: StateSettings,
    as_json: bool = typer.Option(False, "--json", help="Print the health message as one JSON object."),
) -> None:
    """Show the state of this device. Fails if its daemon does not run."""
    from edge_runtime.daemon.status import check_alive, describe, read_health
    from edge_runtime.store import DeviceStore
    from fedfmsl.common.cli import console

    store = DeviceStore(settings.state)
    health = read_health(store)
    if as_json:
        print_json(health.model_dump(mode="json"))
    else:
        for name, value in describe(health, store, time.time()):
            console.print(f"{name:9}  {value}")
    check_alive(health, store.root)


@app.command()
@with_settings(PredictSettings, Settings)
def predict(
    settings: PredictSettings,
    files: list[Path] | None = typer.Argument(None, help="Images or texts, or folders of them."),
    model: Path | None = typer.Option(
        None, help="Personalized model (.onnx). Default: the newest in the state directory."
    ),
    watch: Path | None = typer.Option(None, help="Classify the files in this folder, and new ones until interrupted."),
    new: bool = typer.Option(False, "--new", help="With --watch: only new files."),
    unknown: float | None = typer.Option(
        None, min=0, max=1, help="Confidence below which a file is unknown. Default: the model's own."
    ),
    top: int = typer.Option(3, min=1, help="Number of classes to show for each file."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object per file, with every class."),
    adapt: bool | None = typer.Option(
        None,
        "--adapt/--no-adapt",
        help="Adapt to the classes that the files show, without labels. Default: with --watch.",
    ),
    questions: bool = typer.Option(False, help="With --watch: store what the device's page asks about."),
    publish: bool = typer.Option(
        False,
        "--publish",
        help="Also publish the predictions in the run. Not with the identity of a running daemon: set its `watch`.",
    ),
) -> None:
    """Classify images or texts with a personalized model."""
    from edge_runtime.daemon.lock import is_locked, locked
    from edge_runtime.inference.adaptation import PriorAdapter
    from edge_runtime.inference.classifier import FileClassifier, StateClassifier
    from edge_runtime.inference.predict import end_on_closed_output, predict_files, printer
    from edge_runtime.inference.publish import Publisher
    from edge_runtime.inference.recorder import Recorder
    from edge_runtime.inference.stream import WatchedFolder, classify_new_files, wait_for_model
    from edge_runtime.store import DeviceStore

    if new and not watch:
        raise ConfigError("--new needs --watch; give --watch FOLDER, or omit --new")
    if files and watch:
        raise ConfigError("files and --watch exclude each other; omit one of them")
    if not files and not watch:
        raise ConfigError("nothing to classify; give files or folders, or --watch FOLDER")
    inbox = WatchedFolder(watch, only_new=new) if watch else None
    adapts = watch is not None if adapt is None else adapt
    adapter = PriorAdapter() if adapts else None
    if publish and model is not None and is_locked(settings.state):
        raise ConfigError(f"the daemon of --state {settings.state} runs; set its `watch` instead of --publish")
    with contextlib.ExitStack() as resources, end_on_closed_output():
        if model is not None:
            classifier: Classifier = FileClassifier(model, unknown, adapter)
        else:
            store = DeviceStore(settings.state)
            if publish:
                settings = settings.model_copy(update={"identity": store.renewed.newest(settings.identity)})
                resources.enter_context(locked(store.root, "end it first, or set its `watch` instead of --publish"))
            if inbox is not None:
                wait_for_model(store)
            classifier = StateClassifier(store, settings.bundle, unknown, adapter)
        outputs: list[Callable[[Prediction | None], None]] = [printer(as_json, top)]
        if publish:
            outputs.append(resources.enter_context(Publisher(classifier, settings)).publish)
        if inbox is None:
            predictions: Iterator[Prediction | None] = predict_files(classifier, files or [])
        elif questions and isinstance(classifier, StateClassifier):
            recorder = Recorder(DeviceStore(settings.state).questions, classifier)
            outputs.append(lambda prediction: recorder.improve() if prediction is None else None)
            predictions = classify_new_files(classifier, inbox, record=recorder.record)
        else:
            predictions = classify_new_files(classifier, inbox)
        for prediction in predictions:
            for output in outputs:
                output(prediction)


@app.command()
@with_settings(Settings)
def page(settings: Settings) -> None:
    """Serve the device's page: what it is doing, and "What is this?". The daemon starts it with --page."""
    from edge_runtime.page.service import serve

    serve(settings)


@app.command()
def personalize(
    state: Path = typer.Option(help="State directory of the device.", readable=False),
    bundle: Path | None = typer.Option(None, help="Bundle folder. Default: the model's, in the state directory."),
    out: Path | None = typer.Option(None, help="File to write. Default: personalized.onnx in the state directory."),
    folder: Path | None = typer.Option(
        None, help="Write a folder for Optimum, transformers and transformers.js instead of one file."
    ),
) -> None:
    """Write the personalized model of the last round as one self-contained ONNX file, or as a folder."""
    from edge_runtime.inference.export_onnx import write_model  # these two need the onnx package
    from edge_runtime.inference.model_folder import write_model_folder
    from edge_runtime.store import DeviceStore

    if out and folder:
        raise ConfigError("--out and --folder exclude each other; omit one of them")
    store = DeviceStore(state)
    path = folder or out or store.personalized
    if not folder and path.is_dir():
        raise ConfigError(f"--out {path} is a folder; pass a file, like {path / store.personalized.name}")
    try:
        (write_model_folder if folder else write_model)(store, path, bundle)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another path") from error
    print(path)


@app.command()
@with_settings(StateSettings, Settings)
def rollback(
    settings: StateSettings,
    undo: bool = typer.Option(False, "--undo", help="Use the newer model again, and adopt new ones."),
) -> None:
    """Use the personalized model from before the present one for predictions, at once and without the server.

    The daemon may run. It adopts no new model until --undo. Updates for the run are not affected. A personalized.onnx
    is written again.
    """
    from edge_runtime.store import DeviceStore
    from edge_runtime.training import rollback as models
    from edge_runtime.training.stored_model import is_exported
    from fedfmsl.common.cli import console

    store = DeviceStore(settings.state)
    header = (models.undo if undo else models.roll_back)(store)
    console.print(f"predictions use the model of run {header.run}, round {header.round} now")
    if store.personalized.is_file() and not is_exported(store):
        from edge_runtime.inference.export_onnx import write_model  # needs the onnx package

        try:
            write_model(store, store.personalized)
        except (FedFMSLError, OSError) as error:
            raise ConfigError(
                f"predictions use that model, but {store.personalized} is still another one ({error}); write it with "
                "python -m edge_runtime personalize, with --bundle if the device was started with one"
            ) from error
        console.print(f"wrote {store.personalized}")


@app.command(hidden=True)
def probe(
    bundle: Path = typer.Option(),
    classes: int = typer.Option(2, min=2),
    engine: EngineChoice = typer.Option("auto"),
    threads: int = typer.Option(1, min=1),
    provider: str = typer.Option("cpu"),
    sample: Path = typer.Option(help="Sample to pass through the backbone."),
    feature_batch: int = typer.Option(1, min=1),
    first: int = typer.Option(1, min=1),
    micro_batch: int = typer.Option(1, min=1),
    lean: bool = typer.Option(False),
    scratch: Path = typer.Option(),
) -> None:
    """Measure a round of each level from the first; print one JSON object per level."""
    from edge_runtime.engines.base import MemoryPlan
    from edge_runtime.resources.probe import probe_levels
    from fedfmsl.protocol.bundle import Bundle
    from fedfmsl.protocol.task_bundle import with_numbered_classes

    opened, memory = with_numbered_classes(Bundle.load(bundle), classes), MemoryPlan(micro_batch, lean)
    for measured in probe_levels(opened, engine, threads, provider, sample, feature_batch, first, memory, scratch):
        print_json(measured.model_dump(mode="json"))


@app.command(hidden=True)
def try_provider(
    bundle: Path = typer.Option(),
    classes: int = typer.Option(2, min=2),
    provider: str = typer.Option(),
    threads: int = typer.Option(1, min=1),
    out: Path = typer.Option(help="File to write."),
) -> None:
    """Compute with one execution provider; write outputs and seconds."""
    from edge_runtime.resources import provider_trial
    from fedfmsl.protocol.bundle import Bundle
    from fedfmsl.protocol.task_bundle import with_numbered_classes
    from fedfmsl.protocol.tensors import pack

    opened = with_numbered_classes(Bundle.load(bundle), classes)
    out.write_bytes(pack(*provider_trial.try_provider(opened, provider, threads)))
