"""An execution provider is used only if it agrees with the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.daemon.launch import launch
from edge_runtime.engines.openvino import OPENVINO, offers_openvino
from edge_runtime.engines.sessions import CPU, open_model, open_session
from edge_runtime.resources import providers
from edge_runtime.resources.providers import (
    BOUNDS,
    Bounds,
    Trial,
    choose_provider,
    describe_choice,
    disagreement,
    fastest,
    provider_for,
    require_provider,
    try_providers,
)
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.errors import BundleError, ConfigError
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack
from tests.support.bundles import LAYERS, Built

GRADIENT = "gradient of block 3"
OUTPUTS = {"hidden": np.ones((2, 3)), "loss": np.array([2.0]), GRADIENT: np.array([1.0, 2.0, 3.0])}
with_openvino = pytest.mark.skipif(not offers_openvino(), reason="needs OpenVINO and a processor with bfloat16")


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
    first, second = (providers.try_provider(vit.bundle, CPU, 1)[1] for _ in range(2))
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
    assert trials[CPU].refused.startswith("it took longer than") and trials[CPU].temporary and called


def test_texts_are_computed_too(bert: Built) -> None:
    assert np.isfinite(providers.try_provider(bert.bundle, CPU, 1)[1]["loss"]).all()


@with_openvino
@pytest.mark.parametrize("level", [1, LAYERS])
def test_openvino_in_bfloat16_steps_and_predicts_like_the_cpu(
    vit: Built, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "LEVEL", level)
    (_, expected), (trial, found) = (providers.try_provider(vit.bundle, name, 1) for name in (CPU, OPENVINO))
    assert trial.seconds > 0
    assert disagreement(expected, found, BOUNDS[OPENVINO]) == ""
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
