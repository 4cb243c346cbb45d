"""What a resumed run may change, and what it keeps as it was started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedfmsl.algorithms.sal import CapabilityQueue
from fedfmsl.common.settings import flag_of, load_toml
from fedfmsl.errors import ConfigError
from trainer_server.config import RunConfig, RunRules
from trainer_server.coordinator.limits import Limits
from trainer_server.storage.run_status import limits_in_force
from trainer_server.storage.run_store import RunStore

CHANGEABLE = ", ".join(map(flag_of, Limits.model_fields))


def require_unchanged(config: RunConfig, file: Path | None) -> None:
    """Raises ConfigError if a TOML file of settings has another value than the run for a setting that cannot change."""
    stored = stored_settings(config)
    for key, value in load_toml(file)[1].items() if file else ():
        if key in stored and key not in Limits.model_fields and value != stored[key]:
            raise ConfigError(
                f"{file}: {key} = {value!r}, but the run was started with {_text(stored[key])}, which cannot change; "
                f"a resumed run may change {CHANGEABLE}"
            )


def differing_settings(stored: RunConfig, given: RunConfig) -> tuple[str, str]:
    """The settings in which a run's configuration differs from a given one, like "--epochs 1, not 2"; and the options
    with which `resume` changes those that may change, like " --enough 0.5"."""
    before, now = stored_settings(stored), stored_settings(given)
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not keys:  # a constant that no setting has, of another version
        keys = [key for key, value in given if getattr(stored, key) != value]
        before, now = dict(stored), dict(given)
    texts = [f"{flag_of(key)} {_text(before.get(key))}, not {_text(now.get(key))}" for key in keys]
    changeable = [key for key in keys if key in Limits.model_fields and now.get(key) is not None]
    return "; ".join(texts), "".join(f" {flag_of(key)} {_text(now[key])}" for key in changeable)


def in_force(started: RunConfig, limits: Limits) -> RunConfig:
    """The configuration that a run was started with, with these limits, which may have changed since."""
    before = dict(Limits.of(started))
    return started.model_copy(update={key: value for key, value in limits if value != before[key]})


def without_ignored(started: RunConfig, now: RunConfig, given: RunConfig) -> tuple[RunConfig, str]:
    """The configuration that `start` gives, with the changed limits of `now` in place of those that the run was
    `started` with; and a warning about these, or "". So the command of a service starts a run again whose limits have
    changed."""
    before, after, wanted = map(stored_settings, (started, now, given))
    keys = [key for key in Limits.model_fields if before[key] != after[key] and wanted[key] == before[key]]
    texts = [f"{flag_of(key)} {_text(wanted[key])} is ignored, {_text(after[key])} is in force" for key in keys]
    warning = f"{'; '.join(texts)}, because it was changed after the start of the run" if keys else ""
    return given.model_copy(update={key: after[key] for key in keys}), warning


def refuse_changes(store: RunStore, changes: Mapping[str, Any]) -> None:
    """Raises ConfigError if a run that has ended would get other limits."""
    if store.ended is None:
        return
    limits = dict(limits_in_force(store))
    if changed := [f"{flag_of(key)} {_text(value)}" for key, value in changes.items() if value != limits[key]]:
        raise ConfigError(
            f"{', '.join(changed)} cannot change: the run at {store.folder} has ended ({store.ended}); leave them "
            f"out, or start a new run with --from {store.folder}"
        )


def stored_settings(config: RunConfig) -> Mapping[str, Any]:
    """The values of the settings of `start`, by key. `sal_min_gain` only if SAL has a capability queue."""
    aggregation, privacy, trigger = config.aggregation, config.privacy, config.stage1_sal.trigger
    found = {key: getattr(config, key) for key in RunRules.model_fields}
    found |= {
        "epochs": config.stage1.epochs,
        "batch_size": config.stage1.batch_size,
        "learning_rate": config.stage1.learning_rate,
        "local_learning_rate": config.stage2.learning_rate,
        "sal": trigger.kind,
        "max_level": config.stage1_sal.max_level,
        "rule": aggregation.rule,
        "trim": aggregation.trim,
        "clip": aggregation.clip,
        "server_optimizer": aggregation.optimizer,
        "server_learning_rate": aggregation.learning_rate,
        "dp_noise": privacy.noise_multiplier if privacy else None,
        "dp_clip": privacy.clip if privacy else None,
    }
    return found | ({"sal_min_gain": trigger.min_gain} if isinstance(trigger, CapabilityQueue) else {})


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return repr(",".join(map(str, value)))
    return "none" if value is None else repr(getattr(value, "value", value))
