"""One training step on hidden states, which come from IMAGE if it is given. Runs on the emulated board and on the host.

python one_step.py BUNDLE LEVEL OUT.npz [IMAGE]
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import numpy as np

from edge_runtime.data.inputs import reader_for
from edge_runtime.engines.base import Batch, MemoryPlan
from edge_runtime.engines.sessions import open_session, run
from edge_runtime.engines.step_graph import StepGraphEngine
from fedfmsl.protocol.messages import Training
from fedfmsl.protocol.task_bundle import TaskBundle

THREADS = 2


def main(folder: str, level: str, out: str, image: str = "") -> None:
    bundle, k = TaskBundle.load(Path(folder)), int(level)
    dims = bundle.manifest.dims
    hidden = np.random.default_rng(0).standard_normal((1, dims.tokens, dims.hidden), np.float32)
    if image:
        pixels = reader_for(bundle.manifest.preprocessing).load(Path(image))[None]
        started = time.perf_counter()
        (hidden,) = run(open_session(bundle, "features.onnx", THREADS), [f"hidden_{k}"], {"pixels": pixels})
        print(f"pass {time.perf_counter() - started:.1f} s")
    engine = StepGraphEngine(bundle, THREADS, {k: MemoryPlan(1)})
    engine.load(k)
    theta = bundle.initial()[0][: bundle.expert.size(k)]
    theta = (theta + np.random.default_rng(1).normal(0, 0.02, theta.size)).astype(np.float32)  # no gradient is zero
    engine.set(theta, Training(epochs=1, learning_rate=1e-3))
    started = time.perf_counter()
    loss = engine.step(Batch.cross_entropy(hidden, np.array([1]), len(bundle.classes)))
    print(f"step {time.perf_counter() - started:.1f} s, loss {loss:.6f}")
    np.savez(out, hidden=hidden, loss=loss, step=engine.get() - theta)
    print(*re.findall(r"Vm(?:Peak|HWM):.*", Path("/proc/self/status").read_text()), sep="\n")


main(*sys.argv[1:])
