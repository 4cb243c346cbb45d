"""Applies the updates of a closed round to the state.

They are read one by one in the order of their keys, so the result is bit-identical for every order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.aggregation import Aggregate, Contribution
from fedfmsl.algorithms.agreement import agreeing
from fedfmsl.algorithms.arrays import Doubles, Tensors, Vector
from fedfmsl.algorithms.bounds import NORM_ROUNDS, SUMS_CAP, capped_weights, norm_limit
from fedfmsl.algorithms.class_means import class_mean_head, direction_head
from fedfmsl.algorithms.discriminant import discriminant_head, logit_head, with_former_rows
from fedfmsl.algorithms.steps import Values
from fedfmsl.algorithms.weighted_sums import weighted_mean
from fedfmsl.errors import MessageError
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import Round, Stage, Sums, Update
from trainer_server.config import Head, Rule
from trainer_server.coordinator.former_head import FormerHead, reported
from trainer_server.coordinator.records import listed
from trainer_server.coordinator.secure_sums import apply_updates, update_parts
from trainer_server.coordinator.state import NO_SUMS, TRAINING, Accepted, Part, Plan, State
from trainer_server.coordinator.validation import class_statistics, expert_delta, gate_delta, head_statistics

ROUNDING = 1e-6  # of an accuracy from fixed-point numbers
NAMED = 1.5  # times the limit of the norm, from which the log names a device
OFTEN, LEAST_ROUNDS = 3, 2  # left out of a third of the rounds of stage 1, and at least of two


def apply_round(plan: Plan, state: State, closing: Round) -> State:
    """The state after `state.updates` have been applied.

    Raises SecureAggregationError or MessageError if they are of secure aggregation, and cannot be used.
    """
    part = plan.schedule[state.position].part
    if part is not None:
        sums = apply_updates(plan, state, closing)
        if sums.total is None:
            return sums.state
        apply = _secure_updates if part[0] in TRAINING else _secure_sums
        return apply(plan, sums.state, part, sums.total)
    if closing.stage not in APPLY:
        return state
    norms = _recent_norms(state, closing)
    return replace(APPLY[closing.stage](plan, state, closing), norms=norms)


def update_limit(plan: Plan, state: State) -> float:
    """The L2 norm above which an update of the present training round is scaled down. Infinite under privacy, whose
    devices clip their updates and add noise."""
    factor = plan.config.aggregation.norm_factor
    if plan.config.privacy is not None or factor is None:
        return math.inf
    return norm_limit([accepted.norm for accepted in state.updates.values()], state.norms, factor)


def scaled_down(plan: Plan, state: State) -> str:
    """Names the devices whose updates are much larger than the others and are scaled down; "" if there are none. It
    names none if most updates of the round are so large, because that is not a fault of single devices."""
    limit = update_limit(plan, state)
    large = [f"{each.update.device} ({each.norm:.4g})" for each in state.in_order if each.norm > NAMED * limit]
    if not large:
        return ""
    if 2 * len(large) > len(state.updates):
        return f"round {state.round}: most updates are larger than those of earlier rounds, and are scaled down"
    return (
        f"round {state.round}: updates with a norm far above the median were scaled down to {limit:.4g}: "
        f"{listed(large)}; if this repeats, check these devices"
    )


def suspects(plan: Plan, state: State) -> frozenset[str]:
    """The devices that are not asked for the sums of the head round, because their updates did not enter many rounds of
    stage 1: no rule can leave single sums out."""
    least = max(plan.config.stage1_rounds / OFTEN, LEAST_ROUNDS)
    return frozenset(device for device, rounds in state.left_out.items() if rounds >= least)


def _outliers(plan: Plan, state: State) -> dict[str, float]:
    """The agreements of the devices whose updates do not enter the average of the round."""
    answered = state.answered
    found = {name: each for name, each in sorted(state.agreements.items()) if name in answered}
    if plan.config.aggregation.rule is not Rule.SCREENED_MEAN:
        return {}
    kept = agreeing([*found.values()])
    return {name: each for (name, each), agrees in zip(found.items(), kept, strict=True) if not agrees}


def left_out(plan: Plan, state: State, applied: State) -> str:
    """Names the devices whose updates did not enter the average of the round; "" if there are none."""
    found = [applied.agreements[device] for device in sorted(state.answered & applied.agreements.keys())]
    low = [f"{name} ({each:.2f})" for name, each in _outliers(plan, applied).items()]
    return (
        f"round {state.round}: updates that point away from the others were left out, with an agreement of "
        f"{median(found):.2f} in the median: {listed(low)}; if this repeats, check these devices and their labels"
        if low
        else ""
    )


def _recent_norms(state: State, closing: Round) -> tuple[float, ...]:
    """`State.norms` after this round: empty at the end of a stage, because another one trains other tensors."""
    if closing.stage not in TRAINING or closing.index + 1 == closing.of:
        return ()
    return (*state.norms, median(accepted.norm for accepted in state.updates.values()))[-NORM_ROUNDS:]


def without_sums(plan: Plan, state: State, stage: Stage) -> State:
    """The state if the secure sums of a stage have failed. Stage 1 then starts from the bundle's own head."""
    state = replace(state, secure=NO_SUMS)
    if stage is not Stage.STATISTICS:
        return state
    dims, zero_shot = plan.bundle.manifest.dims, plan.bundle.task.zero_shot
    head = np.zeros(plan.bundle.expert.size(0), np.float32)
    if zero_shot is not None:
        norm = dims.feature**0.5  # of a normalized feature, about
        head = direction_head(zero_shot.rows, zero_shot.scale, np.ones(1, np.float32), norm)
    return _starting_from(plan, state, head)


def _secure_updates(plan: Plan, state: State, part: Part, total: Doubles) -> State:
    """The state after the sum of the weighted updates of a round. Raises MessageError if it cannot be their sum."""
    stage, index = part
    assert state.announced is not None
    combined, accuracy = weighted_mean(total, update_parts(plan, stage, state.announced.level))
    norm = float(np.linalg.norm(combined.delta))
    if not combined.trained or not norm <= plan.config.max_norm or not 0 <= accuracy <= 1 + ROUNDING:
        raise MessageError(f"the mean of the updates has the norm {norm:.4g} and the accuracy {accuracy:.4g}")
    if stage is Stage.PERSONAL:
        return _with_gate(plan, state, combined)
    padded = np.zeros(state.expert.size)
    padded[: combined.delta.size] = combined.delta
    return _with_expert(plan, state, Aggregate(padded, combined.trained), index, accuracy)


def _secure_sums(plan: Plan, state: State, part: Part, total: Doubles) -> State:
    """The state after secure sums (P,). Raises MessageError if no features have them."""
    first = part[0] is Stage.STATISTICS
    layout = plan.statistics if first else plan.head_statistics
    tensors = layout.split(np.asarray(total, np.float32))
    samples = round(float(tensors["class_counts"].sum()))
    if first:
        return _with_first_head(plan, state, class_statistics(plan, samples, tensors))
    return _with_final_head(plan, state, head_statistics(plan, samples, tensors))


def _statistics(plan: Plan, state: State, closing: Round) -> State:
    return _with_first_head(plan, state, _total(plan, state, plan.statistics, class_statistics))


def _total(plan: Plan, state: State, layout: Layout, read: Callable[[Plan, int, Tensors], Vector]) -> Doubles:
    """The sums of all updates, flat. Sums of more samples than the median device has are scaled down to as many: a
    device cannot outweigh the others by claiming samples."""
    in_order, total = state.in_order, np.zeros(layout.total)
    samples = [float(accepted.update.samples) for accepted in in_order]
    is_bounded = plan.config.privacy is None and plan.config.aggregation.weight_cap is not None
    kept = capped_weights(samples, SUMS_CAP) if is_bounded else samples
    for accepted, own, capped in zip(in_order, samples, kept, strict=True):
        sums = read(plan, accepted.update.samples, plan.read(accepted.sha256))
        total += sums * (capped / own) if capped < own else sums
    return total


def _with_first_head(plan: Plan, state: State, total: NDArray[np.floating[Any]]) -> State:
    return _starting_from(plan, state, _first_head(plan, plan.statistics.split(np.asarray(total, np.float32))))


def _starting_from(plan: Plan, state: State, head: Vector) -> State:
    """The state with this first head; in a warm start only its rows of new classes count."""
    expert, level = state.expert.copy(), 1
    if plan.warm:
        head, level = plan.warm.with_new_rows(state.expert[: head.size], head), state.sal.level
    expert[: head.size] = head
    return replace(state, expert=expert, start=expert[: plan.bundle.expert.size(level)])


def _first_head(plan: Plan, sums: Mapping[str, Vector]) -> Vector:
    """The flat head that stage 1 starts from, computed from the sums of all devices."""
    counts, norm_sum = sums["class_counts"], float(sums["norm_sum"][0])
    if plan.config.head is Head.CLASS_MEANS:
        return class_mean_head(sums["class_sums"], counts, norm_sum)
    zero_shot = plan.bundle.task.zero_shot
    assert zero_shot is not None  # checked when the run was started
    return direction_head(zero_shot.rows, zero_shot.scale, counts, norm_sum)


def _expert(plan: Plan, state: State, closing: Round) -> State:
    combined = _combined(plan, state, plan.bundle.expert, expert_delta)
    state = _screened(plan, state, combined)
    return _with_expert(plan, state, combined, closing.index, _held_out(state))


def _with_expert(plan: Plan, state: State, combined: Aggregate, index: int, accuracy: float) -> State:
    """The state after round `index` of stage 1."""
    expert, moments = plan.config.aggregation.server_optimizer.step(state.expert, combined, state.expert_moments)
    # after the last round no device would train a newly activated block
    last = index + 1 == plan.config.stage1_rounds or state.former.rejected
    sal = state.sal if last else plan.config.stage1_sal.observe(state.sal, accuracy)
    is_cold = not (plan.warm and plan.warm.kept.any()) and not state.former.rejected
    first = plan.config.head is Head.ZEROS and index == 0 and is_cold
    start = expert[: plan.bundle.expert.size(1)] if first else state.start
    former = replace(state.former, nlls=reported(newest_updates(state)))
    return replace(state, expert=expert, start=start, expert_moments=moments, sal=sal, former=former)


def _head(plan: Plan, state: State, closing: Round) -> State:
    return _with_final_head(plan, state, _total(plan, state, plan.head_statistics, head_statistics))


def _with_final_head(plan: Plan, state: State, total: NDArray[np.floating[Any]]) -> State:
    """The head in closed form, from the logits or features of all samples under the trained LoRA."""
    tensors = plan.head_statistics.split(np.asarray(total, np.float32))
    sums, counts, moments = (tensors[name] for name in ("class_sums", "class_counts", "second_moments"))
    expert, former = state.expert.copy(), state.expert[: plan.bundle.expert.size(0)]
    logits = plan.config.head_sums is Sums.LOGITS
    head = logit_head(former, sums, counts, moments) if logits else discriminant_head(sums, counts, moments)
    expert[: head.size] = with_former_rows(head, former, counts)
    if np.array_equal(expert, state.expert):
        return state
    return replace(state, expert=expert, former=replace(state.former, head=former, made=state.made))


def with_former_head(state: State) -> State:
    """The state with the head of stage 1 in place of the one of the sums."""
    expert = state.expert.copy()
    expert[: state.former.head.size] = state.former.head
    return replace(state, expert=expert, made=state.former.made, former=FormerHead(rejected=True))


def _gate(plan: Plan, state: State, closing: Round) -> State:
    combined = _combined(plan, state, plan.bundle.gate, gate_delta)
    return _with_gate(plan, _screened(plan, state, combined), combined)


def _with_gate(plan: Plan, state: State, combined: Aggregate) -> State:
    gate, moments = plan.config.aggregation.server_optimizer.step(state.gate, combined, state.gate_moments)
    return replace(state, gate=gate, gate_moments=moments)


def _held_out(state: State) -> float:
    """The median of the devices' held-out accuracies. Unweighted, so a false one moves it to a neighbouring accuracy at
    most. 0 under privacy, where devices report none."""
    metrics = [accepted.update.metrics for accepted in state.in_order]
    accuracies = [each["held_out_global"] for each in metrics if "held_out_global" in each]
    return median(accuracies) if accuracies else 0.0


def _combined(plan: Plan, state: State, layout: Layout, delta: Callable[[Plan, Update, Tensors], Values]) -> Aggregate:
    """The aggregated update of the round.

    Updates above `update_limit` are scaled down to it, and weights are capped. An update that is s rounds late has
    1/√(1 + s) of its weight (FedBuff, Nguyen et al., AISTATS 2022). Under privacy all updates have the same weight,
    else clipping would not bound a device's influence, and a part with fewer contributions than `Privacy.shares` is not
    released, because it has too little noise.
    """

    privacy, aggregation, in_order = plan.config.privacy, plan.config.aggregation, state.in_order

    def read(accepted: Accepted) -> Values:
        return delta(plan, accepted.update, plan.read(accepted.sha256))

    weights = [float(1 if privacy else accepted.update.samples) for accepted in in_order]
    if aggregation.weight_cap is not None:
        weights = capped_weights(weights, aggregation.weight_cap)
    contributions = []
    for accepted, weight in zip(in_order, weights, strict=True):
        update = accepted.update
        late = state.round - update.round
        size = layout.size(update.level) if update.stage is Stage.GLOBAL else layout.total
        former = state.agreements.get(update.device) if state.announced and state.announced.index else None
        discounted = weight / (1 + late) ** 0.5
        contributions.append(
            Contribution(discounted, size, partial(read, accepted), former, update.device, accepted.norm)
        )
    least = privacy.shares if privacy else 1
    rule = aggregation.aggregation_rule.clipped(update_limit(plan, state))
    return rule.aggregate(contributions, layout.parts, least, plan.scratch)


def _screened(plan: Plan, state: State, combined: Aggregate) -> State:
    """The state with the agreements after a round: of the first round of a stage only its own."""
    assert state.announced is not None
    former, counts = (state.agreements, state.left_out) if state.announced.index else ({}, {})
    devices = [accepted.update.device for accepted in state.in_order]
    found = zip(devices, combined.agreements or [None] * len(devices), strict=True)
    state = replace(state, agreements={**former, **{device: each for device, each in found if each is not None}})
    return replace(state, left_out={**counts, **{name: counts.get(name, 0) + 1 for name in _outliers(plan, state)}})


def newest_updates(state: State) -> dict[str, Update]:
    """By device: with `--max-staleness` a round may have several updates of one device."""
    return {accepted.update.device: accepted.update for accepted in state.in_order}


APPLY: dict[Stage, Callable[[Plan, State, Round], State]] = {
    Stage.STATISTICS: _statistics,
    Stage.GLOBAL: _expert,
    Stage.HEAD: _head,
    Stage.PERSONAL: _gate,
}
