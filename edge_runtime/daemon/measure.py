"""Which provider a device computes with, and what fits into its memory and time with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_runtime.engines.sessions import CPU
from edge_runtime.resources.plan import Plan, make_plan
from edge_runtime.resources.provider_trial import Trial
from edge_runtime.resources.providers import Choice, fastest, provider_for
from edge_runtime.resources.unfinished import UnfinishedWork
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.messages import EngineName
from fedfmsl.protocol.task_bundle import TaskBundle


def measure(
    settings: Settings,
    store: DeviceStore,
    engine: EngineName,
    bundle: TaskBundle,
    largest: tuple[int, Path],
    heartbeat: Callable[[], None],
) -> tuple[Choice, Plan]:
    """A provider that level 1 does not fit with, or that cannot be measured, is replaced by the next one. `largest` and
    `heartbeat`: as of `make_plan`. Raises ConfigError and RunError as `make_plan` does with the CPU."""
    threads = settings.thread_count
    choice = provider_for(engine, settings.provider, bundle, threads, store, heartbeat)
    while True:
        provider, memory, step_seconds = choice.provider, settings.memory, settings.step_seconds
        try:
            with UnfinishedWork(store.root).counted(provider):
                plan = make_plan(bundle, store, engine, threads, provider, largest, memory, step_seconds, heartbeat)
        except (ConfigError, RunError) as error:
            if provider == CPU:
                raise
            choice = fastest({**choice.trials, provider: Trial(refused=str(error))})
        else:
            return choice, plan
