"""Decides whether an update is accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Doubles, Tensors, Vector
from fedfmsl.algorithms.discriminant import within_scatter
from fedfmsl.algorithms.steps import Values, norm_of
from fedfmsl.errors import MessageError
from fedfmsl.protocol.encoding import encoded
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import Stage, Update, Verdict
from trainer_server.coordinator.records import held_out_accuracies
from trainer_server.coordinator.secure_sums import check_update
from trainer_server.coordinator.state import Plan, State

ROUNDING = 1e-3  # relative tolerance for the rounding of a device's own sums
SCATTER_ROUNDING = 1e-5  # the same for eigenvalues of the scatter, as a share of the sum of squares


@dataclass(frozen=True)
class Validation:
    """`kind` is the category that refusals are counted by, `reason` a sentence for the operator. `norm`: the L2 norm of
    what an accepted update trained; 0 in other stages."""

    verdict: Verdict
    kind: str = ""
    reason: str = ""
    norm: float = 0.0


def validate_update(plan: Plan, state: State, update: Update, tensors: Tensors) -> Validation:
    """Checks header, then tensors. Every value that a device sends is checked before it is used."""

    def rejected(kind: str, reason: str) -> Validation:
        return Validation(Verdict.REJECTED, kind, reason)

    config, announced = plan.config, state.announced
    secure = state.position >= 0 and plan.schedule[state.position].part is not None
    if update.run != config.run:
        return rejected("other run", f"belongs to run {update.run!r}, this is {config.run!r}")
    if update.session != plan.session:
        return rejected("other run", "belongs to an earlier session of this run")
    if update.device not in state.devices:
        return rejected("unknown device", "has not announced itself")
    if update.device in state.excluded:
        return rejected("excluded", "the operator has excluded this device from the run")
    is_counted = update.device in state.counted.get(update.round, ())
    if is_counted or (update.round, update.device) in state.updates:
        return Validation(Verdict.DUPLICATE, reason="already counted")
    if announced is None or update.round > state.round:
        return rejected("other round", f"round {update.round} has not been announced")
    recent = () if secure else state.recent
    task = next((round_ for round_ in (announced, *recent) if round_.round == update.round), None)
    if task is None or task.stage is not announced.stage:
        reason = (
            f"round {update.round} is closed, the present one is {state.round}; if this repeats, --round-timeout is "
            "too short for this device"
        )
        return Validation(Verdict.LATE, "late", reason)
    if update.stage is not task.stage:
        return rejected("other stage", f"stage {update.stage.value}, but stage {task.stage.value} was announced")
    if not task.asks(update.device):
        return rejected("not selected", f"was not selected in round {update.round}")
    if update.samples > config.max_samples:
        return rejected("samples", f"claims {update.samples} samples, more than {config.max_samples}")
    if not all(0 <= accuracy <= 1 for accuracy in held_out_accuracies(update).values()):
        return rejected("metrics", "claims a held-out accuracy outside of 0 to 1")
    if update.level > task.level:
        return rejected("tensors", f"is of level {update.level}, above the announced {task.level}")
    try:
        if secure:
            check_update(plan, state, task, update, tensors)
        norm = 0.0 if secure else CHECKS[update.stage](plan, update, tensors)
    except MessageError as error:
        return rejected("tensors", str(error))
    return Validation(Verdict.ACCEPTED, norm=norm)


def expert_delta(plan: Plan, update: Update, tensors: Tensors) -> Values:
    """The parameter difference (P_level,) in a stage 1 update. Raises MessageError if it is invalid."""
    delta = encoded(plan.bundle.expert, tensors, plan.config.encoding)
    if delta.size != plan.bundle.expert.size(update.level):
        raise MessageError(f"the update holds {delta.size} values, not as many as level {update.level} has")
    return delta


def gate_delta(plan: Plan, update: Update, tensors: Tensors) -> Values:
    """The gate difference (G,) in a stage 2 update. Raises MessageError if it is invalid."""
    delta = encoded(plan.bundle.gate, tensors, plan.config.encoding)
    if delta.size != plan.bundle.gate.total:
        raise MessageError(f"the update holds {delta.size} values, expected {plan.bundle.gate.total}")
    return delta


def class_statistics(plan: Plan, samples: int, tensors: Tensors) -> Vector:
    """Class sums, counts and the sum of norms of at most `samples` samples, flat. Raises MessageError if they
    contradict each other."""
    flat, (sums, counts, norm) = _joined(plan.statistics, tensors)
    largest = plan.config.max_norm * max(samples, 1)
    _bound(float(np.abs(norm[0])), largest, "sum of norms")
    if plan.config.privacy is not None:  # with noise only the bound on the norm holds
        _bound(float(np.linalg.norm(np.asarray(flat, np.float64))), largest, "norm")
        return flat
    if counts.min() < 0 or norm[0] < 0:
        raise MessageError("the update holds negative counts or norms")
    _check_counts(counts, samples)
    if np.linalg.norm(sums, axis=1).sum() > norm[0] * (1 + ROUNDING):  # the triangle inequality
        raise MessageError("the update's class sums are longer than its sum of norms")
    return flat


def head_statistics(plan: Plan, samples: int, tensors: Tensors) -> Vector:
    """Class sums, counts and second moments of at most `samples` samples, flat. Raises MessageError if no features
    (n, F) have them."""
    flat, (sums, counts, moments) = _joined(plan.head_statistics, tensors)
    if counts.min() < 0:
        raise MessageError("the update holds negative counts")
    _check_counts(counts, samples)
    scatter, held = within_scatter(sums, counts, moments), counts > 0
    squares = float(np.trace(scatter) + ((sums[held] ** 2).sum(axis=1) / counts[held]).sum())  # Σ |xᵢ|²
    _bound(max(squares, 0.0) ** 0.5, plan.config.max_norm * max(samples, 1), "root of the sum of squares")
    slack = SCATTER_ROUNDING * max(squares, 0.0) + np.finfo(np.float32).tiny
    if np.any(sums[~held]) or not _is_positive_definite(scatter + slack * np.eye(len(scatter))):
        raise MessageError("the update's class sums do not fit its second moments")
    return flat


def _joined(layout: Layout, tensors: Tensors) -> tuple[Vector, list[NDArray[np.float64]]]:
    """The tensors as one vector, and each in fp64 in the layout's order."""
    if len(tensors) != len(layout.slots):
        raise MessageError(f"the update holds {len(tensors)} tensors, expected {len(layout.slots)}")
    return layout.join(tensors), [np.asarray(tensors[slot.name], np.float64) for slot in layout.slots]


def _check_counts(counts: NDArray[np.float64], samples: int) -> None:
    if counts.sum() > samples:
        raise MessageError(f"the update counts {counts.sum():.0f} images and claims {samples} samples")


def _is_positive_definite(symmetric: Doubles) -> bool:
    try:
        np.linalg.cholesky(symmetric)
    except np.linalg.LinAlgError:
        return False
    return True


def _check_expert(plan: Plan, update: Update, tensors: Tensors) -> float:
    return _bound(norm_of(expert_delta(plan, update, tensors)), plan.config.max_norm, "norm")


def _check_gate(plan: Plan, update: Update, tensors: Tensors) -> float:
    return _bound(norm_of(gate_delta(plan, update, tensors)), plan.config.max_norm, "norm")


def _check_statistics(plan: Plan, update: Update, tensors: Tensors) -> float:
    class_statistics(plan, update.samples, tensors)
    return 0.0


def _check_head(plan: Plan, update: Update, tensors: Tensors) -> float:
    head_statistics(plan, update.samples, tensors)
    return 0.0


def _check_nothing(plan: Plan, update: Update, tensors: Tensors) -> float:
    if tensors:
        raise MessageError(f"stage {update.stage.value} takes no tensors")
    return 0.0


def _bound(value: float, limit: float, name: str) -> float:
    if not value <= limit:
        raise MessageError(f"the update's {name} is {value:.4g}, more than {limit:.4g}")
    return value


# each raises MessageError, or returns the norm of what the update trained
CHECKS: dict[Stage, Callable[[Plan, Update, Tensors], float]] = {
    Stage.STATISTICS: _check_statistics,
    Stage.GLOBAL: _check_expert,
    Stage.HEAD: _check_head,
    Stage.CANARY: _check_nothing,
    Stage.PERSONAL: _check_gate,
    Stage.BASELINE: _check_nothing,
    Stage.EVALUATE: _check_nothing,
    Stage.FINISHED: _check_nothing,
}
