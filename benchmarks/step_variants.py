"""The variants that `benchmarks.step` compares. Each is a training step on random samples, in its own process.

torch-whole[-P][-compile]  transformers + PEFT over the whole model, LoRA on all blocks: a federated client in torch; in
                           fp32, or P: `autocast` or `bf16` (see `benchmarks.torch_model.Precision`)
torch-suffix[-bf16]-{k}    the same over the last `k` blocks of an image model, from the cached hidden state
{engine}-{k}               the engine of that name at level k, from the same cached state
product                    ONNX Runtime's product of two 2048 × 2048 matrices, for the speed of the machine
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
from fedfmsl.protocol.messages import Training
from fedfmsl.protocol.setting_types import EngineChoice
from fedfmsl.protocol.task_bundle import TaskBundle

LEARNING_RATE = 1e-3
PRODUCT_SIDE = 2048
TURN_SECONDS = 0.5
COMPILED = "-compile"


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
    if name.startswith("torch-whole"):
        return _torch_whole(setting, precision_of(name), compiled=name.endswith(COMPILED))
    kind, _, level = name.rpartition("-")
    if kind.startswith("torch-suffix"):
        return _torch_suffix(setting, int(level), precision_of(name))
    return _engine("ort-training" if kind == "ort-training" else "step-graph", setting, int(level))


def precision_of(name: str) -> str:
    """Name of the `benchmarks.torch_model.Precision` of a variant in torch."""
    return "AUTOCAST" if "-autocast" in name else "BF16" if "-bf16" in name else "FP32"


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


def _torch_whole(setting: Setting, precision: str, compiled: bool) -> Variant:
    """Pixels or tokens through the whole model."""
    import torch

    from benchmarks.torch_model import Precision, load_model, load_source
    from export.reference import random_samples, torch_inputs

    bundle = TaskBundle.load(setting.bundle)
    torch.set_num_threads(setting.threads)
    source = load_source(bundle, setting.model, setting.weights, setting.seed)
    model = load_model(source, bundle, bundle.manifest.dims.blocks, Precision[precision], setting.seed)
    preprocessing = bundle.manifest.preprocessing
    samples = random_samples(source, preprocessing, setting.batch, np.random.default_rng(setting.seed))
    inputs = torch_inputs(samples, preprocessing)
    run = torch.compile(model) if compiled else model
    return _torch_variant(
        setting, Precision[precision], model, lambda: model(**inputs).logits, lambda: run(**inputs).logits
    )


def _torch_suffix(setting: Setting, level: int, precision: str) -> Variant:
    """A hidden state through the last `level` blocks."""
    import torch

    from benchmarks.torch_model import Precision, load_model, load_source

    bundle = TaskBundle.load(setting.bundle)
    torch.set_num_threads(setting.threads)
    source = load_source(bundle, setting.model, setting.weights, setting.seed)
    model = load_model(source, bundle, level, Precision[precision], setting.seed)
    backbone, dims = source.backbone, bundle.manifest.dims
    states = torch.bfloat16 if Precision[precision] is Precision.BF16 else torch.float32
    hidden = torch.randn(setting.batch, dims.tokens, dims.hidden, dtype=states)
    classify = torch.nn.Linear(dims.hidden, len(bundle.classes))

    def logits() -> Any:
        state = hidden
        for block in backbone.encoder.layer[-level:]:
            out = block(state)
            state = out[0] if isinstance(out, tuple) else out
        return classify(backbone.layernorm(state)[:, 0].float())

    return _torch_variant(setting, Precision[precision], model, logits, logits)


def _torch_variant(
    setting: Setting, precision: Any, model: Any, counted: Callable[[], Any], logits: Callable[[], Any]
) -> Variant:
    """Steps on `logits`, whose products are counted in `counted`: the counter does not see compiled ones."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    classes = len(TaskBundle.load(setting.bundle).classes)
    labels = torch.randint(0, classes, (setting.batch,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def step(compute: Callable[[], Any] = logits) -> None:
        optimizer.zero_grad()
        with precision.products():
            loss = torch.nn.functional.cross_entropy(compute(), labels)
        loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step(counted)
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
