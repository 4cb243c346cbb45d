"""`start --from`: reads what a new run goes on from, an earlier run or a PEFT adapter of the same backbone."""

from __future__ import annotations

from pathlib import Path

from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.class_names import describe_classes
from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.config import RunConfig
from trainer_server.coordinator.privacy_budget import NoisedRounds, spent_mu_squared
from trainer_server.coordinator.warm_start import WarmStart, warm_start
from trainer_server.storage.adapter_reader import read_adapter
from trainer_server.storage.peft_adapter import ADAPTER_CONFIG
from trainer_server.storage.run_store import DATABASE, RunStore
from trainer_server.storage.start_record import Start


def read_start(source: Path, bundle: TaskBundle, config: RunConfig) -> Start:
    """The start of a new run of `bundle` from the folder `source`.

    Raises ConfigError if it is neither a run nor an adapter, if it is of another backbone, has no class of the new run,
    or is at a higher level than the new run may reach. Raises RunError if the run there cannot be read.
    """
    if (source / DATABASE).is_file():
        start = _of_run(source, bundle, config)
    elif (source / ADAPTER_CONFIG).is_file():
        adapter = read_adapter(source, bundle)
        warm = warm_start(bundle, adapter.classes, adapter.expert, adapter.level)
        start = _start(source, bundle, adapter.classes, warm)
    else:
        raise ConfigError(
            f"--from {source} is neither the folder of a run ({DATABASE}) nor a PEFT adapter ({ADAPTER_CONFIG}); give "
            "one of them"
        )
    if start.origin.level > config.stage1_sal.max_level:
        raise ConfigError(
            f"--from {source} is at level {start.origin.level}, above --max-level {config.stage1_sal.max_level}; raise "
            "it to that level"
        )
    return start


def _of_run(source: Path, bundle: TaskBundle, config: RunConfig) -> Start:
    store = RunStore(source)
    try:
        if store.origin.sha256 != bundle.sha256:
            raise ConfigError(
                f"--from {source} was run with another bundle (SHA-256 {store.origin.sha256[:12]}…) than "
                f"{bundle.root} ({bundle.sha256[:12]}…); pass its --bundle, or, for another bundle of the same base, "
                "the folder global_expert in it"
            )
        stored, classes = store.state(), store.task().classes
        if stored is None or not stored[0].expert[: bundle.manifest.dims.feature * len(classes)].any():
            raise RunError(f"--from {source} has no global expert yet: no round of stage 1 is closed; try again later")
        state = stored[0]
        expert = state.trained if config.replaces_head else state.expert
        warm = warm_start(bundle, classes, expert, state.sal.level, state.gate)
        announced = state.announced
        return _start(
            source,
            bundle,
            classes,
            warm,
            run=store.origin.config.run,
            session=store.origin.session,
            round=max((record.round for record, _ in store.rounds.summaries()), default=0),
            mu_squared=_spent(store, announced is not None and bool(store.pending_updates())),
        )
    finally:
        store.close()


def _spent(store: RunStore, is_answered: bool) -> dict[str, float] | None:
    """The sums of μ² by observer of a run and those before it; None if there are updates without noise."""
    origin, checkpoint = store.origin, store.checkpoint()
    if origin.config.privacy is None or (origin.start is not None and origin.start.mu_squared is None):
        return None
    closed = NoisedRounds.of(store.rounds.counts(), origin.spent_before)
    return spent_mu_squared(origin.config, closed, checkpoint[0].announced if checkpoint else None, is_answered)


def _start(source: Path, bundle: TaskBundle, classes: tuple[str, ...], warm: WarmStart, **facts: object) -> Start:
    if not warm.kept.any():
        raise ConfigError(
            f"--from {source} has the classes {describe_classes(classes)}, none of which this run has "
            f"({describe_classes(bundle.classes)}); check the names"
        )
    added = tuple(name for name in bundle.classes if name not in classes)
    removed = tuple(name for name in classes if name not in bundle.classes)
    return Start.of(warm, source=str(source.absolute()), added=added, removed=removed, **facts)
