"""Which provider a device computes with, and what fits into its memory and time with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_runtime.resources.plan import Plan, make_plan
from edge_runtime.resources.providers import Choice, first_that_fits, provider_for
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
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
    """The fastest provider that a round fits with. `largest` and `heartbeat`: as of `make_plan`. Raises ConfigError and
    RunError as `make_plan` does of the CPU."""
    threads, memory, step_seconds = settings.thread_count, settings.memory, settings.step_seconds

    def plan(provider: str) -> Plan:
        return make_plan(bundle, store, engine, threads, provider, largest, memory, step_seconds, heartbeat)

    return first_that_fits(provider_for(engine, settings.provider, bundle, threads, store, heartbeat), plan)
