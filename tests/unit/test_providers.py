"""An execution provider is used only if it agrees with the CPU."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.daemon import measure as measure_module
from edge_runtime.daemon import round_runner
from edge_runtime.daemon.launch import launch
from edge_runtime.daemon.measure import measure
from edge_runtime.daemon.round_runner import RoundRunner
from edge_runtime.data.folder import SampleFolder
from edge_runtime.engines.base import MemoryPlan
from edge_runtime.engines.openvino import OPENVINO, offers_openvino
from edge_runtime.engines.sessions import CPU, IN_FP16, open_model, open_session
from edge_runtime.resources import plan as plan_module
from edge_runtime.resources import provider_trial, providers
from edge_runtime.resources.plan import Plan, make_plan
from edge_runtime.resources.provider_trial import Bounds, Trial, bounds_of, disagreement, try_provider
from edge_runtime.resources.providers import (
    Choice,
    choose_provider,
    describe_choice,
    fastest,
    provider_for,
    require_provider,
    try_providers,
)
from edge_runtime.resources.unfinished import UnfinishedWork
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.errors import BundleError, ConfigError, RunError
from fedfmsl.protocol.messages import Stage
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack
from tests.support.bundles import LAYERS, Built, shared_bundle
from tests.support.in_process_daemon import make_daemon, no_report
from tests.support.training_contexts import announced_round

GRADIENT = "gradient of block 3"
PLAN = Plan(feature_batch=4, memory_plans={1: MemoryPlan(4)}, seconds={1: 0.1})
OUTPUTS = {"hidden": np.ones((2, 3)), "loss": np.array([2.0]), GRADIENT: np.array([1.0, 2.0, 3.0])}
with_openvino = pytest.mark.skipif(not offers_openvino(), reason="needs OpenVINO and a processor with bfloat16")


@pytest.fixture(scope="module")
def vit_fp16() -> Built:
    return shared_bundle("vit", fp16=True)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("hidden", np.full((2, 3), 1.0005), ""),
        ("hidden", np.full((2, 3), 1.01), "its hidden differs from the CPU's by 0.01"),
        ("loss", np.array([np.nan]), "its loss is not finite"),
        (GRADIENT, np.array([1.0, 2.0, 3.01]), ""),
        (GRADIENT, np.array([1.0, 2.0, 4.0]), "its gradient of block 3 has cosine 0.99"),
        (GRADIENT, np.zeros(0), "its gradient of block 3 has shape (0,), not (3,)"),
        (GRADIENT, np.zeros(3), "its gradient of block 3 has cosine 0.0"),
    ],
)
def test_results_must_be_those_of_the_cpu_within_bounds(name: str, value: np.ndarray, reason: str) -> None:
    found = disagreement(OUTPUTS, {**OUTPUTS, name: value}, Bounds())
    assert found.startswith(reason) if reason else found == ""


def test_the_fastest_that_agrees_is_kept_and_the_others_are_named() -> None:
    trials = {
        CPU: Trial(seconds=2.0),
        "cuda": Trial(seconds=0.5),
        "tensorrt": Trial(refused="it fails: no library"),
        "openvino": Trial(seconds=0.1, refused="its loss is not finite"),
        "dnnl": Trial(seconds=1.0),
    }
    choice = fastest(trials)
    assert choice.provider == "cuda"
    assert describe_choice(choice) == (
        "cuda, 4.0 times as fast as cpu; tensorrt is not used: it fails: no library; "
        "openvino is not used: its loss is not finite; dnnl is slower"
    )
    assert fastest({CPU: Trial(refused="it fails"), "cuda": Trial(refused="it fails")}).provider == CPU


def test_a_provider_that_cannot_start_is_named_and_the_cpu_is_used(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "offered_providers", lambda: ("cuda", CPU))
    store = DeviceStore(tmp_path)
    choice = choose_provider("auto", vit.bundle, 1, store)
    assert choice.provider == CPU
    assert choice.trials["cuda"].refused.startswith("it fails: the installed ONNX Runtime has no")
    assert not choice.trials[CPU].refused
    monkeypatch.setattr(providers, "try_providers", lambda *_: pytest.fail("it was measured before"))
    assert choose_provider("auto", vit.bundle, 1, store) == choice


def test_a_provider_that_failed_for_the_moment_is_tried_again_at_the_next_start(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "offered_providers", lambda: ("cuda", "dnnl", CPU))
    fails, tried, loss = {"cuda": "it fails: out of memory"}, list[str](), {CPU: 1.0, "cuda": 1.0, "dnnl": 2.0}

    def run(bundle: TaskBundle, name: str, threads: int, out: Path, *_: object) -> str:
        tried.append(name)
        seconds = 0.5 if name == "cuda" else 1.0
        out.write_bytes(pack(Trial(seconds=seconds), {"loss": np.full(1, loss[name], np.float32)}))
        return fails.get(name, "")

    monkeypatch.setattr(providers, "_run_trial", run)
    store = DeviceStore(tmp_path)
    assert choose_provider("auto", vit.bundle, 1, store).provider == CPU
    fails.clear()
    again = choose_provider("auto", vit.bundle, 1, store)
    assert again.provider == "cuda" and again.trials["dnnl"].refused.startswith("its loss differs")
    assert choose_provider("auto", vit.bundle, 1, store) == again
    assert tried == [CPU, "cuda", "dnnl", CPU, "cuda"]  # dnnl disagrees at every start


def test_a_process_of_a_provider_computes_the_same_as_the_cpu_does_here(vit: Built, tmp_path: Path) -> None:
    assert not try_providers(vit.bundle, [CPU], 1, tmp_path)[CPU].refused
    first, second = (try_provider(vit.bundle, CPU, 1)[1] for _ in range(2))
    assert disagreement(first, second, Bounds()) == ""
    gradients = {name: value for name, value in first.items() if name.startswith("gradient")}
    assert list(gradients) == ["gradient of the head", "gradient of block 2", "gradient of block 1"]
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())


def test_without_a_result_of_the_cpu_no_other_provider_is_used(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(bundle: TaskBundle, name: str, threads: int, out: Path, *_: object) -> str:
        out.write_bytes(pack(Trial(seconds=1.0), {"loss": np.ones(1, np.float32)}))
        return "it fails: no memory" if name == CPU else ""

    monkeypatch.setattr(providers, "_run_trial", run)
    choice = fastest(try_providers(vit.bundle, [CPU, "cuda"], 1, tmp_path))
    assert choice.provider == CPU
    assert choice.trials["cuda"].refused == "cpu fails, so there is nothing to compare it with"


def test_a_provider_that_hangs_is_stopped_and_the_watchdog_is_reset_meanwhile(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nexec sleep 600\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(providers.sys, "executable", str(hangs))
    monkeypatch.setattr(providers, "SECONDS", 0.05)
    monkeypatch.setattr(providers, "POLL_SECONDS", 0.01)
    called = list[int]()
    trials = try_providers(vit.bundle, [CPU], 1, tmp_path, lambda: called.append(1))
    assert trials[CPU].refused.startswith("it took longer than") and not trials[CPU].temporary and called


def test_texts_are_computed_too(bert: Built) -> None:
    assert np.isfinite(try_provider(bert.bundle, CPU, 1)[1]["loss"]).all()


@with_openvino
@pytest.mark.parametrize("level", [1, LAYERS])
def test_openvino_in_bfloat16_steps_and_predicts_like_the_cpu(
    vit: Built, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_trial, "LEVEL", level)
    (_, expected), (trial, found) = (try_provider(vit.bundle, name, 1) for name in (CPU, OPENVINO))
    assert trial.seconds > 0
    assert disagreement(expected, found, bounds_of(OPENVINO)) == ""
    assert not np.array_equal(found["hidden"], expected["hidden"])  # it was computed in another precision


@with_openvino
def test_openvino_names_what_it_cannot_read(vit: Built, tmp_path: Path) -> None:
    (tmp_path / "step-1.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"OpenVINO cannot load .*step-1.onnx: "):
        open_model(tmp_path / "step-1.onnx", 1, provider=OPENVINO)


def test_no_provider_but_the_cpu_needs_no_measurement(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "offered_providers", lambda: (CPU,))
    assert choose_provider("auto", vit.bundle, 1, DeviceStore(tmp_path / "missing")).trials == {}


def test_a_provider_that_is_not_offered_is_refused_with_the_remedy(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--provider gpu: the installed onnxruntime offers .*cpu"):
        choose_provider("gpu", vit.bundle, 1, DeviceStore(tmp_path))
    monkeypatch.setattr(providers, "openvino_version", lambda: "")
    monkeypatch.setattr(providers, "offered_providers", lambda: (CPU,))
    settings = Settings(run="r", images=tmp_path, broker="mqtt://127.0.0.1:9", provider=OPENVINO)
    with pytest.raises(ConfigError, match=r"package openvino is not installed.*fedfmsl-edge\[openvino\]"):
        launch(settings)  # before it connects
    monkeypatch.setattr(providers, "openvino_version", lambda: "2026.4.1")
    with pytest.raises(ConfigError, match="processor does not multiply in bfloat16"):
        require_provider(OPENVINO)
    with pytest.raises(ConfigError, match="ort-training has cpu only"):
        provider_for("ort-training", "cuda", vit.bundle, 1, DeviceStore(tmp_path))
    with pytest.raises(BundleError, match="no execution provider"):
        open_session(vit.bundle, "features.onnx", 1, provider="cuda")


def test_graphs_in_float16_are_tried_on_every_provider_but_those_on_the_processor(
    vit_fp16: Built, vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[str]] = []

    def run(bundle: TaskBundle, names: list[str], *_: object) -> dict[str, Trial]:
        tried.append(names)
        return {name: Trial(seconds=1.0 if name == CPU else 0.5 - 0.1 * name.endswith("fp16")) for name in names}

    monkeypatch.setattr(providers, "offered_providers", lambda: (OPENVINO, "cuda", CPU))
    monkeypatch.setattr(providers, "try_providers", run)
    choice = choose_provider("auto", vit_fp16.bundle, 1, DeviceStore(tmp_path / "a"))
    assert tried.pop() == [CPU, "cuda-fp16", OPENVINO, "cuda"]
    assert describe_choice(choice) == "cuda-fp16, 2.5 times as fast as cpu; openvino is slower; cuda is slower"
    choose_provider("cuda-fp16", vit_fp16.bundle, 1, DeviceStore(tmp_path / "b"))
    assert tried.pop() == [CPU, "cuda-fp16"]
    with pytest.raises(ConfigError, match=r"has no graphs for float16; build it with .* --fp16"):
        choose_provider("cuda-fp16", vit.bundle, 1, DeviceStore(tmp_path / "c"))
    for name in ("cpu-fp16", "openvino-fp16", "tensorrt-fp16"):
        with pytest.raises(ConfigError, match=rf"--provider {name}: the installed onnxruntime offers"):
            choose_provider(name, vit_fp16.bundle, 1, DeviceStore(tmp_path / "d"))


def test_graphs_in_float16_agree_with_the_cpu_within_their_bounds(
    vit_fp16: Built,
) -> None:
    expected, found = (try_provider(vit_fp16.bundle, name, 1)[1] for name in (CPU, f"{CPU}{IN_FP16}"))
    assert disagreement(expected, found, bounds_of("cuda-fp16")) == ""
    assert disagreement(expected, {**found, "loss": found["loss"] * 1.01}, bounds_of("cuda-fp16"))
    assert not np.array_equal(found["hidden"], expected["hidden"])
    assert bounds_of("cuda") == bounds_of("tensorrt") == Bounds()


@pytest.mark.parametrize(("in_bfloat16", "looser"), [(True, True), (False, False)])
def test_only_the_package_openvino_computes_in_bfloat16(
    in_bfloat16: bool, looser: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_trial, "offers_openvino", lambda: in_bfloat16)
    assert (bounds_of(OPENVINO).error > Bounds().error) == looser


WORK = """
import os, signal, sys
from pathlib import Path
from edge_runtime.resources.unfinished import UnfinishedWork

with UnfinishedWork(Path(sys.argv[1])).counted("cuda"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_work(root: Path) -> None:
    """Kills a process in which the provider works."""
    assert subprocess.run([sys.executable, "-c", WORK, str(root)], check=False).returncode == -signal.SIGKILL


def test_a_provider_whose_work_is_killed_three_times_in_a_row_is_refused_until_something_changes(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(bundle: TaskBundle, name: str, threads: int, out: Path, *_: object) -> str:
        out.write_bytes(pack(Trial(seconds=2.0 if name == CPU else 1.0), {"loss": np.ones(1, np.float32)}))
        return ""

    def chosen(asked: str = "auto") -> Choice:
        return choose_provider(asked, vit.bundle, 1, DeviceStore(tmp_path))

    monkeypatch.setattr(providers, "offered_providers", lambda: ("cuda", CPU))
    monkeypatch.setattr(providers, "_run_trial", run)
    assert chosen().provider == "cuda"
    kill_work(tmp_path)
    with pytest.raises(ValueError, match="an error"), UnfinishedWork(tmp_path).counted("cuda"):
        raise ValueError("an error")  # an end, so the count begins again
    for _ in range(2):
        kill_work(tmp_path)
        assert chosen().provider == "cuda"
    kill_work(tmp_path)
    for _ in range(2):
        assert chosen().provider == CPU
        refused = "cuda is not used: the device ended 3 times in a row while it computed"
        assert describe_choice(chosen()) == f"cpu; {refused}"
    assert chosen("cuda").provider == "cuda"


def test_a_trial_that_takes_the_device_down_three_times_is_not_tried_again(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, left, tried = tmp_path / "unfinished.json", b"", list[str]()

    def run(bundle: TaskBundle, name: str, threads: int, out: Path, *_: object) -> str:
        nonlocal left
        tried.append(name)
        if name == "cuda":
            left = counts.read_bytes()
            raise KeyboardInterrupt
        out.write_bytes(pack(Trial(seconds=1.0), {"loss": np.ones(1, np.float32)}))
        return ""

    monkeypatch.setattr(providers, "offered_providers", lambda: ("cuda", CPU))
    monkeypatch.setattr(providers, "_run_trial", run)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            choose_provider("auto", vit.bundle, 1, DeviceStore(tmp_path))
        counts.write_bytes(left)  # as a power cut would have left it
    assert choose_provider("auto", vit.bundle, 1, DeviceStore(tmp_path)).provider == CPU
    assert tried == [CPU, "cuda"] * 3 + [CPU]


def test_a_provider_is_counted_while_a_round_is_computed(
    vit: Built, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, found = make_daemon(vit, photos, tmp_path), list[bool]()
    counts = daemon.device.store.root / "unfinished.json"

    def read(*_: object) -> None:
        found.append(counts.exists())
        raise RunError("the round ends here")

    monkeypatch.setattr(round_runner, "read_globals", read)
    folder = SampleFolder(photos, vit.bundle, daemon.device.store, run="r")
    for provider in (CPU, "cuda"):
        before = daemon.runner
        runner = RoundRunner(before.device, folder, before.control, before.tracker, no_report, provider=provider)
        with pytest.raises(RunError, match="ends here"):
            runner.run(announced_round(Stage.GLOBAL, 1), bytes_down=0)
    assert found == [False, True] and not counts.exists()


def test_a_start_without_a_measurement_does_not_end_the_count(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, found = tmp_path / "unfinished.json", list[bool]()

    def plan_within(*_: object) -> Plan:
        found.append(counts.exists())
        return PLAN

    def start() -> None:
        make_plan(vit.bundle, DeviceStore(tmp_path), "step-graph", 1, "cuda", (1, tmp_path), 10**9, 60.0)

    monkeypatch.setattr(plan_module, "plan_within", plan_within)
    start()
    assert found == [True] and not counts.exists()
    for _ in range(3):
        assert not UnfinishedWork(tmp_path).refusal("cuda")
        kill_work(tmp_path)  # in a round
        start()  # the plan is known
    assert found == [True] and UnfinishedWork(tmp_path).refusal("cuda")


def test_a_provider_that_cannot_be_measured_is_replaced_by_the_next_one(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = {CPU: Trial(seconds=2.0), "cuda": Trial(seconds=1.0)}

    def make_plan(bundle: TaskBundle, store: DeviceStore, engine: str, threads: int, provider: str, *_: object) -> Plan:
        if provider in refused:
            raise ConfigError("a round at level 1 needs 900MB")
        return PLAN

    monkeypatch.setattr(measure_module, "provider_for", lambda *_: fastest(trials))
    monkeypatch.setattr(measure_module, "make_plan", make_plan)
    settings = Settings(run="r", images=tmp_path, broker="mqtt://127.0.0.1:9")
    arguments = settings, DeviceStore(tmp_path), "step-graph", vit.bundle, (1, tmp_path), lambda: None
    refused = ["cuda"]
    choice, found = measure(*arguments)
    assert found == PLAN
    assert describe_choice(choice) == "cpu; cuda is not used: a round at level 1 needs 900MB"
    refused.append(CPU)
    with pytest.raises(ConfigError, match="900MB"):
        measure(*arguments)
