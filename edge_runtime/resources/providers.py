"""Which execution provider of ONNX Runtime, or OpenVINO, a device computes with (ours).

A provider is used only if it agrees with the CPU. Each one computes the features, a prediction and a training step of
the same random samples, in a separate process, because a driver may crash. The fastest one that agrees is kept.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from edge_runtime.engines.base import Batch
from edge_runtime.engines.openvino import OPENVINO, offers_openvino, openvino_version
from edge_runtime.engines.runtime import onnxruntime
from edge_runtime.engines.sessions import CPU, UNAVAILABLE, open_session, run, short_name
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.store import DeviceStore
from edge_runtime.store.device_store import PROBE
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError, one_line
from fedfmsl.protocol.bundle import ImagePreprocessing
from fedfmsl.protocol.layout import HEAD
from fedfmsl.protocol.messages import EngineName
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import unpack

AUTO = "auto"
REMOTE = "azure"  # a provider that sends inputs to another machine
SAMPLES = 4
TOKENS = 10  # ids that every vocabulary has
SPREAD = 0.02  # standard deviation of what is added to the trainables, so that no gradient is zero
LEVEL = 2  # the first level whose step has a backward pass through a whole block
REPEATS = 3
SECONDS = 600.0  # after which a provider counts as failed
POLL_SECONDS = 1.0
GRADIENT = "gradient"  # the names of its parts begin so

Outputs = Mapping[str, NDArray[np.generic]]
Heartbeat = Callable[[], None]


@dataclass(frozen=True)
class Bounds:
    """Of the differences to the CPU. `error`: of hidden states, features, logits and loss, in the Euclidean norm.
    `cosine`: the least one between gradients of the head, or of one block."""

    error: float = 1e-3
    cosine: float = 0.9999


# bfloat16 has 8 bits. Measured: errors of 0.007, cosines of 0.9999 with ViT-B/16. With int8 weights: 0.05, 0.9993 with
# ViT-B/16 and 0.991 with MiniLM.
BOUNDS = {OPENVINO: Bounds(error=0.02, cosine=0.99)}


class Trial(BaseModel):
    """`refused`: why the provider is not used; empty if it may be. `temporary`: it may work at the next start, for
    example because memory was short. `seconds` of its feature pass, prediction and step together."""

    refused: str = ""
    temporary: bool = False
    seconds: float = 0.0


class Choice(BaseModel):
    """The provider in use, and what every other offered provider did."""

    provider: str = CPU
    trials: dict[str, Trial] = {}


class _Conditions(BaseModel):
    """Everything that a choice depends on."""

    asked: str
    bundle: str
    onnxruntime: str
    openvino: str
    offered: tuple[str, ...]
    threads: int


class _StoredChoice(BaseModel):
    """In STATE/provider.json."""

    conditions: _Conditions
    choice: Choice


def offered_providers() -> tuple[str, ...]:
    """Short names of what is installed and computes on this machine, like ("openvino", "cuda", "cpu")."""
    names = [short_name(name) for name in onnxruntime.get_available_providers()]
    others = [OPENVINO] if offers_openvino() and OPENVINO not in names else []
    return tuple(name for name in [*others, *names] if name != REMOTE)


def require_provider(asked: str) -> None:
    """Raises ConfigError if this machine does not offer the provider `asked`. AUTO is always offered."""
    offered = offered_providers()
    if asked in (AUTO, *offered):
        return
    if asked == OPENVINO and openvino_version():
        raise ConfigError(
            f"--provider {asked}: this processor does not multiply in bfloat16, which it is used for; omit --provider"
        )
    missing = f"the installed onnxruntime offers {', '.join(sorted(offered))}"
    remedy = "install the distribution of ONNX Runtime for this device"
    if asked == OPENVINO:
        missing, remedy = "the package openvino is not installed", "pip install 'fedfmsl-edge[openvino]'"
    raise ConfigError(f"--provider {asked}: {missing}; {remedy}, or omit --provider")


def provider_for(
    engine: EngineName,
    asked: str,
    bundle: TaskBundle,
    threads: int,
    store: DeviceStore,
    heartbeat: Heartbeat = lambda: None,
) -> Choice:
    """As `choose_provider`. onnxruntime-training has the CPU's provider only."""
    if engine == "ort-training" and asked not in (AUTO, CPU):
        raise ConfigError(f"--provider {asked}: the engine ort-training has cpu only; add --engine step-graph")
    return choose_provider(CPU if engine == "ort-training" else asked, bundle, threads, store, heartbeat)


def choose_provider(
    asked: str, bundle: TaskBundle, threads: int, store: DeviceStore, heartbeat: Heartbeat = lambda: None
) -> Choice:
    """`asked`: a provider, or AUTO for the fastest. A provider that fails or disagrees is replaced by the CPU.
    `heartbeat` is called every POLL_SECONDS, because a provider may hang for as long as a watchdog waits.

    Raises ConfigError as `require_provider` does.
    """
    require_provider(asked)
    offered = offered_providers()
    candidates = [name for name in (offered if asked == AUTO else (asked,)) if name != CPU]
    if not candidates:
        return Choice()
    path = store.root / "provider.json"
    conditions = _Conditions(
        asked=asked,
        bundle=bundle.sha256,
        onnxruntime=onnxruntime.__version__,
        openvino=openvino_version(),
        offered=offered,
        threads=threads,
    )
    known: dict[str, Trial] = {}
    with contextlib.suppress(OSError, ValidationError):
        stored = _StoredChoice.model_validate_json(path.read_bytes())
        if stored.conditions == conditions:
            known = {name: trial for name, trial in stored.choice.trials.items() if not trial.temporary}
    missing = [name for name in (CPU, *candidates) if name not in known]
    if not missing:
        return fastest(known)
    tried = try_providers(bundle, list(dict.fromkeys([CPU, *missing])), threads, store.root, heartbeat)
    choice = fastest({**known, **tried})
    write_atomically(path, _StoredChoice(conditions=conditions, choice=choice).model_dump_json().encode())
    return choice


def fastest(trials: Mapping[str, Trial]) -> Choice:
    """The fastest provider that agrees with the CPU; the CPU if there is none."""
    usable = {name: trial for name, trial in trials.items() if not trial.refused}
    return Choice(provider=min(usable, key=lambda name: usable[name].seconds, default=CPU), trials=dict(trials))


def try_providers(
    bundle: TaskBundle, providers: list[str], threads: int, folder: Path, heartbeat: Heartbeat = lambda: None
) -> dict[str, Trial]:
    """Tries each provider and compares it with the first one. Writes into a temporary folder in `folder`."""
    trials, reference = dict[str, Trial](), dict[str, NDArray[np.generic]]()
    with tempfile.TemporaryDirectory(dir=folder, prefix=PROBE) as scratch:
        for name in providers:
            path = Path(scratch) / name
            refused = _run_trial(bundle, name, threads, path, heartbeat)
            if not refused and not reference and trials:
                refused = f"{providers[0]} fails, so there is nothing to compare it with"
            if refused:
                trials[name] = Trial(refused=refused, temporary=not any(each in refused for each in UNAVAILABLE))
                continue
            trial, outputs = unpack(path.read_bytes(), Trial)
            reference = reference or outputs
            trials[name] = Trial(
                refused=disagreement(reference, outputs, BOUNDS.get(name, Bounds())), seconds=trial.seconds
            )
    return trials


def _run_trial(bundle: TaskBundle, provider: str, threads: int, out: Path, heartbeat: Heartbeat) -> str:
    """Runs `python -m edge_runtime try-provider`. Returns why it failed, or ""."""
    command = [sys.executable, "-m", "edge_runtime", "try-provider", "--provider", provider]
    command += ["--bundle", str(bundle.root), "--classes", str(len(bundle.classes))]
    command += ["--threads", str(threads), "--out", str(out)]
    errors, deadline = None, time.monotonic() + SECONDS
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        try:
            while errors is None and time.monotonic() < deadline:
                heartbeat()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    errors = process.communicate(timeout=POLL_SECONDS)[1]
        finally:
            process.kill()
    if errors is None:
        return f"it took longer than {SECONDS:.0f} s"
    if process.returncode == 0:
        return ""
    lines = [line for line in errors.splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ") if lines else f"it ended with code {process.returncode}"
    return one_line(f"it fails: {last}")


def disagreement(reference: Outputs, outputs: Outputs, bounds: Bounds) -> str:
    """Why `outputs` are not those of the CPU within the bounds, or ""."""
    for name in reference:
        expected, found = (np.asarray(each[name], np.float64) for each in (reference, outputs))
        if found.shape != expected.shape:
            return f"its {name} has shape {found.shape}, not {expected.shape}"
        if not np.isfinite(found).all():
            return f"its {name} is not finite"
        if name.startswith(GRADIENT):
            if not (similarity := cosine(found, expected)) >= bounds.cosine:
                return f"its {name} has cosine {similarity:.5f} to the CPU's, less than {bounds.cosine}"
        elif not (error := relative_error(found, expected)) <= bounds.error:
            return f"its {name} differs from the CPU's by {error:.2g}, more than {bounds.error}"
    return ""


def cosine(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Between two vectors; 0 if one is zero."""
    norms = np.linalg.norm(found) * np.linalg.norm(expected)
    return float(found @ expected / norms) if norms else 0.0


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """In the Euclidean norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def try_provider(bundle: TaskBundle, provider: str, threads: int) -> tuple[Trial, dict[str, Floats]]:
    """What the provider computes: `hidden` (B, N, D), `feature` (B, F), `logits` (B, C), `loss` (1,) and the gradient
    of each part, because the head's is so large that it hides the others. The seconds of the trial are the least of
    REPEATS turns, after a first one that is not counted.

    Raises BundleError if the provider cannot be started.
    """
    level = min(LEVEL, bundle.manifest.levels)
    rng = np.random.default_rng(0)
    session = open_session(bundle, "features.onnx", threads, provider=provider)
    engine = StepGraphEngine(bundle, threads, provider=provider)
    engine.load(level)
    initial = bundle.initial()[0][: bundle.expert.size(level)]
    engine.set(initial + SPREAD * rng.standard_normal(initial.size, np.float32))  # the head starts at zero
    inputs, labels = random_inputs(bundle, SAMPLES, rng), rng.integers(0, len(bundle.classes), SAMPLES)
    outputs, seconds = dict[str, Floats](), []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        hidden, feature = run(session, [f"hidden_{level}", "pooled"], inputs)
        logits = engine.predict(hidden)
        loss, gradient = engine.gradient(Batch.cross_entropy(hidden, labels, len(bundle.classes)))
        seconds.append(time.perf_counter() - started)
        outputs = {"hidden": hidden, "feature": feature, "logits": logits, "loss": np.array([loss], np.float32)}
        parts = bundle.expert.parts_of(level)
        outputs |= {f"{GRADIENT} of {_part_name(part)}": gradient[at] for part, at in parts.items()}
    return Trial(seconds=min(seconds[1:])), outputs


def _part_name(part: str) -> str:
    return f"the {part}" if part == HEAD else f"block {part}"


def random_inputs(bundle: TaskBundle, samples: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """The input of the graph of features for random images or texts."""
    preprocessing = bundle.manifest.preprocessing
    if isinstance(preprocessing, ImagePreprocessing):
        shape = (samples, preprocessing.size, preprocessing.size, 3)
        return {"pixels": rng.integers(0, 256, shape, np.uint8)}
    tokens = rng.integers(0, TOKENS, (samples, preprocessing.max_tokens))
    return {"tokens": np.where(tokens == preprocessing.pad_id, preprocessing.pad_id + 1, tokens).astype(np.int64)}


def describe_choice(choice: Choice) -> str:
    """One line, like "cuda, 12.3 times as fast as cpu; tensorrt is not used: it fails: …"."""
    trials, used = choice.trials, choice.provider
    ratio = f", {trials[CPU].seconds / trials[used].seconds:.1f} times as fast as {CPU}" if used != CPU else ""
    refused = [f"{name} is not used: {trial.refused}" for name, trial in trials.items() if trial.refused]
    slower = [f"{name} is slower" for name, trial in trials.items() if name not in (used, CPU) and not trial.refused]
    return "; ".join([f"{used}{ratio}", *refused, *slower])
