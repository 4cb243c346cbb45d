"""A user error is one line that names the value and the remedy, and an exit code per kind of error."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.processes import Broker, free_port, run_module
from support.samples import CLASSES

from edge_runtime.inference.export_onnx import write_model
from edge_runtime.store import DeviceStore
from edge_runtime.training.personal_model import ModelHeader
from fedfmsl.algorithms.mixture import Biases
from fedfmsl.common.onnx_runtime import has_ort_training
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack

CONFIG, INPUT, BUNDLE, WEIGHTS, BROKER, RUN = 2, 3, 4, 5, 6, 8


@dataclass(frozen=True)
class World:
    """Valid options, of which each test replaces one with an invalid one. Commands run in `scratch`."""

    broker: Broker
    bundle: Path
    backbone: Path
    photos: Path
    taken: int  # a port that another process listens on
    free: int  # a port that no process listens on
    scratch: Path

    def device(self, **replaced: str | Path) -> list[str]:
        options: dict[str, str | Path] = {
            "run": "wrong",
            "images": self.photos,
            "broker": self.broker.url,
            "bundle": self.bundle,
        }
        options |= {"state": self.scratch / "state", "threads": "1"}
        return ["edge_runtime", "run", *as_options(options | replaced)]

    def server(self, **replaced: str | Path) -> list[str]:
        options: dict[str, str | Path] = {
            "run": "wrong",
            "bundle": self.bundle,
            "devices": "1",
            "broker": self.broker.url,
        }
        return ["trainer_server", "start", *as_options(options | {"out": self.scratch / "server"} | replaced)]

    def trial(self, *flags: str, **replaced: str | Path) -> list[str]:
        options: dict[str, str | Path] = {"images": self.photos, "model": self.backbone, "devices": "2"}
        return ["devices.trial", *flags, *as_options(options | replaced)]

    def predict(self, model: Path, image: Path) -> list[str]:
        return ["edge_runtime", "predict", "--model", str(model), str(image)]

    def any_photo(self) -> Path:
        return next(self.photos.rglob("*.jpg"))

    def folder(self, name: str) -> Path:
        made = self.scratch / name
        made.mkdir()
        return made

    def altered_bundle(self) -> Path:
        """With one byte of the frozen weights changed."""
        copy = shutil.copytree(self.bundle, self.scratch / "altered")
        data = bytearray((copy / "backbone.weights").read_bytes())
        data[len(data) // 2] ^= 1
        (copy / "backbone.weights").write_bytes(data)
        return copy

    def one_photo(self, name: str) -> Path:
        """Of a class, and nothing else."""
        copy = self.folder("photos")
        (copy / name).mkdir()
        shutil.copy(self.any_photo(), copy / name)
        return copy

    def text_file(self) -> Path:
        path = self.scratch / "notes.jpg"
        path.write_text("not a photo")
        return path

    def another_devices_state(self) -> Path:
        state = self.folder("state")
        (state / "identity").write_text("balcony")
        return state


def as_options(options: dict[str, str | Path]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def world(broker: Broker, bundle: Path, vit_folder: Path, photos: dict[str, Path], tmp_path: Path) -> Iterator[World]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        yield World(broker, bundle, vit_folder, photos["device-0"], taken, free_port(), tmp_path)


@pytest.fixture(scope="module")
def personalized(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A personalized model of untrained experts."""
    opened, store = TaskBundle.load(bundle), DeviceStore(tmp_path_factory.mktemp("state"))
    expert, gate = opened.initial()
    theta, biases = expert[: opened.expert.size(1)], Biases.of_counts(np.ones(len(CLASSES), np.int64))
    tensors = {"global_theta": theta, "local_theta": theta, "gate_theta": gate}
    tensors |= {"kept_bias": biases.kept, "given_bias": biases.given, "held_bias": biases.held}
    header = ModelHeader(
        run="none",
        session="none",
        round=1,
        device="none",
        level=1,
        bundle=opened.sha256,
        task=opened.task.sha256,
        expert="",
        gate="",
        temperature=1.0,
        threshold=0.0,
        prior=tuple(np.exp(biases.prior).tolist()),
        held=(True,) * len(CLASSES),
    )
    store.mixture.write_bytes(pack(header, tensors))
    store.tasks.write(opened.task.blob)
    write_model(store, store.personalized, bundle)
    return store.personalized


@dataclass(frozen=True)
class Wrong:
    what: str
    command: Callable[[World], list[str]]
    code: int
    parts: tuple[str, ...]  # of the error line


CASES = [
    Wrong(
        "a device finds no broker",
        lambda w: w.device(broker=f"mqtt://127.0.0.1:{w.free}"),
        BROKER,
        ("no MQTT broker at 127.0.0.1:", "start one or give another --broker"),
    ),
    Wrong(
        "a server finds no broker",
        lambda w: w.server(broker=f"mqtt://127.0.0.1:{w.free}"),
        BROKER,
        ("no MQTT broker at 127.0.0.1:", "start one or give another --broker"),
    ),
    Wrong(
        "a broker's name that does not resolve",
        lambda w: w.device(broker="mqtts://broker.invalid"),
        BROKER,
        ("no MQTT broker at broker.invalid:8883", "--broker"),
    ),
    *(
        Wrong(
            f"an unencrypted way to another machine, at {package}",
            command,
            CONFIG,
            ("192.0.2.1", "would travel unencrypted", "--identity", "--insecure"),
        )
        for package, command in (
            ("a device", lambda w: w.device(broker="ws://192.0.2.1")),
            ("the server", lambda w: w.server(broker="mqtt://192.0.2.1")),
            ("its bundle", lambda w: w.server(serve="192.0.2.1:8000")),
        )
    ),
    *(
        Wrong(
            f"the broker address {url}",
            lambda w, url=url: w.device(broker=url),
            CONFIG,
            ("--broker", url.removesuffix("x"), "mqtt://host:port"),  # what may be a password is not shown
        )
        for url in (
            "localhost:1883",
            "http://localhost",
            "mqtt://",
            "mqtt://localhost:99999",
            "mqtt://localhost:x",
            "mqtt://:1883",
        )
    ),
    Wrong(
        "an image folder that does not exist",
        lambda w: w.device(images=w.scratch / "nowhere"),
        INPUT,
        ("nowhere does not exist",),
    ),
    Wrong(
        "an image instead of its folder",
        lambda w: w.device(images=w.any_photo()),
        INPUT,
        ("--images folder", "is a file; pass its folder"),
    ),
    Wrong(
        "an empty image folder",
        lambda w: w.device(images=w.folder("empty")),
        INPUT,
        ("empty holds no images", "one subfolder per class"),
    ),
    Wrong(
        "one image in all",
        lambda w: w.device(images=w.one_photo(CLASSES[1])),
        INPUT,
        (CLASSES[1], "at least two", "add more"),
    ),
    Wrong(
        "no class folder that the bundle knows",
        lambda w: w.device(images=w.one_photo("durian")),
        INPUT,
        ("durian", *CLASSES, "rename or remove the folder"),
    ),
    Wrong(
        "a device's bundle with a changed byte",
        lambda w: w.device(bundle=w.altered_bundle()),
        BUNDLE,
        ("backbone.weights has been altered", "copy or build it again"),
    ),
    Wrong(
        "a server's bundle with a changed byte",
        lambda w: w.server(bundle=w.altered_bundle()),
        BUNDLE,
        ("backbone.weights has been altered", "copy or build it again"),
    ),
    Wrong(
        "a folder that is no bundle",
        lambda w: w.server(bundle=w.folder("nothing")),
        BUNDLE,
        ("nothing", "python -m export.build"),
    ),
    *(
        Wrong(f"a run's name {name!r} at {package}", command, CONFIG, (repr(name), "letters, digits"))
        for name in ("a/b", "+", "")
        for package, command in (
            ("a device", lambda w, name=name: w.device(run=name)),
            ("the server", lambda w, name=name: w.server(run=name)),
            ("a trial", lambda w, name=name: w.trial(name=name)),
        )
    ),
    Wrong(
        "a device's name",
        lambda w: w.device(device="on the balcony"),
        CONFIG,
        ("'on the balcony'", "letters, digits"),
    ),
    Wrong(
        "a state folder of another device",
        lambda w: w.device(device="kitchen", state=w.another_devices_state()),
        CONFIG,
        ("'balcony'", "'kitchen'", "use another folder"),
    ),
    Wrong(
        "a memory budget that nothing fits into",
        lambda w: w.device(memory="1MB"),
        CONFIG,
        ("level 1 needs", "more than the budget of 1MB", "set --memory"),
    ),
    *(
        Wrong(f"{option} {text}", command, CONFIG, (option, repr(text), "512MB"))
        for option, text, command in (
            ("--memory", "much", lambda w: w.device(memory="much")),
            ("--cache", "-2GB", lambda w: w.device(cache="-2GB")),
            ("--memory", "512 apples", lambda w: w.trial(memory="512 apples")),
        )
    ),
    *(
        Wrong(f"an engine that is not installed, at {package}", command, CONFIG, (option, "pip install"))
        for package, option, command in (
            ("a device", "--engine ort-training", lambda w: w.device(engine="ort-training")),
            ("a trial", "--engine ort-training", lambda w: w.trial(engine="ort-training")),
            ("the export", "--ort-training", lambda w: ["export.build", "--model", "vit-b16", "--ort-training"]),
        )
        if not has_ort_training()
    ),
    *(
        Wrong(
            f"a port for {option} that is taken",
            command,
            RUN,
            (f"{option}: cannot listen on 127.0.0.1:", "the port is in use", "choose another address"),
        )
        for option, command in (
            ("--console", lambda w: w.server(console=f"127.0.0.1:{w.taken}")),
            ("--page", lambda w: w.device(page=f"127.0.0.1:{w.taken}")),
        )
    ),
    Wrong(
        "a watched folder that does not exist",
        lambda w: w.device(watch=w.scratch / "nowhere"),
        INPUT,
        ("--watch folder", "nowhere does not exist", "create or mount it"),
    ),
    Wrong(
        "a port for the embedded broker that is taken",
        lambda w: ["devices.trial.broker", "--port", str(w.taken)],
        RUN,
        ("cannot start a broker on 127.0.0.1:", "the port is in use", "choose another --port"),
    ),
    *(
        Wrong(
            f"an address to serve on: {address}", lambda w, a=address: w.server(serve=a), CONFIG, (address, "--serve")
        )
        for address in ("8000", "127.0.0.1:http", "127.0.0.1:99999")
    ),
    Wrong(
        "more devices than a run can have",
        lambda w: w.server(devices="100001"),
        CONFIG,
        ("--devices '100001'", "is too large; it must be at most 100000"),
    ),
    Wrong(
        "a level above the bundle's",
        lambda w: w.server(max_level="9"),
        CONFIG,
        ("--max-level 9", "more than 3, the highest level", "lower it"),
    ),
    Wrong(
        "a head of class names with a bundle that has none",
        lambda w: w.server(head="zero-shot"),
        CONFIG,
        ("--head zero-shot", "has no such head", "clip-vit-b16", "class-means"),
    ),
    Wrong(
        "a personalized model before any run",
        lambda w: ["edge_runtime", "personalize", "--bundle", str(w.bundle), "--state", str(w.scratch)],
        INPUT,
        ("no personalized model yet", "first round creates it"),
    ),
    Wrong(
        "a folder as the file of a personalized model",
        lambda w: ["edge_runtime", "personalize", "--state", str(w.scratch), "--out", str(w.scratch)],
        CONFIG,
        ("is a folder", "pass a file", "personalized.onnx"),
    ),
    Wrong(
        "a prediction without the model",
        lambda w: w.predict(w.scratch / "personalized.onnx", w.any_photo()),
        BUNDLE,
        ("personalized.onnx does not exist", "state directory"),
    ),
    Wrong(
        "a prediction with an ONNX file of another kind",
        lambda w: w.predict(w.bundle / "backbone.onnx", w.any_photo()),
        BUNDLE,
        ("backbone.onnx", "not a personalized model"),
    ),
    Wrong(
        "a prediction with something that is no ONNX file",
        lambda w: w.predict(w.any_photo(), w.any_photo()),
        BUNDLE,
        (".jpg is not a personalized model", "personalized.onnx"),
    ),
    Wrong(
        "a trial with both ways to choose classes",
        lambda w: w.trial("--classes-from-folders", classes="apple,kiwi"),
        CONFIG,
        ("--classes and --classes-from-folders exclude each other",),
    ),
    Wrong(
        "a trial with classes but no photos",
        lambda w: ["devices.trial", "--classes-from-folders"],
        CONFIG,
        ("require --images",),
    ),
    Wrong(
        "a trial on an empty folder",
        lambda w: w.trial(images=w.folder("empty")),
        INPUT,
        ("empty holds no images", "one subfolder per class"),
    ),
    Wrong(
        "a trial with a class that has no photos",
        lambda w: w.trial(classes="apple,durian"),
        INPUT,
        ("durian",),
    ),
]


@pytest.mark.parametrize("wrong", CASES, ids=lambda wrong: wrong.what)
def test_an_invalid_option_is_one_line_of_error(world: World, wrong: Wrong) -> None:
    run_module(*wrong.command(world), cwd=world.scratch).assert_error(wrong.code, *wrong.parts)


def test_predict_names_a_file_that_is_not_an_image(world: World, personalized: Path) -> None:
    ended = run_module(*world.predict(personalized, world.text_file()))
    ended.assert_error(INPUT, "notes.jpg is not a readable image")


def test_predict_names_a_folder_without_images(world: World, personalized: Path) -> None:
    run_module(*world.predict(personalized, world.folder("empty"))).assert_error(INPUT, "no images in", "empty")


def test_an_unknown_model_is_an_error_with_the_known_ones(world: World) -> None:
    from export.models import MODELS

    ended = run_module("export.build", "--model", "nope", cwd=world.scratch)
    ended.assert_error(CONFIG, "'nope'", *MODELS, "transformers folder")
