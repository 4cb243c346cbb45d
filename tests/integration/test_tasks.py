"""Runs with different class lists over one bundle, with real processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from support.bundles import Built
from support.processes import Broker, Federation, Observer, Processes, free_port, wait_until
from typer.testing import CliRunner

from edge_runtime.store import DeviceStore
from edge_runtime.training.stored_model import read_personal_model
from fedfmsl.protocol.messages import Round, Stage
from trainer_server.__main__ import app
from trainer_server.storage.run_store import RunStore

ROUNDS = ("--stage1-rounds", "1", "--stage2-rounds", "1", "--min-updates", "1")


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def test_a_device_takes_part_in_runs_with_other_classes_without_a_restart(
    vit: Built, photos: dict[str, Path], broker: Broker, tmp_path: Path
) -> None:
    """It fetches the bundle once, and features that it has cached stay valid. Another device, which comes after the
    end with the bundle of other classes, personalizes itself from what the run has left on the broker."""
    name, serve = "device-0", ("--serve", f"127.0.0.1:{free_port()}")
    with Processes(tmp_path / "logs") as processes:
        first = Federation("tasks", broker, vit.bundle.root, {name: photos[name]}, tmp_path, processes)
        second, store = replace(first, folder=tmp_path / "second"), DeviceStore(first.state(name))
        device = first.start_device(name, "--stay")
        assert first.start_server(*ROUNDS, *serve, "--classes", "lemon,apple").wait().code == 0
        before = files(store.cache)
        assert second.start_server(*ROUNDS, *serve, "--classes", "plum,lemon,apple").wait().code == 0
        task = RunStore(second.server_folder).task()
        assert (task.classes, RunStore(first.server_folder).task().classes) == (
            ("plum", "lemon", "apple"),
            ("lemon", "apple"),
        )
        header = read_personal_model(store).header
        assert (header.bundle, header.task, len(header.held)) == (vit.bundle.sha256, task.sha256, 3)
        pooled = {path for path in before if path.parent.name.endswith("float16-pooled")}
        assert pooled and all(files(store.cache)[path] == before[path] for path in pooled)
        log = device.stdout
        assert (log.count("begins again"), log.count("fetching backbone.weights")) == (1, 1)

        late = replace(second, photos=photos, folder=tmp_path / "late", devices={})
        ended = late.start_device("device-1", "--bundle", str(vit.bundle.root)).wait()
        assert ended.code == 0 and "stage 2 alone done" in ended.stdout, ended
        header = read_personal_model(DeviceStore(late.state("device-1"))).header
        assert (header.task, header.session) == (task.sha256, RunStore(second.server_folder).origin.session)
        assert DeviceStore(late.state("device-1")).personalized.is_file()


def test_a_class_is_added_during_stage_1_while_server_and_devices_go_on(
    vit: Built, photos: dict[str, Path], broker: Broker, tmp_path: Path
) -> None:
    """One device is stopped meanwhile, so that the round lasts. The other one proposes the class."""
    names, rounds = ("device-0", "device-1"), ("--stage1-rounds", "3", "--stage2-rounds", "1")
    folders = {name: photos[name] for name in names}
    with Processes(tmp_path / "logs") as processes, Observer(broker, "added") as observer:
        fleet = Federation("added", broker, vit.bundle.root, folders, tmp_path, processes)
        server = fleet.start_server(*rounds, "--classes", "apple,kiwi", "--head", "class-means")
        devices = [fleet.start_device(name, "--bundle", str(vit.bundle.root)) for name in names]
        observer.wait(Round, lambda round_: round_.stage is Stage.GLOBAL, "stage 1")
        devices[0].pause()
        options = ["classes", "--out", str(fleet.server_folder)]

        def proposed() -> list[tuple[str, list[str]]]:
            found = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)["proposed"]
            return [(each["name"], each["devices"]) for each in found]

        wait_until(lambda: bool(proposed()), "a proposal")  # the server stores it once it has announced the round
        assert proposed() == [("lemon", [names[1]])]
        assert "adds lemon after its present round\n" in CliRunner().invoke(app, [*options, "--add", "lemon"]).stdout
        wait_until(lambda: "1 class is added after round" in server.stdout, "the server obeys")
        devices[0].resume()
        assert [process.wait().code for process in (server, *devices)] == [0, 0, 0]
        store = RunStore(fleet.server_folder)
        closed = [record.round for record in store.rounds.all()]
        assert [round_.round for round_ in closed] == list(range(1, len(closed) + 1))
        former = [round_.stage for round_ in closed if round_.session != store.origin.session]
        assert former and set(former) == {Stage.STATISTICS, Stage.GLOBAL}
        later = [round_.stage for round_ in closed if round_.session == store.origin.session]
        assert (later[0], later.count(Stage.GLOBAL)) == (Stage.STATISTICS, 3)
        assert (store.task().classes, store.task().version) == (("apple", "kiwi", "lemon"), 2)
        header = read_personal_model(DeviceStore(fleet.state(names[1]))).header
        assert (header.task, header.held) == (store.origin.task, (False, True, True))
        assert ["of run 'added': 3 classes" in device.stdout for device in devices] == [True, True]
