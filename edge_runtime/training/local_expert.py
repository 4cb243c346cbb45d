"""Stage 2: trains the local expert, which never leaves the device, and the gate adapter, which is aggregated."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import Samples, TrainingContext
from edge_runtime.training.gate import GateExamples
from edge_runtime.training.loop import Targets, train
from edge_runtime.training.mixture import (
    ExpertOutputs,
    compute_mixture,
    dropped_class_log_p,
    expert_outputs,
    global_temperature,
    tempered,
)
from edge_runtime.training.stages import Globals, StageResult, shuffle_seed
from edge_runtime.training.tensor_file import read_tensors
from fedfmsl.algorithms.arrays import Labels, Vector
from fedfmsl.algorithms.mixture import (
    NOVEL_RATE,
    Biases,
    accuracy,
    class_dropout,
    gate_offset,
    gate_statistics,
    label_log_p,
    log_softmax,
    nll,
)
from fedfmsl.algorithms.sal import Sal, SalState
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import Round
from fedfmsl.protocol.tensors import pack


class LocalExpertHeader(BaseModel):
    """Header of the local expert's file, beside the tensors `theta` and `best` (P,)."""

    session: str
    task: str
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
        """The global expert at SAL's first level, with the device's log class prior added to the bias of the head."""
        theta = context.to_highest_level(expert)
        context.bundle.expert.split(theta)["classifier.bias"][:] += context.biases.prior
        start = context.capped(sal).start()
        return cls(theta, start, theta, start.level, np.inf)

    @classmethod
    def load(cls, context: TrainingContext, session: str) -> LocalExpert | None:
        """The local expert of an earlier round of the same session and task. None if there is none."""
        found = read_tensors(context.store.personal, LocalExpertHeader, ["theta", "best"])
        if found is None:
            return None
        header, (theta, best) = found
        if (header.session, header.task) != (session, context.bundle.task.sha256):
            return None
        if {theta.shape, best.shape} != {(context.bundle.expert.total,)}:
            return None
        sal = SalState(header.level, header.queue, header.seen)
        return cls(theta, sal, best, header.best_level, header.best_nll, header.round, header.held_out)

    def save(self, context: TrainingContext, session: str) -> None:
        header = LocalExpertHeader(
            session=session,
            task=context.bundle.task.sha256,
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


def train_personal(context: TrainingContext, round_: Round, published: Globals) -> StageResult:
    """Trains the local expert on the mixture's likelihood, then the gate adapter on the held-out split."""
    temperature = global_temperature(context, published)
    return _train_gate(context, published, temperature, train_local(context, round_, published, temperature))


def train_local(context: TrainingContext, round_: Round, published: Globals, temperature: float) -> LocalExpert:
    """The local expert after this round, and on the disk. `temperature`: of the global expert. A round that is computed
    again does not train it twice."""
    splits = context.splits
    expert = LocalExpert.load(context, round_.session)
    if expert is None or round_.index == 0:
        expert = LocalExpert.from_global(context, tempered(context, published.expert, temperature), round_.sal)
    samples = fingerprint(splits.held_out)
    if expert.held_out != samples:  # scores are comparable on the same samples only
        before = compute_mixture(context, splits.held_out, published, temperature, expert.best, expert.best_level)
        score = nll(before.log_p, labels_of(splits.held_out))
        expert = replace(expert, best_nll=score, held_out=samples)
    if expert.round < round_.index:
        expert = _train(context, round_, published, temperature, expert)
        expert.save(context, round_.session)
    return expert


def level_before(context: TrainingContext, round_: Round) -> int:
    """The level of the local expert before this round of stage 2."""
    expert = LocalExpert.load(context, round_.session) if round_.index else None
    return expert.sal.level if expert else context.capped(round_.sal).start().level


def _train(
    context: TrainingContext, round_: Round, published: Globals, temperature: float, expert: LocalExpert
) -> LocalExpert:
    engine, layout, samples, level = context.engine, context.bundle.expert, context.splits.train, expert.sal.level
    trained = min(level, context.level_cap)  # the cap may have been lowered
    labels = labels_of(samples)
    features = context.cache.pooled(samples, context.level_of(published.expert))
    logits = context.log_p(samples, published.expert, np.zeros(context.classes, np.float32)) / np.float32(temperature)
    log_gate = context.gate.log_weights(published.gate, features, gate_offset(logits, context.biases))
    global_log_p = label_log_p(log_softmax(logits + context.biases.kept), labels)
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
    after = compute_mixture(context, held_out, published, temperature, theta, level)
    held_out_labels = labels_of(held_out)
    sal = context.capped(round_.sal).observe(expert.sal, accuracy(after.local_log_p, held_out_labels))
    expert = replace(expert, theta=theta, sal=sal, round=round_.index)
    score = nll(after.log_p, held_out_labels)
    return replace(expert, best=theta, best_level=level, best_nll=score) if score < expert.best_nll else expert


def _train_gate(context: TrainingContext, published: Globals, temperature: float, expert: LocalExpert) -> StageResult:
    samples = context.splits.held_out
    labels = labels_of(samples)
    outputs = expert_outputs(context, samples, published, temperature, expert.best, expert.best_level)
    mixture = outputs.mixture(context, published.gate, context.biases)
    gate = context.gate.train(published.gate, gate_examples(context.class_counts, outputs, labels))
    weight, entropy = gate_statistics(mixture.log_gate)
    novel = dropped_class_log_p(context, published.gate, outputs, labels)
    metrics = {
        "held_out_mofm": accuracy(mixture.log_p, labels),
        "held_out_local": accuracy(mixture.local_log_p, labels),
        "held_out_global": accuracy(outputs.global_logits + context.class_mask, labels),  # as in stage 1
        "global_nll": nll(log_softmax(outputs.global_logits), labels),
        "held_out_global_prior": accuracy(outputs.global_logits + context.biases.prior, labels),
        **({"held_out_novel": accuracy(novel, labels)} if len(novel) else {}),
        "mean_local_weight": weight,
        "gate_entropy": entropy,
        "local_level": float(expert.sal.level),
    }
    return StageResult(delta=gate - published.gate, samples=len(samples), level=expert.sal.level, metrics=metrics)


def gate_examples(counts: NDArray[np.int64], outputs: ExpertOutputs, labels: Labels) -> GateExamples:
    """Each sample as it is, and with its class dropped, so that only the global expert can be right (ours).

    `counts` (C,): the device's samples per class. The weights are the prior probabilities of held and novel classes.
    """
    views = [(counts, np.arange(len(labels)), 1 - NOVEL_RATE)]
    views += [(without, rows, NOVEL_RATE) for without, rows in class_dropout(counts, labels)]
    parts = []
    for seen_counts, rows, weight in views:
        biases, seen = Biases.of_counts(seen_counts), outputs[rows]
        experts = (seen.global_logits + biases.kept, seen.local_logits + biases.held)
        parts.append(
            GateExamples(
                seen.features,
                gate_offset(seen.global_logits, biases),
                np.stack([label_log_p(log_softmax(logits), labels[rows]) for logits in experts], axis=1),
                np.full(len(rows), weight / len(labels), np.float32),
            )
        )
    return GateExamples.concatenate(parts)


def fingerprint(samples: Samples) -> str:
    """Depends on contents and labels, not on order."""
    lines = sorted(f"{sample.sha256} {sample.label}" for sample in samples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
