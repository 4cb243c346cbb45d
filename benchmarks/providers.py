"""python -m benchmarks.providers: the execution providers of this machine's ONNX Runtime, in agreement and time.

Of a bundle that was exported with --fp16, each one on a GPU also computes the graphs with products in float16.

Each provider computes the features of the same random samples and a training step at several levels. `bound` is a step
whose hidden states are already on the device (IO binding): the most that keeping them there can save.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray

from edge_runtime.engines.base import Batch
from edge_runtime.engines.openvino import OPENVINO
from edge_runtime.engines.runtime import onnxruntime
from edge_runtime.engines.sessions import CPU, IN_FP16, open_session, run
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.resources.provider_trial import SPREAD, cosine, random_inputs, relative_error
from edge_runtime.resources.providers import in_float16, offered_providers
from fedfmsl.common.cli import application, console
from fedfmsl.errors import BundleError
from fedfmsl.protocol.task_bundle import TaskBundle

app = application("Measure the execution providers of the installed ONNX Runtime.")

BATCH = 16
WEIGHTS = "backbone.weights"


@app.command()
def main(
    bundle: Path = typer.Option(help="Bundle folder, like bundles/benchmark-vit-b16-fp32."),
    levels: str = typer.Option("1,2,4,12", help="Levels to measure, separated by commas."),
    threads: int = typer.Option(0, min=0, help="0: one per core."),
    repeats: int = typer.Option(10, min=3, help="Measured turns of each computation."),
    seed: int = typer.Option(0, help="Seed of the samples."),
    random_weights: bool = typer.Option(
        False, "--random-weights", help="Write random weights if the bundle was copied without its large file."
    ),
) -> None:
    """Print a Markdown table. Times are medians; errors are relative to the CPU's results in the Euclidean norm.
    The cosine to them is that of the whole result, or for a step the least one of the head and of each block."""
    loaded = TaskBundle.load(bundle)
    if random_weights and not loaded.path(WEIGHTS).exists():
        write_random_weights(loaded)
    chosen = [level for level in map(int, levels.split(",")) if level <= loaded.manifest.levels]
    console.print(f"onnxruntime {onnxruntime.__version__}, {loaded.manifest.model}, batches of {BATCH}")
    print("| provider | computation | ms | × cpu | error | cosine |\n|---|---|---|---|---|---|")
    reference: dict[str, tuple[float, NDArray[Any]]] = {}
    offered = offered_providers()
    variants = in_float16(offered) if loaded.has_fp16 else ()
    for provider in sorted((*offered, *variants), key=lambda name: name != CPU):
        try:
            named = list(computations(loaded, provider, chosen, threads, seed))
        except BundleError as reason:
            console.print(f"{provider}: {reason}")
            continue
        for name, compute in named:
            result = compute()
            milliseconds = 1e3 * median_seconds(compute, repeats)
            if provider == CPU:
                reference[name] = milliseconds, result
            before, expected = reference[name]
            parts = [at for at in loaded.expert.parts.values() if at.stop <= result.size]
            similarities = [cosine(result[at], expected[at]) for at in parts if name.startswith("step")]
            row = [
                provider,
                name,
                f"{milliseconds:.2f}",
                f"{before / milliseconds:.1f}",
                f"{relative_error(result, expected):.1e}",
                f"{min(similarities, default=cosine(result, expected)):.7f}",
            ]
            print(f"| {' | '.join(row)} |")


def computations(
    bundle: TaskBundle, provider: str, levels: list[int], threads: int, seed: int
) -> Iterator[tuple[str, Callable[[], NDArray[Any]]]]:
    """Names and computations of one provider. Each returns one vector: pooled features, or a gradient."""
    dims = bundle.manifest.dims
    rng = np.random.default_rng(seed)
    samples = random_inputs(bundle, BATCH, rng)
    hidden = rng.standard_normal((BATCH, dims.tokens, dims.hidden), np.float32)
    batch = Batch.cross_entropy(hidden, rng.integers(0, len(bundle.classes), BATCH), len(bundle.classes))
    session = open_session(bundle, "features.onnx", threads, provider=provider)
    yield "features", lambda: run(session, ["pooled"], samples)[0].ravel()
    for level in levels:
        initial = bundle.initial()[0][: bundle.expert.size(level)]
        theta = initial + SPREAD * np.random.default_rng(level).standard_normal(initial.size, np.float32)
        engine = StepGraphEngine(bundle, threads, provider=provider)
        engine.load(level)
        engine.set(theta)
        yield f"step, level {level}", lambda engine=engine: engine.gradient(batch)[1]  # type: ignore[misc]
        (inputs,) = batch.micro_batches(BATCH)
        step = open_session(bundle, f"step-{level}.onnx", threads, provider=provider)
        yield (
            f"step, level {level}, one micro-batch",
            lambda step=step, inputs=inputs, theta=theta: run(  # type: ignore[misc]
                step, ["loss", "gradient"], {**inputs, "theta": theta}
            )[1],
        )
        if provider != OPENVINO:
            yield f"step, level {level}, bound", bound(step, {**inputs, "theta": theta}, provider)


def bound(session: Any, inputs: dict[str, NDArray[Any]], provider: str) -> Callable[[], NDArray[Any]]:
    """A step whose inputs but `theta` stay on the device of the provider."""
    device = "cuda" if provider.removesuffix(IN_FP16) in ("cuda", "tensorrt") else "cpu"
    binding = session.io_binding()
    for name, values in inputs.items():
        if name != "theta":
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values, device, 0))
    binding.bind_output("loss")
    binding.bind_output("gradient")

    def compute() -> NDArray[Any]:
        binding.bind_cpu_input("theta", inputs["theta"])
        session.run_with_iobinding(binding)
        gradient: NDArray[Any] = binding.copy_outputs_to_cpu()[1]
        return gradient

    return compute


def write_random_weights(bundle: TaskBundle) -> None:
    """Layer norms near one, everything else near zero, with a standard deviation of 0.02."""
    rng = np.random.default_rng(0)
    weights = np.zeros(bundle.manifest.files[WEIGHTS].size // 4, np.float32)
    for path in bundle.root.glob("*.onnx"):
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                start = int(entries["offset"]) // 4
                values = 0.02 * rng.standard_normal(int(entries["length"]) // 4, np.float32)
                weights[start : start + len(values)] = values + ("norm" in tensor.name and "weight" in tensor.name)
    weights.tofile(bundle.path(WEIGHTS))


def median_seconds(compute: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    app()
