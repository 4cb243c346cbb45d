"""The stages `statistics`, `global`, `head` and `canary`, and the types that all stages share.

A stage is a function of the context, the announced round and the published globals. It returns a `StageResult`. No
stage does network I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.loop import Targets, train
from edge_runtime.training.personal_model import PersonalModel
from fedfmsl.algorithms.arrays import Bools, Tensors, Vector
from fedfmsl.algorithms.calibration import calibrated_nll
from fedfmsl.algorithms.class_means import class_mean_head, class_sums
from fedfmsl.algorithms.discriminant import second_moments
from fedfmsl.algorithms.mixture import accuracy, log_frequencies, log_softmax
from fedfmsl.errors import RunError
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import Globals as GlobalsHeader
from fedfmsl.protocol.messages import Round, Stage, Sums
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import unpack

ALL = slice(None)  # all samples


@dataclass(frozen=True)
class Globals:
    """The published globals: global expert (P,), expert that stage 1 starts from (P₁,), gate adapter (G,).

    A vector that is not published yet is empty.
    """

    expert: Vector
    start: Vector
    gate: Vector


def read_globals(bundle: TaskBundle, read: Callable[[str], bytes | None], round_: Round) -> Globals:
    """The globals that a round names. `read` returns the blob with a SHA-256, or None. Raises RunError if one is
    missing or damaged."""

    def vector(sha256: str, layout: Layout) -> Vector:
        if not sha256:
            return np.empty(0, np.float32)
        blob = read(sha256)
        if blob is None:
            raise RunError(
                f"the global blob {sha256[:12]}… is missing or damaged on the disk; start again to fetch it again"
            )
        return layout.join(unpack(blob, GlobalsHeader)[1])

    return Globals(
        vector(round_.expert, bundle.expert), vector(round_.start, bundle.expert), vector(round_.gate, bundle.gate)
    )


@dataclass(frozen=True)
class StageResult:
    """What a stage computes for the server.

    `tensors`: sent as they are. `delta`: trained minus received values, still to be encoded by
    `edge_runtime.training.updates`; (P,) of an expert at `level`, or (G,) of the gate adapter. `samples`: the weight in
    the aggregation. `counts`: lists of samples per class. `model`: the personalized model of this round, if the stage
    has computed it; it stays on the device.
    """

    tensors: Tensors = field(default_factory=dict)
    delta: Vector | None = None
    samples: int = 0
    level: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, list[int]] = field(default_factory=dict)
    model: PersonalModel | None = None


StageFunction = Callable[[TrainingContext, Round, Globals], StageResult]


def statistics(context: TrainingContext, round_: Round, _: Globals) -> StageResult:
    """Class sums of the frozen features. The server makes the head of class means from them. If it asks for no sums,
    only counts and the sum of norms."""
    counted = counted_samples(context, round_)
    sums = train_class_sums(context, round_.level, counted)
    if round_.sums is Sums.NONE:
        sums["class_sums"] = np.zeros_like(sums["class_sums"])
    return StageResult(sums, samples=_reported(round_, counted))


def holders(context: TrainingContext, round_: Round, _: Globals) -> StageResult:
    """For a secure sum (2, C): the samples of each class, at most `min_class_count`, and whether there are any."""
    counts = _train_counts(context)
    held = np.stack([np.minimum(counts, round_.min_class_count), counts > 0])
    return StageResult({"held": held.astype(np.float32)})


def counted_samples(context: TrainingContext, round_: Round) -> Bools:
    """Which samples of the training split (n,) enter the sums: those of the round's classes. In sums that are not
    secure, the device needs `min_class_count` of them; in secure ones, all devices together."""
    chosen = np.asarray(round_.secure | (_train_counts(context) >= round_.min_class_count), np.bool_)
    if round_.classes:
        chosen &= np.isin(np.arange(context.classes), round_.classes)
    return np.asarray(chosen[labels_of(context.splits.train)], np.bool_)


def _train_counts(context: TrainingContext) -> NDArray[np.int64]:
    """Samples per class (C,) of the training split."""
    return np.bincount(labels_of(context.splits.train), minlength=context.classes)


def _reported(round_: Round, counted: Bools) -> int:
    """The number of samples in the header of sums. With secure sums it is only in them."""
    return 0 if round_.secure else counted.size


def train_class_sums(context: TrainingContext, level: int, counted: Bools | slice = ALL) -> dict[str, Vector]:
    """`class_sums` of the training split, or of those samples in it that are `counted` (n,). Also caches the hidden
    states of `level`."""
    samples = context.splits.train
    return class_sums(context.cache.pooled(samples, level)[counted], labels_of(samples)[counted], context.classes)


def class_mean_expert(context: TrainingContext) -> Vector:
    """An expert of the highest level (P,) with initial LoRA and the head of this device's own class means."""
    own = train_class_sums(context, 1)
    theta = context.bundle.initial()[0]
    head = class_mean_head(own["class_sums"], own["class_counts"], float(own["norm_sum"][0]))
    theta[: head.size] = head
    return theta


def train_global(context: TrainingContext, round_: Round, published: Globals) -> StageResult:
    """Stage 1: local epochs of the cross-entropy, at the round's level or the level cap.

    If a head round follows, the softmax is over all classes: the head from sums of logits is better then, and the
    trained head worse (benchmarks/membership.md). Without one the logits are adjusted by the device's class
    frequencies, so that devices with different classes train the same global expert (`log_frequencies`).
    """
    splits, engine, layout = context.splits, context.engine, context.bundle.expert
    level = min(round_.level, context.level_cap)
    theta = published.expert[: layout.size(level)]
    measured = _held_out_metrics(context, published.expert, level)
    hidden = context.hidden_states(splits.train, published.expert, level)
    engine.load(level)
    engine.set(theta, round_.training)
    targets = Targets.cross_entropy(labels_of(splits.train))
    seed = shuffle_seed(context, round_)
    adjusted = round_.sums is Sums.NONE
    bias = log_frequencies(_train_counts(context)) if adjusted else np.zeros(context.classes, np.float32)
    loss = train(engine, hidden, targets, bias, round_.training, seed, context.report)
    return StageResult(
        delta=engine.get() - theta, samples=len(splits.train), level=level, metrics={**measured, "loss": loss}
    )


def measure_global(context: TrainingContext, round_: Round, published: Globals) -> StageResult:
    """Canary round: accuracy and likelihood of the held-out samples under a global expert that other devices do not
    have yet."""
    level = min(round_.level, context.level_cap)
    metrics = _held_out_metrics(context, published.expert, level)
    return StageResult(samples=len(context.splits.held_out), level=level, metrics=metrics)


def _held_out_metrics(context: TrainingContext, expert: Vector, level: int) -> dict[str, float]:
    """Of the global `expert` (P,), used at `level`. The likelihood is over all classes."""
    samples = context.splits.held_out
    log_p = log_softmax(context.logits(samples, expert, expert, level))
    labels = labels_of(samples)
    return {
        "held_out_global": accuracy(log_p + context.class_mask, labels),
        "global_nll": calibrated_nll(log_p, labels),
    }


def head_statistics(context: TrainingContext, round_: Round, published: Globals) -> StageResult:
    """Class sums and second moments of the global expert's logits, or of its features. The server computes its head
    from them."""
    level = min(round_.level, context.level_cap)
    counted = counted_samples(context, round_)
    tensors = sample_moments(context, published.expert, level, round_.sums, counted)
    return StageResult(tensors, samples=_reported(round_, counted), level=level)


def sample_moments(
    context: TrainingContext, expert: Vector, level: int, kind: Sums, counted: Bools | slice = ALL
) -> dict[str, Vector]:
    """The arguments of `discriminant_head` or `logit_head` from the training split, or those samples in it that are
    `counted` (n,): of features with the LoRA of `expert`, or of its logits."""
    samples, engine = context.splits.train, context.engine
    engine.load(level)
    engine.set(expert[: context.bundle.expert.size(level)])
    compute = engine.predict if kind is Sums.LOGITS else engine.features
    values = np.concatenate([compute(hidden) for hidden in context.hidden_states(samples, expert, level).batches()])
    values = values[counted]
    sums = class_sums(values, labels_of(samples)[counted], context.classes)
    return {
        "class_sums": sums["class_sums"],
        "class_counts": sums["class_counts"],
        "second_moments": second_moments(values),
    }


def shuffle_seed(context: TrainingContext, round_: Round) -> list[int]:
    """One random stream for each (seed, device, stage, round index). A repeated round has the same shuffles."""
    return [round_.training.seed, *context.device_name.encode(), list(Stage).index(round_.stage), round_.index]
