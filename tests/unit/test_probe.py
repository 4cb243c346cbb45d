"""What fits into a device's memory and time: the choice, and the measurement behind it."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.bundles import LAYERS, Built

from edge_runtime.engines.base import MemoryPlan
from edge_runtime.engines.step_graph import default_micro_batch
from edge_runtime.resources.plan import make_plan, plan_within
from edge_runtime.resources.probe import BATCH, FEATURES, Measurement, check_end
from edge_runtime.store import DeviceStore
from fedfmsl.common.onnx_runtime import has_ort_training
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.messages import EngineName

GB = 10**9
FEATURE_BATCHES = (4, 2, 1)
ENGINE: EngineName = "ort-training" if has_ort_training() else "step-graph"


@dataclass
class Machine:
    """One whose memory and time are known. It kills a process that takes more than `memory`, without a word."""

    levels: int
    micro_batch: int  # what is tried first at any level
    memory: int = 10 * GB
    pass_bytes: int = 0
    level_bytes: int = 0
    sample_bytes: int = 0
    seconds: float = 1.0
    started: list[tuple[int, int, MemoryPlan]] = field(default_factory=list)

    def passes(self, feature_batch: int) -> int:
        return self.pass_bytes + feature_batch * self.sample_bytes

    def step(self, level: int, fit: MemoryPlan) -> int:
        return level * (self.level_bytes // (2 if fit.lean else 1) + fit.micro_batch * self.sample_bytes)

    def measure(self, feature_batch: int, first: int, fit: MemoryPlan) -> Iterator[Measurement]:
        self.started.append((feature_batch, first, fit))
        peak = self.passes(feature_batch)
        if peak > self.memory:
            return
        yield Measurement(level=FEATURES, micro_batch=feature_batch, seconds=0, peak_rss=peak)
        for level in range(first, self.levels + 1):
            tried = MemoryPlan(min(fit.micro_batch, self.micro_batch), fit.lean)
            peak = max(peak, self.step(level, tried))
            if peak > self.memory:
                return
            seconds = self.seconds * level
            yield Measurement(level=level, micro_batch=tried.micro_batch, seconds=seconds, peak_rss=peak)


def machine(built: Built, **costs: int) -> Machine:
    manifest = built.bundle.manifest
    return Machine(manifest.levels, min(BATCH, default_micro_batch(manifest.dims, 1)), **costs)


def test_with_plenty_of_memory_everything_is_as_fast_as_it_can_be(vit: Built) -> None:
    plan = plan_within(machine(vit, level_bytes=1000).measure, vit.bundle, GB, step_seconds=60)
    assert plan.feature_batch == 4
    assert plan.memory_plans == {level: MemoryPlan(BATCH) for level in range(1, LAYERS + 1)}


def test_a_process_that_dies_of_a_level_ends_it_as_one_that_takes_too_much(vit: Built) -> None:
    patient = machine(vit, level_bytes=1000, sample_bytes=100)
    mortal = machine(vit, level_bytes=1000, sample_bytes=100, memory=3500)
    wanted = plan_within(patient.measure, vit.bundle, 3500, step_seconds=60)
    assert plan_within(mortal.measure, vit.bundle, 10 * GB, step_seconds=60) == wanted
    assert wanted.memory_plans == {1: MemoryPlan(16), 2: MemoryPlan(4), 3: MemoryPlan(1)}


def test_the_first_level_that_is_too_slow_ends_it(vit: Built) -> None:
    plan = plan_within(machine(vit).measure, vit.bundle, GB, step_seconds=2.5)
    assert plan.level_cap == 2


@given(
    budget=st.integers(0, 20_000),
    pass_bytes=st.integers(0, 8_000),
    level_bytes=st.integers(0, 8_000),
    sample_bytes=st.integers(0, 400),
    memory=st.integers(0, 20_000),
)
def test_what_is_planned_fits_and_nothing_larger_would(
    vit: Built, budget: int, pass_bytes: int, level_bytes: int, sample_bytes: int, memory: int
) -> None:
    m = machine(vit, pass_bytes=pass_bytes, level_bytes=level_bytes, sample_bytes=sample_bytes, memory=memory)
    plan, most = plan_within(m.measure, vit.bundle, budget, step_seconds=1e9), min(budget, memory)
    if m.passes(1) > most:
        assert not plan.memory_plans
        return
    assert plan.feature_batch == max(size for size in FEATURE_BATCHES if m.passes(size) <= most)
    assert list(plan.memory_plans) == list(range(1, plan.level_cap + 1))
    ladder = [MemoryPlan(16), MemoryPlan(8), MemoryPlan(4), MemoryPlan(2), MemoryPlan(1), MemoryPlan(1, lean=True)]
    for level, fit in plan.memory_plans.items():
        assert fit == next(each for each in ladder if m.step(level, each) <= most)
    if plan.level_cap < m.levels:
        assert m.step(plan.level_cap + 1, ladder[-1]) > most
    assert len(m.started) <= len(FEATURE_BATCHES) + len(ladder)  # each takes seconds


def plan_of(
    built: Built,
    store: DeviceStore,
    photo: Path,
    memory: int,
    step_seconds: float = 1e6,
    heartbeat: Callable[[], None] = lambda: None,
) -> object:
    return make_plan(built.bundle, store, ENGINE, 1, "cpu", (1, photo), memory, step_seconds, heartbeat)


@pytest.fixture
def photo(photos: Path) -> Path:
    return next(photos.rglob("*.jpg"))


@pytest.mark.ort_training
def test_it_is_measured_once_for_a_budget(
    vit: Built, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DeviceStore(tmp_path)
    called = []
    plan = plan_of(vit, store, photo, 100 * GB, heartbeat=lambda: called.append(1))
    assert len(called) == 1 + LAYERS  # the watchdog is reset after the feature pass and after each level
    assert plan.level_cap == LAYERS
    monkeypatch.setattr(subprocess, "Popen", None)  # a second measurement would need it
    assert plan_of(vit, store, photo, 100 * GB) == plan
    with pytest.raises(TypeError):
        plan_of(vit, store, photo, 99 * GB)


def test_a_budget_nothing_fits_into_is_refused_with_one_that_does(vit: Built, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"level 1 needs \d+MB, more than the budget of 10MB") as refused:
        plan_of(vit, DeviceStore(tmp_path), photo, 10**7)
    least = int(str(refused.value).split("MB, more than")[0].split()[-1])
    assert plan_of(vit, DeviceStore(tmp_path), photo, least * 10**6).level_cap >= 1


def test_a_time_nothing_fits_into_is_refused_with_what_it_takes(vit: Built, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"level 1 takes \d+.\d s, longer than --step-seconds 1e-09"):
        plan_of(vit, DeviceStore(tmp_path), photo, 100 * GB, step_seconds=1e-9)


def test_a_sample_that_cannot_be_read_is_not_taken_for_a_lack_of_memory(vit: Built, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"could not be measured: .*nothing\.jpg"):
        plan_of(vit, DeviceStore(tmp_path), tmp_path / "nothing.jpg", 100 * GB)
    assert not list(tmp_path.iterdir())


def test_the_measurement_writes_into_the_state_directory_only(
    vit: Built, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").write_text("no folder")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))  # as on a read-only root without TMPDIR
    store = DeviceStore(tmp_path / "state")
    store.root.mkdir()
    assert plan_of(vit, store, photo, 100 * GB).level_cap == LAYERS
    assert [path.name for path in store.root.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("code", "errors", "raised"),
    [
        (0, "", None),
        (-9, "", None),  # the kernel ends a process that takes too much
        (-6, "terminate called after throwing an instance of 'std::bad_alloc'", None),
        (1, "Traceback …\nMemoryError\n", None),
        (1, "Traceback …\nFileNotFoundError: [Errno 2] No usable temporary directory found\n", RunError),
        (3, "error: photo.jpg is not a readable image; replace it\n", RunError),
        (74, "error: the disk is full\n", OSError),
    ],
)
def test_only_a_lack_of_memory_is_taken_for_one(code: int, errors: str, raised: type[Exception] | None) -> None:
    with pytest.raises(raised) if raised else contextlib.nullcontext():
        check_end(code, errors)
