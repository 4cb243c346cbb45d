"""Trackers: every closed round once, also after a restart; a failing tracker is said once and stops nothing."""

from __future__ import annotations

import importlib.util
import logging
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from support.bundles import Built
from support.coordinators import ABC, started
from support.processes import wait_until
from support.tools import not_tested

from fedfmsl.errors import ConfigError
from trainer_server.coordinator.events import StoreRound
from trainer_server.coordinator.records import ClosedRound
from trainer_server.storage.origin import Origin as RunOrigin
from trainer_server.storage.run_store import RunStore
from trainer_server.tracking import sinks
from trainer_server.tracking.sinks import Origin, Sink
from trainer_server.tracking.tracker import Tracker

SPEC = "tensorboard:unused"


class Records:
    """A sink that keeps what it gets. `failures`: how many of the next writes fail."""

    def __init__(self, failures: int = 0) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}
        self.failures = failures

    def open(self, spec: str, origin: Origin, after: int) -> Sink:
        return self

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no answer")
        assert step not in self.steps
        self.steps[step] = values

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def closed(vit: Built) -> list[ClosedRound]:
    run = started(vit, ABC, stage1_rounds=2, stage2_rounds=1)
    run.until_stop(ABC)
    return [command.closed for command in run.of(StoreRound)]


@pytest.fixture
def store(vit: Built, tmp_path: Path) -> RunStore:
    """A run without rounds."""
    config = started(vit, ABC).plan.config
    origin = RunOrigin(
        config=config, session="5" * 16, bundle=vit.bundle.root, sha256=vit.bundle.sha256, task=vit.bundle.task.sha256
    )
    return RunStore.create(tmp_path / "run", origin, vit.bundle.task)


@pytest.fixture(autouse=True)
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_server.tracking.tracker.require_package", lambda spec: None)


def track(store: RunStore, rounds: Iterable[ClosedRound], sink: Records | None, spec: str = SPEC) -> None:
    """One process of the server in which these rounds are closed."""
    tracker = Tracker(store.folder, [spec], "vit", sink.open if sink else sinks.open_sink)
    store.commit([], rounds)
    tracker.close()


def test_a_restarted_server_sends_only_what_is_missing(store: RunStore, closed: list[ClosedRound]) -> None:
    sink = Records()
    track(store, closed[:2], sink)
    store.commit([], closed[2:3])  # closed while nothing tracked
    track(store, closed[3:], sink)  # fails if it writes a round again
    assert list(sink.steps) == [one.round.round for one in closed]
    first = sink.steps[1]
    assert (first["round/updates"], first["round/stragglers"]) == (3, 0)
    assert first["held_out/global"] == 0.5


def test_a_failing_tracker_is_said_once_and_gets_the_rounds_later(
    store: RunStore, closed: list[ClosedRound], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_server.tracking.tracker.POLL_SECONDS", 0.01)
    sink = Records(failures=5)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(store.folder, [SPEC], "vit", sink.open)
        store.commit([], closed)
        wait_until(lambda: not sink.failures, "the tracker answers again")
        tracker.close()
    assert list(sink.steps) == [one.round.round for one in closed]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"--track {SPEC} fails (RuntimeError: no answer); the run goes on, and it gets the rounds later"


def test_tensorboard_reads_the_rounds_of_two_processes(
    store: RunStore, closed: list[ClosedRound], tmp_path: Path
) -> None:
    if importlib.util.find_spec("tensorboardX") is None:
        not_tested("tensorboardX is not installed (make dev)", fails_in_ci=True)
    from tensorboardX.proto.event_pb2 import Event

    target = f"tensorboard:{tmp_path / 'events'}"
    track(store, closed[:2], None, target)
    track(store, closed[2:], None, target)
    (folder,) = (tmp_path / "events").iterdir()
    assert folder.name == "r-55555555"
    events = []
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    points = [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == "held_out/global"]
    expected = [(one.round.round, 0.5) for one in closed if one.held_out]
    assert sorted(points) == expected and len(expected) > 2


def test_mlflow_has_each_point_once_even_if_the_server_forgets_what_it_sent(
    store: RunStore, closed: list[ClosedRound], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("mlflow") is None:
        not_tested("mlflow is not installed (pip install mlflow-skinny)")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    track(store, closed[:2], None, f"mlflow:{uri}")
    (store.folder / "tracked.json").unlink()
    track(store, closed[2:], None, f"mlflow:{uri}")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("fedfmsl")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.data.params["devices"], run.info.status) == ("r-55555555", "3", "FINISHED")
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "round/updates")]
    assert steps == [one.round.round for one in closed]


@pytest.mark.parametrize("spec", ["tensorboard", "tensorboard:", "aim:there", ""])
def test_what_names_no_tracker_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"is not tensorboard:DIR, mlflow:URI or wandb:PROJECT"):
        sinks.parse(spec)


def test_a_file_is_no_folder_of_event_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert sinks.parse(f"tensorboard:{tmp_path / 'new' / 'folder'}")[0] == "tensorboard"
    for target in ("file", "file/below"):
        with pytest.raises(ConfigError, match="file is a file; give a folder"):
            sinks.parse(f"tensorboard:{tmp_path / target}")


def test_a_missing_package_is_named_before_the_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package wandb: pip install 'fedfmsl-edge\[wandb\]'"):
        sinks.require_package("wandb:orchard")
