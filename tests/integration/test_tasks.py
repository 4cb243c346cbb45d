"""Runs with different class lists over one bundle, with real processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from support.bundles import Built
from support.processes import Broker, Federation, Processes, free_port

from edge_runtime.store import DeviceStore
from edge_runtime.training.stored_model import read_personal_model
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
