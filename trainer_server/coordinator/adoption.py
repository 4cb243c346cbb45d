"""The candidate of a run: what each round does with it. The decision is in `trainer_server.coordinator.candidates`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from fedfmsl.algorithms.server_optimizers import Moments
from fedfmsl.protocol.messages import Round, Stage
from trainer_server.config import MIN_REPORTS, RunConfig
from trainer_server.coordinator.candidates import LastGood, likelihoods, why_rejected
from trainer_server.coordinator.former_head import FormerHead
from trainer_server.coordinator.limits import devices_in_share
from trainer_server.coordinator.state import Plan, State

JUDGING = (Stage.GLOBAL, Stage.CANARY, Stage.PERSONAL)  # stages whose devices measure the global expert


def rejection(plan: Plan, state: State, closing: Round) -> str:
    """Why the global expert that the closing round has measured is rejected, or ""."""
    if not _is_judging(plan.config, closing) or state.made == state.good.round:
        return ""
    reason = why_rejected(state.good.nlls, _reports(state), plan.config.max_loss, plan.config.max_regressed)
    if not reason:
        return ""
    last_good = f"of round {state.good.round}" if state.good.round else "that the run started with"
    return f"the candidate of round {state.made} is rejected: {reason}; the global expert {last_good} comes back"


def with_last_good(state: State) -> State:
    """The state with the last good global expert in place of the candidate. SAL's level stays: no round has trained the
    blocks above that of the last good one, so they change nothing. The server optimizer starts without momentum."""
    good, moments = state.good, Moments.zeros(state.expert.size)
    former = FormerHead(rejected=state.former.rejected or state.former.head.size > 0)
    return replace(state, expert=good.expert, made=good.round, expert_moments=moments, former=former)


def with_verdict(plan: Plan, state: State, closing: Round) -> State:
    """The state after a round that has not rejected its global expert. In a canary round only some devices have
    measured it, so it remains a candidate."""
    head = state.expert[: plan.bundle.expert.size(0)]
    if not _is_judging(plan.config, closing) or closing.stage is Stage.CANARY or not head.any():
        return state
    found = {name: nll for name, nll in _reports(state).items() if math.isfinite(nll)}
    return replace(state, good=LastGood(state.expert, state.made, {**state.good.nlls, **found}))


def canaries(plan: Plan, state: State, able: Collection[str], round_: int) -> frozenset[str]:
    """The devices, out of the able ones, that measure the candidate first: drawn anew for each round. None if fewer
    than MIN_REPORTS have measured the last good global expert."""
    assert plan.config.canary is not None
    known = sorted(name for name in able if name in state.good.nlls)
    count = max(asked(plan.config.canary, len(able)), MIN_REPORTS)
    drawn = np.random.default_rng([plan.config.seed, round_]).permutation(known)[:count]
    return frozenset(map(str, drawn)) if len(drawn) >= MIN_REPORTS else frozenset()


def asked(canary: str, devices: int) -> int:
    """The number of devices that `--canary` means, of so many."""
    return devices_in_share(float(canary[:-1]) / 100, devices) if canary.endswith("%") else int(canary)


def _is_judging(config: RunConfig, closing: Round) -> bool:
    """Whether the updates of a round say how good its global expert is, and it may still be a candidate. Under secure
    aggregation and with noise devices report no likelihoods, so a report is a hostile device's."""
    first = closing.stage is not Stage.PERSONAL or closing.index == 0
    return closing.stage in JUDGING and first and not closing.secure and config.privacy is None


def _reports(state: State) -> dict[str, float]:
    return likelihoods({key: accepted.update for key, accepted in state.updates.items()}, state.round)
