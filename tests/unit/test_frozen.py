"""Bundles with int8 weights: distance from float32, and independence of the batch. Graphs with products in float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.bundles import LAYERS, Built, as_input, build, random_samples, random_theta, run_graph, shared_bundle
from support.samples import CLASSES
from support.torch_reference import torch_step

from edge_runtime.resources.provider_trial import cosine, relative_error
from export.frozen import quantize
from fedfmsl.algorithms.arrays import NEVER
from fedfmsl.protocol.bundle import FP16

B = 6


@pytest.fixture(scope="module", params=["vit_folder", "bert_folder"])
def int8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    weights: Path = request.getfixturevalue(request.param)
    return build(weights, tmp_path_factory.mktemp("bundles") / "int8", precision="int8")


@pytest.fixture(scope="module", params=["vit", "bert"])
def fp16(request: pytest.FixtureRequest) -> Built:
    return shared_bundle(request.param, fp16=True)  # its build compares the graphs with torch


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), columns=st.integers(1, 9), spread=st.floats(0, 4))
def test_a_quantized_weight_differs_by_at_most_half_a_step_of_its_column(
    seed: int, rows: int, columns: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(rows, columns)) * np.exp(spread * rng.normal(size=columns))).astype(np.float32)
    integers, scale = quantize(weight)
    assert integers.dtype == np.int8
    assert np.abs(integers.astype(int)).max() <= 127
    assert (np.abs(integers * scale - weight) <= 0.501 * scale + 1e-30).all()


def test_a_column_of_zeros_stays_zero() -> None:
    integers, scale = quantize(np.zeros((4, 2), np.float32))
    assert not integers.any()
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("level", [1, 2, LAYERS])
def test_loss_and_gradient_are_close_to_torch(int8: Built, level: int) -> None:
    samples, theta = random_samples(int8, B, seed=1), random_theta(int8.bundle, level, seed=2)
    labels = np.arange(B) % len(CLASSES)
    hidden = run_graph(int8.bundle, "features.onnx", [f"hidden_{level}"], **as_input(int8, samples))[0]
    ours_loss, ours = run_graph(
        int8.bundle,
        f"step-{level}.onnx",
        ["loss", "gradient"],
        hidden=hidden,
        labels=labels,
        weights=np.full(B, 1 / B, np.float32),
        gate=np.zeros(B, np.float32),
        other=np.full(B, NEVER, np.float32),
        bias=np.zeros(len(CLASSES), np.float32),
        theta=theta,
    )
    loss, gradient = torch_step(
        int8, theta, samples, lambda logits: torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    )
    cosine = ours @ gradient / (np.linalg.norm(ours) * np.linalg.norm(gradient))
    assert cosine > 0.995
    assert abs(float(ours_loss) - loss) < 0.05 * loss


@pytest.mark.parametrize("level", [1, LAYERS])
@pytest.mark.parametrize("share", [1.0, 1e-7])
def test_products_in_float16_are_rounded_and_keep_small_gradients(fp16: Built, level: int, share: float) -> None:
    bundle, theta = fp16.bundle, random_theta(fp16.bundle, level, seed=2)
    outputs, samples = [f"hidden_{level}", "pooled"], as_input(fp16, random_samples(fp16, B, seed=1))
    hidden, pooled = run_graph(bundle, "features.onnx", outputs, **samples)
    half_hidden, half_pooled = run_graph(bundle, f"{FP16}features.onnx", outputs, **samples)
    assert 1e-5 < relative_error(half_pooled, pooled) < 2e-3
    inputs = {
        "labels": np.arange(B) % len(CLASSES),
        "weights": np.full(B, share / B, np.float32),
        "gate": np.zeros(B, np.float32),
        "other": np.full(B, NEVER, np.float32),
        "bias": np.zeros(len(CLASSES), np.float32),
        "theta": theta,
    }
    loss, expected = run_graph(bundle, f"step-{level}.onnx", ["loss", "gradient"], hidden=hidden, **inputs)
    found, gradient = run_graph(bundle, f"{FP16}step-{level}.onnx", ["loss", "gradient"], hidden=half_hidden, **inputs)
    assert abs(found - loss) < 0.01 * loss
    assert relative_error(gradient, expected) < 0.01
    assert all(cosine(gradient[at], expected[at]) > 0.9999 for at in bundle.expert.parts_of(level).values())


def test_states_are_lifted_in_float16_as_in_float32(fp16: Built) -> None:
    bundle, samples = fp16.bundle, as_input(fp16, random_samples(fp16, B, seed=1))
    (hidden,) = run_graph(bundle, "features.onnx", ["hidden_2"], **samples)
    theta = random_theta(bundle, LAYERS, seed=2)[bundle.expert.parts[str(LAYERS - 2)]]
    exact, rounded = (
        run_graph(bundle, f"{kind}lift-{LAYERS - 2}.onnx", ["lifted"], hidden=hidden, theta=theta)[0]
        for kind in ("", FP16)
    )
    assert 1e-5 < relative_error(rounded, exact) < 2e-3


def test_the_result_for_a_sample_does_not_depend_on_its_batch(int8: Built) -> None:
    samples = random_samples(int8, B, seed=3)
    together = run_graph(int8.bundle, "features.onnx", ["hidden_1", "pooled"], **as_input(int8, samples))
    for index in range(B):
        alone = run_graph(
            int8.bundle, "features.onnx", ["hidden_1", "pooled"], **as_input(int8, samples[index : index + 1])
        )
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], many[index], rtol=1e-4, atol=1e-5)


def test_every_frozen_projection_is_int8(int8: Built) -> None:
    hidden = int8.bundle.manifest.dims.hidden
    for name in ("features.onnx", "step-2.onnx", "personal-2.onnx"):
        model = onnx.load(str(int8.bundle.path(name)), load_external_data=False)
        floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2]
        assert all(min(t.dims) < hidden or t.name in ("patch.weight", "words") for t in floats), name
