"""The personalized graph against the graphs of its parts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.calibration import calibrate
from fedfmsl.algorithms.mixture import Biases, gate_offset, log_softmax, mix
from support.bundles import Built, as_input, random_samples, random_theta, run_graph


def check_the_personalized_graph(built: Built, level: int, temperature: float, counts: NDArray[np.int64]) -> None:
    """`counts` (C,): the device's samples of each class."""
    bundle, rng = built.bundle, np.random.default_rng(level)
    samples = as_input(built, random_samples(built, 5, seed=13))
    thetas = {expert: random_theta(bundle, level, seed) for seed, expert in enumerate(("global", "local"))}
    biases = Biases.of_counts(counts)
    gate_theta = rng.normal(0, 0.5, bundle.gate.total).astype(np.float32)
    hidden, pooled = run_graph(bundle, "features.onnx", [f"hidden_{level}", "pooled"], **samples)
    logits = {
        expert: run_graph(bundle, f"predict-{level}.onnx", ["logits"], hidden=hidden, theta=theta)[0]
        for expert, theta in thetas.items()
    }
    log_p = log_softmax(logits["global"] + biases.kept), log_softmax(logits["local"] + biases.held)
    offset = gate_offset(logits["global"], biases)
    (log_gate,) = run_graph(
        bundle, "gate-predict.onnx", ["log_gate"], pooled=pooled, offset=offset, gate_theta=gate_theta
    )
    probabilities, gate = run_graph(
        bundle,
        f"personal-{level}.onnx",
        ["probabilities", "gate"],
        **samples,
        gate_theta=gate_theta,
        temperature=np.array([temperature], np.float32),
        **{f"{expert}_theta": theta for expert, theta in thetas.items()},
        kept_bias=biases.kept,
        given_bias=biases.given,
        held_bias=biases.held,
    )
    assert np.allclose(gate, np.exp(log_gate), atol=1e-6)
    assert np.allclose(probabilities, np.exp(calibrate(mix(log_gate, *log_p), temperature)), atol=1e-5)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
