"""The gradient of each variant of `benchmarks.step`: its cosine to that of torch in fp32, for the same random samples.

The engines start from the bundle's own features, so the cosine of int8 includes the error of the hidden states.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.step_variants import Setting
from benchmarks.torch_model import Precision, load_model, load_source
from edge_runtime.engines.base import Batch
from edge_runtime.engines.sessions import open_session, run
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.resources.provider_trial import cosine
from export.reference import model_gradient, random_samples, torch_inputs
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.task_bundle import TaskBundle

SPREAD = 0.02  # standard deviation of what is added to the trainables: with a head of zeros LoRA has no gradient


def cosines(bundles: Sequence[Path], setting: Setting, levels: Sequence[int]) -> dict[str, float]:
    """For `torch-whole-autocast`, `torch-whole-bf16` and `step-graph-{precision}-{k}`."""
    bundle = TaskBundle.load(setting.bundle)
    manifest, rng = bundle.manifest, np.random.default_rng(setting.seed)
    blocks = manifest.dims.blocks
    source = load_source(bundle, setting.model, setting.weights, setting.seed)
    samples = random_samples(source, manifest.preprocessing, setting.batch, rng)
    labels = rng.integers(0, len(bundle.classes), setting.batch)
    initial = bundle.initial()[0]
    theta = initial + SPREAD * rng.standard_normal(initial.size, np.float32)
    inputs, targets = torch_inputs(samples, manifest.preprocessing), torch.from_numpy(labels)

    def of_torch(level: int, precision: Precision) -> Vector:
        model = load_model(source, bundle, level, precision, setting.seed).eval()
        try:
            with precision.products():
                trained = theta[: bundle.expert.size(level)]
                return model_gradient(model, manifest.peft, bundle.expert, trained, inputs, targets)[1]
        finally:
            model.unload()

    expected = {level: of_torch(level, Precision.FP32) for level in {*levels, min(blocks, manifest.levels)}}
    found: dict[str, float] = {}
    for folder in bundles:
        other = TaskBundle.load(folder)
        graph = open_session(other, "features.onnx", setting.threads)
        states = run(graph, [f"hidden_{level}" for level in levels], {source.family.input: samples})
        engine = StepGraphEngine(other, setting.threads)
        for level, hidden in zip(levels, states, strict=True):
            engine.load(level)
            engine.set(theta[: bundle.expert.size(level)])
            _, gradient = engine.gradient(Batch.cross_entropy(hidden, labels, len(bundle.classes)))
            found[f"step-graph-{other.manifest.precision}-{level}"] = cosine(gradient, expected[level])
    highest = min(blocks, manifest.levels)
    for name, precision in (("autocast", Precision.AUTOCAST), ("bf16", Precision.BF16)):
        found[f"torch-whole-{name}"] = cosine(of_torch(highest, precision), expected[highest])
    return found


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    fields = arguments["setting"]
    common = Setting(**{**fields, "bundle": Path(fields["bundle"])})
    print(json.dumps(cosines([Path(each) for each in arguments["bundles"]], common, arguments["levels"])))
