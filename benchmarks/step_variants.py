"""The variants that `benchmarks.step` compares. Each is a training step on random images, in its own process.

torch-whole        transformers + PEFT over the whole model, LoRA on all blocks: a federated client written in torch
torch-suffix-{k}   transformers + PEFT over the last `k` blocks, from the cached hidden state
{engine}-{k}       the engine of that name at level k, from the same cached state
product            ONNX Runtime's product of two 2048 × 2048 matrices, for the speed of the machine
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.engines.base import Batch
from edge_runtime.engines.factory import open_engine
from edge_runtime.engines.memory import peak_rss_mb
from edge_runtime.training.loop import Targets
from fedfmsl.protocol.bundle import ImagePreprocessing
from fedfmsl.protocol.messages import EngineChoice, Training
from fedfmsl.protocol.task_bundle import TaskBundle

LEARNING_RATE = 1e-3
PRODUCT_SIDE = 2048
TURN_SECONDS = 0.5


@dataclass(frozen=True)
class Setting:
    """Common to all variants. `model` and `weights` as for export.build."""

    bundle: Path
    model: str
    weights: str | None
    batch: int
    threads: int
    seed: int


@dataclass(frozen=True)
class Variant:
    """`step` runs one training step (or product), whose matrix products take `flops`."""

    step: Callable[[], object]
    flops: int


def make(name: str, setting: Setting) -> Variant:
    if name == "product":
        return _product(setting)
    if name == "torch-whole":
        return _torch(setting, level=None)
    kind, _, level = name.rpartition("-")
    if kind == "torch-suffix":
        return _torch(setting, int(level))
    return _engine("ort-training" if kind == "ort-training" else "step-graph", setting, int(level))


def _engine(choice: EngineChoice, setting: Setting, level: int) -> Variant:
    from benchmarks.flops import graph_flops

    bundle = TaskBundle.load(setting.bundle)
    dims, size = bundle.manifest.dims, bundle.expert.size(level)
    rng = np.random.default_rng(setting.seed)
    targets = Targets.cross_entropy(rng.integers(0, len(bundle.classes), setting.batch))
    hidden = rng.normal(size=(setting.batch, dims.tokens, dims.hidden)).astype(np.float32)
    batch = Batch(hidden, targets.labels, targets.gate, targets.other, np.zeros(len(bundle.classes), np.float32))
    engine = open_engine(choice, bundle, setting.threads)
    engine.load(level)
    engine.set(bundle.initial()[0][:size], Training(epochs=1, learning_rate=LEARNING_RATE))
    flops = graph_flops(bundle.path(f"step-{level}.onnx"), setting.batch, size, (len(bundle.classes), dims.feature))
    return Variant(lambda: engine.step(batch), flops)


def _torch(setting: Setting, level: int | None) -> Variant:
    """The whole model on pixels, or its `level` last blocks on a hidden state."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from export.reference import add_lora
    from export.weights import load_backbone

    torch.set_num_threads(setting.threads)
    bundle = TaskBundle.load(setting.bundle)
    manifest = bundle.manifest
    assert isinstance(manifest.preprocessing, ImagePreprocessing)
    dims, size = manifest.dims, manifest.preprocessing.size
    source = load_backbone(setting.model, setting.weights, len(bundle.classes), size, None, setting.seed)
    source.model.set_attn_implementation("sdpa")  # the default of transformers
    model = add_lora(source, manifest.lora, level or dims.blocks, setting.seed)
    model.train()
    labels = torch.randint(0, len(bundle.classes), (setting.batch,))
    pixels = torch.randn(setting.batch, 3, size, size)
    hidden = torch.randn(setting.batch, dims.tokens, dims.hidden)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    backbone = source.backbone
    classify = torch.nn.Linear(dims.hidden, len(bundle.classes))

    def logits() -> Any:
        if level is None:
            return model(pixel_values=pixels).logits
        state = hidden
        for block in backbone.encoder.layer[-level:]:
            out = block(state)
            state = out[0] if isinstance(out, tuple) else out
        return classify(backbone.layernorm(state)[:, 0])

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(), labels).backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    return Variant(step, counter.get_total_flops())


def _product(setting: Setting) -> Variant:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    side = PRODUCT_SIDE
    matrix = np.random.default_rng(setting.seed).normal(size=(side, side)).astype(np.float32)
    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in "xy"}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [value["x"]],
        [value["y"]],
        [numpy_helper.from_array(matrix, "w")],
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Variant(lambda: session.run(["y"], {"x": matrix}), 2 * side**3)


def serve_turns(name: str, setting: Setting) -> None:
    """For each line on standard input: median seconds of a step and peak memory of the process, as a line of JSON."""
    variant = make(name, setting)
    variant.step()
    print(json.dumps({"flops": variant.flops}), flush=True)
    for _ in sys.stdin:
        variant.step()  # not measured: other variants have filled the caches
        seconds: list[float] = []
        while sum(seconds) < TURN_SECONDS:
            started = time.perf_counter()
            variant.step()
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": statistics.median(seconds), "peak_rss_mb": peak_rss_mb()}), flush=True)


if __name__ == "__main__":
    fields = json.loads(sys.argv[2])
    serve_turns(sys.argv[1], Setting(**{**fields, "bundle": Path(fields["bundle"])}))
