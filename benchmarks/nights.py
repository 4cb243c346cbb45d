"""python -m benchmarks.nights: a standing run over a thousand nights, and what it leaves behind.

Each night devices get photos, users delete old ones, some devices are gone, and one session of the run takes place. The
coordinator, the server's files, the devices' folders, caches and state directories are the real ones. The backbone is
tiny and has random weights, there is no network, and the clock is moved. Prints memory, disk and processor time after
some of the nights: they should stay flat.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import typer
from PIL import Image

from benchmarks.stored_run import StoredRun
from edge_runtime.daemon.round_runner import RoundRunner
from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.folder import SampleFolder
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.resources.level_cap import LevelCap
from edge_runtime.resources.throttle import LevelCapTracker, StepControl
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import DeviceContext
from edge_runtime.training.gate import Gate
from edge_runtime.training.stored_model import tasks_of_models
from fedfmsl.common.cli import application
from fedfmsl.errors import RunError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import DeviceStatus, Round, Update
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import blob_hash, unpack
from trainer_server.config import RunConfig, Trigger, sal_rules
from trainer_server.coordinator.events import (
    ClockTicked,
    Command,
    CountRefusal,
    OperatorActed,
    PublishGlobals,
    StatusSeen,
    StoreRound,
    UpdateSeen,
)
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.state import State
from trainer_server.service.lifecycle import make_plan, open_run
from trainer_server.storage.kept_experts import KeptExperts

LEVEL = 1
SIZE = 32  # pixels
CLASSES, CLASS_EVERY, MAX_CLASSES = 4, 15, 8  # at first; nights until one is added; at last
DEVICES, DEVICE_EVERY = 3, 20  # at once; nights until one is replaced by a new one
ONLINE = 0.75  # share of nights
NEW_PHOTOS, MAX_PHOTOS = (1, 3), 24  # per night and device; beyond, the oldest are deleted
CACHE_BYTES = 2**20  # budget of each device
KEEP_ROUNDS = 200
SECONDS_PER_NIGHT = 86_400.0
WINDOW = 10  # nights with a session, of which a line has the medians

app = application()


@dataclass
class Figures:
    """After a night. Sizes in kB; `devices`: mean over the devices of that night."""

    rss: float
    run_folder: float
    devices: float
    seconds_per_round: float
    rounds: int


class SimulatedRunner(RoundRunner):
    """Writes no personalized.onnx, which takes a process of its own."""

    def write_personalized(self) -> None:
        pass


class NightDevice:
    """A device: its photos, its state directory, and the daemon's computation of rounds."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.photos = folder / "photos"
        self.store = DeviceStore(folder / "state")
        self.store.ensure_name(name)
        self._runner: SimulatedRunner | None = None
        self._task = ""

    def add_photos(self, names: Sequence[str], night: int, rng: np.random.Generator) -> None:
        """New photos of some classes; in the first night two of each. Beyond MAX_PHOTOS the oldest ones are deleted."""
        labels = rng.integers(len(names), size=int(rng.integers(NEW_PHOTOS[0], NEW_PHOTOS[1] + 1))).tolist()
        if not self.photos.is_dir():
            labels = [*range(len(names)), *range(len(names))]
        for index, label in enumerate(labels):
            path = self.photos / names[label] / f"{night:05}-{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = np.random.default_rng(label).integers(40, 215, 3)
            pixels = np.clip(colours + rng.normal(0, 30, (SIZE, SIZE, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            at = night * SECONDS_PER_NIGHT
            os.utime(path, (at, at))
        for path in sorted(self.photos.glob("*/*.png"), key=lambda each: each.name)[:-MAX_PHOTOS]:
            path.unlink()

    def scan(self, bundle: TaskBundle) -> DeviceStatus:
        self._started(bundle).scan()
        return self.status(bundle)

    def status(self, bundle: TaskBundle) -> DeviceStatus:
        """As of the last scan."""
        new = self._started(bundle).device.scanned.new
        return DeviceStatus(device=self.name, online=True, bundle=bundle.sha256, level_cap=LEVEL, new_samples=new)

    def compute(self, bundle: TaskBundle, round_: Round, blobs: dict[str, bytes]) -> bytes:
        """The update of a round, whose published globals are `blobs`."""
        runner = self._started(bundle)
        for sha256, blob in blobs.items():
            if self.store.globals.read(sha256) is None:
                self.store.globals.write(blob)
        runner.scan()
        self.store.globals.keep_only(set(blobs))
        runner.run(round_, sum(map(len, blobs.values())))
        update = self.store.outbox.read(round_.round)
        assert update is not None
        return update

    def acknowledged(self, round_: Round) -> None:
        self.store.outbox.acknowledge(round_.round)

    def stop(self) -> None:
        """The device is switched off."""
        self._runner = None

    def _started(self, bundle: TaskBundle) -> SimulatedRunner:
        if self._runner is None or self._task != bundle.task.sha256:
            self._runner, self._task = self._start(bundle), bundle.task.sha256
        return self._runner

    def _start(self, bundle: TaskBundle) -> SimulatedRunner:
        """As the daemon does when it starts, or hears of another task."""
        self.store.remove_temporary_files()
        self.store.tasks.keep(bundle.task, *tasks_of_models(self.store))
        folder = SampleFolder(self.photos, bundle, self.store)
        engine, control = StepGraphEngine(bundle, 1), StepControl()
        cache = DiskCache(self.store.cache, CACHE_BYTES)
        device = DeviceContext(
            device_name=self.name,
            bundle=bundle,
            scanned=folder.scan(),
            cache=FeatureCache(cache, bundle, 1),
            engine=engine,
            gate=Gate(bundle, 1),
            store=self.store,
            level_cap=LEVEL,
            report=lambda *_: None,
        )
        cap = LevelCap(LEVEL, {LEVEL: 1.0}, 1e9)
        return SimulatedRunner(device, folder, control, LevelCapTracker(cap), lambda *_: None)


class NightServer(StoredRun):
    """A standing run. `published`: the globals of the present round, by SHA-256. `wall`: the wall clock."""

    def __init__(self, folder: Path, config: RunConfig, bundle: TaskBundle) -> None:
        store = open_run(folder, config, bundle)
        self.published: dict[str, bytes] = {}
        self.wall = 0.0
        self._kept, self._made = KeptExperts(folder), 0
        super().__init__(store, make_plan(store, bundle))

    @property
    def bundle(self) -> TaskBundle:
        return self.plan.bundle

    def approve(self, name: str) -> None:
        """Adds a class. The next session begins with it."""
        self.feed(OperatorActed(Operation(action=Action.CLASSES, classes=(name,))))
        self.tick()

    def tick(self) -> None:
        self.feed(ClockTicked(wall=self.wall))

    def receive(self, blob: bytes) -> None:
        """An update of a device. Raises RunError if it is refused."""
        update, tensors = unpack(blob, Update)
        self.feed(UpdateSeen(update, tensors, blob_hash(blob), len(blob)), blob)

    def executed(self, state: State, commands: Sequence[Command]) -> None:
        if refused := [each.text for each in commands if isinstance(each, CountRefusal)]:
            raise RunError(refused[0])
        if state.made > self._made and any(isinstance(each, StoreRound) for each in commands):
            self._made = state.made
            self._kept.write(state.made, state.expert)
        globals_ = {each.sha256: each.blob for each in commands if isinstance(each, PublishGlobals)}
        self.published = globals_ or self.published


@dataclass
class Nights:
    """The run and its devices, night by night."""

    folder: Path
    server: NightServer
    rng: np.random.Generator
    devices: list[NightDevice] = field(default_factory=list)
    _made: int = 0

    def night(self, night: int) -> Figures:
        server = self.server
        server.wall = (night + 1) * SECONDS_PER_NIGHT
        while len(self.devices) < DEVICES:
            self._made += 1
            name = f"device-{self._made:04}"
            self.devices.append(NightDevice(name, self.folder / name))
        names = server.bundle.classes
        if night and night % CLASS_EVERY == 0 and len(names) < MAX_CLASSES:
            server.approve(f"class-{len(names)}")
            names = server.bundle.classes
        for device in self.devices:
            device.add_photos(names, night, self.rng)
        is_online = self.rng.random(DEVICES) < ONLINE
        is_online[:2] = True
        started, rounds = time.process_time(), self._session(is_online.tolist())
        figures = self._figures((time.process_time() - started) / max(rounds, 1), rounds)
        if (night + 1) % DEVICE_EVERY == 0:
            gone = self.devices.pop(int(self.rng.integers(DEVICES)))
            self._leaves(gone)
            shutil.rmtree(gone.folder)
        return figures

    def _session(self, is_online: Sequence[bool]) -> int:
        """Returns the number of its rounds; 0 without news, such as photos that are only tested on."""
        server, rounds, session = self.server, 0, self.server.plan.session
        online = [device for device, here in zip(self.devices, is_online, strict=True) if here]
        for device in self.devices:
            if device in online:
                server.feed(StatusSeen(device.scan(server.bundle)))
            else:
                self._leaves(device)
        server.tick()
        while server.plan.session == session:
            round_ = server.state.announced
            if round_ is None:  # no news
                break
            for device in online:
                server.receive(device.compute(server.bundle, round_, server.published))
                device.acknowledged(round_)
                server.feed(StatusSeen(device.status(server.bundle)))
            server.tick()
            rounds += 1
        return rounds

    def _leaves(self, device: NightDevice) -> None:
        known = self.server.state.devices.get(device.name)
        if known is not None:
            self.server.feed(StatusSeen(known.model_copy(update={"online": False})))
        device.stop()

    def _figures(self, seconds: float, rounds: int) -> Figures:
        states = [_kilobytes(device.store.root) for device in self.devices]
        rss = psutil.Process().memory_info().rss / 1000
        return Figures(rss, _kilobytes(self.server.store.folder), statistics.mean(states), seconds, rounds)


@app.command()
def nights(
    count: int = typer.Option(1000, min=10, help="Nights."),
    seed: int = typer.Option(0, help="Seed of photos, devices and run."),
) -> None:
    """Simulate the nights of a standing run, and print what grows."""
    logging.disable(logging.WARNING)  # of devices that keep their models
    bundle = _tiny_bundle(Path("runs/nights-bundle"))
    marks = [night for night in (10, 30, 100, 300, 1000, 3000, 10_000) if night <= count]
    with TemporaryDirectory(prefix="fedfmsl-nights-") as scratch:
        folder = Path(scratch)
        server = NightServer(folder / "run", _config(seed), bundle)
        every = Nights(folder, server, np.random.default_rng(seed))
        print("| night | rounds | MB of memory | kB of run folder | kB of a device | ms of processor per round |")
        print("|---|---|---|---|---|---|")
        found: list[Figures] = []
        for night in range(count):
            found.append(every.night(night))
            if night + 1 in marks:
                _print(night + 1, found)
        server.store.close()


def _print(night: int, found: Sequence[Figures]) -> None:
    def median(value: Callable[[Figures], float]) -> float:
        return statistics.median(value(each) for each in [each for each in found if each.rounds][-WINDOW:])

    values = [
        f"{sum(each.rounds for each in found)}",
        f"{median(lambda each: each.rss) / 1000:.1f}",
        f"{median(lambda each: each.run_folder):.0f}",
        f"{median(lambda each: each.devices):.0f}",
        f"{1000 * median(lambda each: each.seconds_per_round):.1f}",
    ]
    print(f"| {night} | {' | '.join(values)} |", flush=True)


def _config(seed: int) -> RunConfig:
    stage1_sal, stage2_sal = sal_rules(Trigger.CAPABILITY_QUEUE, 0.02, LEVEL)
    return RunConfig.model_validate(
        {
            "run": "nights",
            "devices": DEVICES,
            "min_updates": 1,
            "stage1_rounds": 1,
            "stage2_rounds": 1,
            "stage1_sal": stage1_sal,
            "stage2_sal": stage2_sal,
            "secure_sums": False,
            "min_class_count": 2,
            "keep_rounds": KEEP_ROUNDS,
            "join_timeout": 1.0,
            "every": "24h",
            "seed": seed,
        }
    )


def _kilobytes(folder: Path) -> float:
    """On the disk, of files in whole blocks."""
    return sum(path.stat().st_blocks for path in _files(folder)) * 512 / 1000


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _tiny_bundle(folder: Path) -> TaskBundle:
    """A ViT with random weights, built once, in a process of its own: torch would count as memory of the nights."""
    if not folder.is_dir():
        process = get_context("spawn").Process(target=_build, args=(folder,))
        process.start()
        process.join()
    bundle = Bundle.load(folder)
    return TaskBundle(bundle, Task(bundle.sha256, tuple(f"class-{index}" for index in range(CLASSES))))


def _build(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    from export.bundle import build_bundle
    from export.weights import load_backbone

    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(**shape, image_size=SIZE, patch_size=8, num_labels=2))
    weights = folder.with_name(f"{folder.name}-weights")
    model.save_pretrained(weights)
    source = load_backbone(str(weights), None, CLASSES, SIZE, None, 0)
    for _ in build_bundle(source, LEVEL, source.family.lora(4), folder, 0):
        pass


if __name__ == "__main__":
    app()
