"""From the result of a stage to the client update: privacy, error feedback and encoding.

Error feedback (Seide et al. 2014; Karimireddy et al., ICML 2019): the residual, which is the part of an update that the
encoding loses, is saved and added to the next update. Over all rounds only the residual of the last update is lost.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from edge_runtime.training.context import TrainingContext
from edge_runtime.training.stages import StageResult
from edge_runtime.training.tensor_file import read_tensors
from fedfmsl.algorithms.arrays import Tensors, Vector
from fedfmsl.algorithms.fixed_point import Words, fixed_point
from fedfmsl.algorithms.privacy import (
    Privacy,
    bounded_statistics,
    clipped,
    privatize,
    privatize_statistics,
    privatize_words,
)
from fedfmsl.algorithms.weighted_sums import FRACTION_BITS, trained_values, weighted_update
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import MessageError, RunError
from fedfmsl.protocol.encoding import SUMS, decode, encode
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import NOISED, Encoding, Round, Stage, Update
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack


def prepare_update(
    bundle: TaskBundle, residual_path: Path, round_: Round, result: StageResult, rng: np.random.Generator
) -> StageResult:
    """`result` with the tensors to send. Saves the residual of the encoding in the file `residual_path`."""
    layout = bundle.gate if round_.stage is Stage.PERSONAL else bundle.expert
    privacy = round_.privacy if round_.stage in NOISED else None
    if privacy is not None:  # without metrics and counts, which would reveal facts about the samples
        # In stage 2 the device's level depends on accuracies, so the round's level replaces it.
        level = round_.level if round_.stage is Stage.PERSONAL else result.level
        result = StageResult(result.tensors, result.delta, samples=1, level=level)
    if round_.secure:
        return StageResult({SUMS: _secure_sums(layout, round_, privacy, result, rng)}, level=result.level)
    if privacy is not None:
        result = _add_noise(privacy, result, rng)
    if result.delta is None:
        return result
    if round_.encoding is Encoding.FP32:
        return replace(result, tensors=encode(layout, result.delta, round_.encoding))
    # The file is written before the update is in the outbox, and also stores the residual that this update includes.
    # If the process ends in between, or if too few devices answer, the round of this index is repeated. It then starts
    # from `before` again. So a residual is part of exactly one update of each index, and always of the same one.
    before = load_residual(residual_path, round_, bundle.task.sha256)
    tensors, after = encode_with_feedback(layout, result.delta, before, round_.encoding)
    save_residual(residual_path, round_, bundle.task.sha256, before, after)
    return replace(result, tensors=tensors)


def _secure_sums(
    layout: Layout, round_: Round, privacy: Privacy | None, result: StageResult, rng: np.random.Generator
) -> Words:
    """What the result adds to a secure sum. Raises RunError if a value is too large."""
    try:
        if result.delta is None:
            tensors = {name: np.asarray(tensor, np.float64) for name, tensor in result.tensors.items()}
            if privacy is None:
                return fixed_point(np.concatenate([tensor.ravel() for tensor in tensors.values()]))
            bounded = bounded_statistics(tensors, privacy).values()
            values = np.concatenate([tensor.ravel() for tensor, _ in bounded])
            return privatize_words(values, np.repeat([d for _, d in bounded], [t.size for t, _ in bounded]), rng)
        parts = layout.parts_of(round_.level) if round_.stage is Stage.GLOBAL else layout.parts
        if privacy is None:
            accuracy = result.metrics.get("held_out_global", 0.0)
            return fixed_point(weighted_update(result.delta, result.samples, accuracy, parts), FRACTION_BITS)
        update = weighted_update(clipped(result.delta, privacy), 1.0, 0.0, parts)
        # Also for blocks that the device does not train: their sum needs the noise of as many devices as all others.
        deviation = np.where(np.arange(update.size) < trained_values(parts), privacy.share, 0.0)
        return privatize_words(update, deviation, rng, FRACTION_BITS)
    except ValueError as error:
        raise RunError(f"the update of round {round_.round} cannot be sent: {error}") from error


def update_header(
    context: TrainingContext,
    round_: Round,
    result: StageResult,
    *,
    seconds: float = 0.0,
    peak_rss_mb: float = 0.0,
    bytes_down: int = 0,
) -> Update:
    """The message that accompanies the tensors of an update. Leaves out metrics that are not finite."""
    return Update(
        run=round_.run,
        session=round_.session,
        round=round_.round,
        device=context.device_name,
        stage=round_.stage,
        level=result.level,
        samples=result.samples,
        metrics={name: value for name, value in result.metrics.items() if math.isfinite(value)},
        counts=dict(result.counts),
        engine=context.engine.name,
        seconds=seconds,
        peak_rss_mb=peak_rss_mb,
        bytes_down=bytes_down,
    )


def _add_noise(privacy: Privacy, result: StageResult, rng: np.random.Generator) -> StageResult:
    if result.delta is None:
        return replace(result, tensors=privatize_statistics(result.tensors, privacy, rng))
    return replace(result, delta=privatize(result.delta, privacy, rng))


def encode_with_feedback(layout: Layout, delta: Vector, residual: Vector, encoding: Encoding) -> tuple[Tensors, Vector]:
    """The encoded tensors of delta + residual, and the new residual (P,). A shorter residual is filled with zeros."""
    total = delta.copy()
    shared = min(delta.size, residual.size)
    total[:shared] += residual[:shared]
    tensors = encode(layout, total, encoding)
    try:
        return tensors, total - decode(layout, tensors, encoding)
    except MessageError:  # training has diverged; the server refuses this update, so the residual stays
        return tensors, residual


class ResidualHeader(BaseModel):
    """Header of the residual's file: round `index` of the stage.

    Tensors: `before`, the residual in this round's update, and `after`, the residual of encoding it. Both (P,).
    """

    session: str
    task: str
    stage: Stage
    index: int


def load_residual(path: Path, round_: Round, task: str) -> Vector:
    """The residual (P,) to add to this round's update. Empty if the file is damaged, or of another session, task or
    stage."""
    found = read_tensors(path, ResidualHeader, ["before", "after"])
    if found is not None:
        header, (before, after) = found
        residual = before if header.index == round_.index else after
        is_own = (header.session, header.task, header.stage) == (round_.session, task, round_.stage)
        if is_own and residual.ndim == 1 and np.isfinite(residual).all():
            return residual
    return np.empty(0, np.float32)


def save_residual(path: Path, round_: Round, task: str, before: Vector, after: Vector) -> None:
    header = ResidualHeader(session=round_.session, task=task, stage=round_.stage, index=round_.index)
    write_atomically(path, pack(header, {"before": before, "after": after}), durable=True)
