"""Stage 2: trains the local expert, which never leaves the device, and the gate adapter, which is aggregated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from pydantic import BaseModel

from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import Samples, TrainingContext
from edge_runtime.training.loop import Targets, predict_log_p, train
from edge_runtime.training.stages import Globals, StageResult, shuffle_seed
from edge_runtime.training.tensor_file import read_tensors
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.algorithms.mixture import accuracy, gate_statistics, label_log_p, mix, nll
from fedfmsl.algorithms.sal import Sal, SalState
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import Round
from fedfmsl.protocol.tensors import pack


class LocalExpertHeader(BaseModel):
    """Header of the local expert's file, beside the tensors `theta` and `best` (P,)."""

    session: str
    round: int
    level: int
    queue: tuple[float, ...]
    seen: int
    best_level: int
    best_nll: float
    held_out: str = ""


@dataclass(frozen=True)
class LocalExpert:
    """`theta` and `best` have the bundle's highest level (P,). Below their level, blocks equal the global expert's.

    `best`, at `best_level`, has the lowest negative log-likelihood of the mixture on the held-out split so far.
    `held_out` is the fingerprint of that split. `round`: index of the last round of stage 2.
    """

    theta: Vector
    sal: SalState
    best: Vector
    best_level: int
    best_nll: float
    round: int = -1
    held_out: str = ""

    @classmethod
    def from_global(cls, context: TrainingContext, expert: Vector, sal: Sal) -> LocalExpert:
        """The global expert at SAL's first level, with the device's log prior added to the bias of the head."""
        theta = context.to_highest_level(expert)
        context.bundle.expert.split(theta)["classifier.bias"][:] += context.log_prior
        start = context.capped(sal).start()
        return cls(theta, start, theta, start.level, np.inf)

    @classmethod
    def load(cls, context: TrainingContext, session: str) -> LocalExpert | None:
        """The local expert of an earlier round of the same session. None if there is none, or if it is damaged."""
        found = read_tensors(context.store.personal, LocalExpertHeader, ["theta", "best"])
        if found is None:
            return None
        header, (theta, best) = found
        if header.session != session or {theta.shape, best.shape} != {(context.bundle.expert.total,)}:
            return None
        sal = SalState(header.level, header.queue, header.seen)
        return cls(theta, sal, best, header.best_level, header.best_nll, header.round, header.held_out)

    def save(self, context: TrainingContext, session: str) -> None:
        header = LocalExpertHeader(
            session=session,
            round=self.round,
            level=self.sal.level,
            queue=self.sal.queue,
            seen=self.sal.seen,
            best_level=self.best_level,
            best_nll=self.best_nll,
            held_out=self.held_out,
        )
        blob = pack(header, {"theta": self.theta, "best": self.best})
        write_atomically(context.store.personal, blob, durable=True)


@dataclass(frozen=True)
class Mixture:
    """Outputs of a MoFM for n samples: log gate weights (n, 2) and both experts' class log-probabilities (n, C)."""

    log_gate: Floats
    global_log_p: Floats
    local_log_p: Floats

    @property
    def log_p(self) -> Floats:
        """Class log-probabilities of the mixture (n, C)."""
        return mix(self.log_gate, self.global_log_p, self.local_log_p)


def compute_mixture(
    context: TrainingContext, samples: Samples, published: Globals, theta: Vector, level: int
) -> Mixture:
    """The mixture of the global expert, with the device's log prior, and the local expert `theta` at `level`."""
    features = context.cache.pooled(samples, context.level_of(published.expert))
    return Mixture(
        log_gate=context.gate.log_weights(published.gate, features),
        global_log_p=context.log_p(samples, published.expert, context.log_prior),
        local_log_p=local_log_p(context, samples, published, theta, level),
    )


def local_log_p(context: TrainingContext, samples: Samples, published: Globals, theta: Vector, level: int) -> Floats:
    """Class log-probabilities (n, C) of the local expert `theta` at `level`, over the held classes."""
    context.engine.load(level)
    context.engine.set(theta[: context.bundle.expert.size(level)])
    hidden = context.hidden_states(samples, published.expert, level)
    return predict_log_p(context.engine, hidden, context.class_mask)


def train_personal(context: TrainingContext, round_: Round, published: Globals) -> StageResult:
    """Trains the local expert on the mixture's likelihood, then the gate adapter on the held-out split."""
    splits = context.splits
    expert = LocalExpert.load(context, round_.session)
    if expert is None or round_.index == 0:
        expert = LocalExpert.from_global(context, published.expert, round_.sal)
    fingerprint = _fingerprint(splits.held_out)
    if expert.held_out != fingerprint:  # scores are comparable on the same samples only
        before = compute_mixture(context, splits.held_out, published, expert.best, expert.best_level)
        score = nll(before.log_p, labels_of(splits.held_out))
        expert = replace(expert, best_nll=score, held_out=fingerprint)
    if expert.round < round_.index:
        expert = _train_local(context, round_, published, expert)
        expert.save(context, round_.session)
    return _train_gate(context, published, expert)


def _train_local(context: TrainingContext, round_: Round, published: Globals, expert: LocalExpert) -> LocalExpert:
    engine, layout, samples, level = context.engine, context.bundle.expert, context.splits.train, expert.sal.level
    trained = min(level, context.level_cap)  # the cap may have been lowered
    labels = labels_of(samples)
    features = context.cache.pooled(samples, context.level_of(published.expert))
    log_gate = context.gate.log_weights(published.gate, features)
    global_log_p = label_log_p(context.log_p(samples, published.expert, context.log_prior), labels)
    targets = Targets(labels, gate=log_gate[:, 1], other=log_gate[:, 0] + global_log_p)
    engine.load(trained)
    size = layout.size(trained)
    engine.set(expert.theta[:size], round_.training)
    applied = max(level, context.level_of(published.expert))  # below its level the local expert equals the global one
    hidden = context.hidden_states(samples, expert.theta[: layout.size(applied)], trained)
    seed = shuffle_seed(context, round_)
    train(engine, hidden, targets, context.class_mask, round_.training, seed, context.report)
    theta = expert.theta.copy()
    theta[:size] = engine.get()
    held_out = context.splits.held_out
    after = compute_mixture(context, held_out, published, theta, level)
    held_out_labels = labels_of(held_out)
    sal = context.capped(round_.sal).observe(expert.sal, accuracy(after.local_log_p, held_out_labels))
    expert = replace(expert, theta=theta, sal=sal, round=round_.index)
    score = nll(after.log_p, held_out_labels)
    return replace(expert, best=theta, best_level=level, best_nll=score) if score < expert.best_nll else expert


def _train_gate(context: TrainingContext, published: Globals, expert: LocalExpert) -> StageResult:
    samples = context.splits.held_out
    labels = labels_of(samples)
    mixture = compute_mixture(context, samples, published, expert.best, expert.best_level)
    expert_log_p = np.stack(
        [label_log_p(mixture.global_log_p, labels), label_log_p(mixture.local_log_p, labels)], axis=1
    )
    features = context.cache.pooled(samples, context.level_of(published.expert))
    gate = context.gate.train(published.gate, features, expert_log_p)
    weight, entropy = gate_statistics(mixture.log_gate)
    metrics = {
        "held_out_mofm": accuracy(mixture.log_p, labels),
        "held_out_local": accuracy(mixture.local_log_p, labels),
        "held_out_global_prior": accuracy(mixture.global_log_p, labels),
        "mean_local_weight": weight,
        "gate_entropy": entropy,
        "local_level": float(expert.sal.level),
    }
    return StageResult(delta=gate - published.gate, samples=len(samples), level=expert.sal.level, metrics=metrics)


def _fingerprint(samples: Samples) -> str:
    """Depends on contents and labels, not on order."""
    lines = sorted(f"{sample.sha256} {sample.label}" for sample in samples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
