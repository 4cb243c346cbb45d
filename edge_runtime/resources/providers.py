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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from edge_runtime.engines.openvino import OPENVINO, offers_openvino, openvino_version
from edge_runtime.engines.runtime import onnxruntime
from edge_runtime.engines.sessions import CPU, IN_FP16, ON_PROCESSOR, UNAVAILABLE, short_name
from edge_runtime.resources.provider_trial import Trial, bounds_of, disagreement
from edge_runtime.resources.unfinished import UnfinishedWork
from edge_runtime.store import DeviceStore
from edge_runtime.store.device_store import PROBE
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError, RunError, one_line
from fedfmsl.protocol.messages import EngineName
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import unpack

AUTO = "auto"
REMOTE = "azure"  # a provider that sends inputs to another machine
SECONDS = 600.0  # after which a provider counts as failed
POLL_SECONDS = 1.0
TOO_LONG = "it took longer than"
LASTING = (*UNAVAILABLE, TOO_LONG)  # in reasons that the next start would find again; a hang would cost it SECONDS

Heartbeat = Callable[[], None]
Result = TypeVar("Result")


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


def in_float16(offered: Sequence[str]) -> tuple[str, ...]:
    """The same providers with the graphs in float16, without those on the processor, which has no products in it."""
    return tuple(f"{name}{IN_FP16}" for name in offered if name not in ON_PROCESSOR)


def require_provider(asked: str) -> None:
    """Raises ConfigError if this machine does not offer the provider `asked`. AUTO is always offered."""
    offered = offered_providers()
    if asked in (AUTO, *offered, *in_float16(offered)):
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

    Raises ConfigError as `require_provider` does, and if `asked` needs graphs that the bundle does not have.
    """
    require_provider(asked)
    if asked.endswith(IN_FP16) and not bundle.has_fp16:
        raise ConfigError(
            f"--provider {asked}: bundle {bundle.root} has no graphs for float16; build it with python -m export.build "
            "… --fp16, or omit --provider"
        )
    offered = offered_providers()
    variants = in_float16(offered) if bundle.has_fp16 else ()
    candidates = [name for name in ((*variants, *offered) if asked == AUTO else (asked,)) if name != CPU]
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
    unfinished, known = UnfinishedWork(store.root), dict[str, Trial]()
    stored = None
    with contextlib.suppress(OSError, ValidationError):
        stored = _StoredChoice.model_validate_json(path.read_bytes())
    if stored is not None and stored.conditions == conditions:
        known = {name: trial for name, trial in stored.choice.trials.items() if not trial.temporary}
    else:
        unfinished.forget()
        # durable, as the counts are: a driver that takes the machine down must find the same conditions again
        begun = _StoredChoice(conditions=conditions, choice=Choice())
        write_atomically(path, begun.model_dump_json().encode(), durable=True)
    known |= {name: Trial(refused=reason) for name in candidates if (reason := unfinished.refusal(name))}
    missing = [name for name in (CPU, *candidates) if name not in known]
    if not missing:
        return fastest(known)
    tried = try_providers(bundle, list(dict.fromkeys([CPU, *missing])), threads, store.root, heartbeat)
    choice = fastest({**known, **tried})
    write_atomically(path, _StoredChoice(conditions=conditions, choice=choice).model_dump_json().encode(), durable=True)
    return choice


def fastest(trials: Mapping[str, Trial]) -> Choice:
    """The fastest provider that agrees with the CPU; the CPU if there is none."""
    usable = {name: trial for name, trial in trials.items() if not trial.refused}
    return Choice(provider=min(usable, key=lambda name: usable[name].seconds, default=CPU), trials=dict(trials))


def first_that_fits(choice: Choice, measure: Callable[[str], Result]) -> tuple[Choice, Result]:
    """`measure` of the chosen provider. One that level 1 does not fit with, or that cannot be measured, is replaced by
    the next fastest. Raises ConfigError and RunError as `measure` does of the CPU."""
    while True:
        try:
            return choice, measure(choice.provider)
        except (ConfigError, RunError) as error:
            if choice.provider == CPU:
                raise
            choice = fastest({**choice.trials, choice.provider: Trial(refused=str(error))})


def try_providers(
    bundle: TaskBundle, providers: list[str], threads: int, folder: Path, heartbeat: Heartbeat = lambda: None
) -> dict[str, Trial]:
    """Tries each provider and compares it with the first one. Writes into a temporary folder in `folder`."""
    trials, reference = dict[str, Trial](), dict[str, NDArray[np.generic]]()
    with tempfile.TemporaryDirectory(dir=folder, prefix=PROBE) as scratch:
        for name in providers:
            path = Path(scratch) / name
            with UnfinishedWork(folder).counted(name):
                refused = _run_trial(bundle, name, threads, path, heartbeat)
            if not refused and not reference and trials:
                refused = f"{providers[0]} fails, so there is nothing to compare it with"
            if refused:
                trials[name] = Trial(refused=refused, temporary=not any(each in refused for each in LASTING))
                continue
            trial, outputs = unpack(path.read_bytes(), Trial)
            reference = reference or outputs
            trials[name] = Trial(refused=disagreement(reference, outputs, bounds_of(name)), seconds=trial.seconds)
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
        return f"{TOO_LONG} {SECONDS:.0f} s"
    if process.returncode == 0:
        return ""
    lines = [line for line in errors.splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ") if lines else f"it ended with code {process.returncode}"
    return one_line(f"it fails: {last}")


def describe_choice(choice: Choice) -> str:
    """One line, like "cuda, 12.3 times as fast as cpu; tensorrt is not used: it fails: …"."""
    trials, used = choice.trials, choice.provider
    ratio = f", {trials[CPU].seconds / trials[used].seconds:.1f} times as fast as {CPU}" if used != CPU else ""
    refused = [f"{name} is not used: {trial.refused}" for name, trial in trials.items() if trial.refused]
    slower = [f"{name} is slower" for name, trial in trials.items() if name not in (used, CPU) and not trial.refused]
    return "; ".join([f"{used}{ratio}", *refused, *slower])
