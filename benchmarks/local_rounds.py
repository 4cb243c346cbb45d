"""The local computation of a device in some rounds of stage 1, in three variants, with a process for each.

    edge          this project: features of new images once, epochs on cached states, evaluation on held-out images
    torch         transformers + PEFT over the whole model, with decoded images in memory: a federated client in torch
    torch-bf16    the same with frozen weights and products in bf16

`benchmarks.epoch` starts this module. It prints the seconds of each part as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.inputs import reader_for
from edge_runtime.data.samples import Sample, labels_of
from edge_runtime.engines.memory import peak_rss_mb
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.training.loop import Targets, predict_log_p, train
from fedfmsl.protocol.bundle import ImagePreprocessing, file_sha256
from fedfmsl.protocol.messages import Training
from fedfmsl.protocol.task_bundle import TaskBundle

HELD_OUT = 0.2


@dataclass(frozen=True)
class Setting:
    """`levels`: the level of each round. `images`: a folder of JPEG files; labels are file numbers modulo classes."""

    bundle: str
    model: str
    weights: str | None
    images: str
    scratch: str
    levels: tuple[int, ...]
    epochs: int
    batch: int
    threads: int
    seed: int


@dataclass
class Seconds:
    """Wall-clock time, summed over all rounds."""

    features: float = 0.0
    training: float = 0.0
    evaluation: float = 0.0
    peak_rss_mb: float = 0.0


def edge(setting: Setting) -> Seconds:
    bundle, spent = TaskBundle.load(Path(setting.bundle)), Seconds()
    train_on, held_out = _split(setting, len(bundle.classes))
    cache = FeatureCache(DiskCache(Path(setting.scratch)), bundle, setting.threads)
    engine = StepGraphEngine(bundle, setting.threads)
    training = Training(epochs=setting.epochs, batch_size=setting.batch, learning_rate=1e-3)
    bias = np.zeros(len(bundle.classes), np.float32)
    theta = bundle.initial()[0]
    targets = Targets.cross_entropy(labels_of(train_on))
    for round_, level in enumerate(setting.levels):
        size = bundle.expert.size(level)
        started = time.perf_counter()
        cache.pooled([*train_on, *held_out], level)
        hidden, unseen = cache.frozen(train_on, level), cache.frozen(held_out, level)
        spent.features += time.perf_counter() - started
        started = time.perf_counter()
        engine.load(level)
        engine.set(theta[:size], training)
        train(engine, hidden, targets, bias, training, [setting.seed, round_], lambda *_: None)
        theta[:size] = engine.get()
        spent.training += time.perf_counter() - started
        started = time.perf_counter()
        predict_log_p(engine, unseen, bias)
        spent.evaluation += time.perf_counter() - started
    return spent


def torch(setting: Setting, kind: str = "FP32") -> Seconds:
    """`kind`: the name of a `benchmarks.torch_model.Precision`."""
    import torch

    from benchmarks.torch_model import Precision, load_model, load_source
    from export.reference import torch_inputs

    torch.set_num_threads(setting.threads)
    bundle, spent = TaskBundle.load(Path(setting.bundle)), Seconds()
    manifest = bundle.manifest
    preprocessing = manifest.preprocessing
    assert isinstance(preprocessing, ImagePreprocessing)
    train_on, held_out = _split(setting, len(bundle.classes))
    source, precision = load_source(bundle, setting.model, setting.weights, setting.seed), Precision[kind]
    model = load_model(source, bundle, manifest.dims.blocks, precision, setting.seed)
    started = time.perf_counter()
    reader = reader_for(preprocessing)
    pixels = {s.sha256: reader.load(s.path) for s in (*train_on, *held_out)}
    spent.features = time.perf_counter() - started

    def batch(samples: list[Sample]) -> dict[str, Any]:
        return torch_inputs(np.stack([pixels[sample.sha256] for sample in samples]), preprocessing)

    rng = np.random.default_rng(setting.seed)
    for _ in setting.levels:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        started = time.perf_counter()
        model.train()
        for _ in range(setting.epochs):
            for chosen in np.array_split(rng.permutation(len(train_on)), -(-len(train_on) // setting.batch)):
                samples = [train_on[index] for index in chosen]
                optimizer.zero_grad()
                labels = torch.from_numpy(labels_of(samples))
                with precision.products():
                    loss = torch.nn.functional.cross_entropy(model(**batch(samples)).logits, labels)
                loss.backward()
                optimizer.step()
        spent.training += time.perf_counter() - started
        started = time.perf_counter()
        model.eval()
        with torch.inference_mode(), precision.products():
            for start in range(0, len(held_out), setting.batch):
                model(**batch(held_out[start : start + setting.batch]))
        spent.evaluation += time.perf_counter() - started
    return spent


def _split(setting: Setting, classes: int) -> tuple[list[Sample], list[Sample]]:
    paths = sorted(Path(setting.images).glob("*.jpg"))
    samples = [Sample(path, file_sha256(path), index % classes) for index, path in enumerate(paths)]
    held_out = round(HELD_OUT * len(samples))
    return samples[held_out:], samples[:held_out]


if __name__ == "__main__":
    sides: dict[str, Callable[[Setting], Seconds]] = {
        "edge": edge,
        "torch": torch,
        "torch-bf16": partial(torch, kind="BF16"),
    }
    spent = sides[sys.argv[1]](Setting(**json.loads(sys.argv[2])))
    spent.peak_rss_mb = peak_rss_mb()
    print(json.dumps(asdict(spent)))
