"""Begins the next session of a run in the run's folder (see `trainer_server.coordinator.sessions`)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.coordinator.events import BeginSession
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.sessions import first_state
from trainer_server.coordinator.state import Plan, State
from trainer_server.coordinator.warm_start import warm_start
from trainer_server.storage.run_store import RunStore
from trainer_server.storage.start_record import Start


def begin_session(
    store: RunStore,
    plan: Plan,
    state: State,
    begins: BeginSession,
    at: float,
    closed: Sequence[ClosedRound] = (),
    refusals: Mapping[tuple[str, str], tuple[int, str]] | None = None,
) -> None:
    """`plan` and `state`: of the session that ends. `closed` and `refusals`: what it has not stored yet.

    Raises OSError or sqlite3.Error if the folder cannot be written; the session goes on then.
    """
    before, task = plan.bundle, plan.bundle.task
    bundle = TaskBundle(before, task.with_classes(begins.classes) if begins.classes else task)
    former = store.origin
    origin = former.model_copy(
        update={
            "session": secrets.token_hex(8),
            "task": bundle.task.sha256,
            "start": None,
            "stage1_rounds": begins.stage1_rounds,
            "before": former.first,
        }
    )
    warm, start = None, None
    if state.expert[: before.expert.size(0)].any():  # else no round has made a head yet
        warm = warm_start(bundle, before.classes, state.trained, state.sal.level, state.gate)
        start = Start.of(
            warm,
            source="",
            run=former.config.run,
            session=former.session,
            round=state.round,
            added=begins.classes,
            removed=(),
            mu_squared=former.start.mu_squared if former.start else {},
        )
        origin = origin.model_copy(update={"start": start.origin})
    following = replace(plan, config=origin.session_config, bundle=bundle, session=origin.session, warm=warm)
    store.begin_session(origin, bundle.task, start, first_state(following, state, begins, at), at, closed, refusals)
