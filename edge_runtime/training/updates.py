"""From what a stage has computed to what is sent: first privacy, then error feedback and encoding.

Error feedback (Seide et al. 2014; Karimireddy et al., ICML 2019): what encoding loses of an update is kept and added
to the next, so that over the rounds nothing is lost but the last update's rest.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from edge_runtime.training.context import Device
from edge_runtime.training.stages import Outcome
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.privacy import Privacy, privatize, privatize_statistics
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import MessageError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.encoding import decode, encode
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import Encoding, Round, Stage, Update
from fedfmsl.protocol.tensors import Tensors, pack, unpack


def prepare(bundle: Bundle, residual: Path, task: Round, outcome: Outcome, rng: np.random.Generator) -> Outcome:
    """`outcome` with the tensors that are sent for it. What encoding loses of them is kept in the file `residual`."""
    if task.privacy is not None and task.stage in (Stage.STATISTICS, Stage.GLOBAL, Stage.PERSONAL):
        outcome = _private(task, task.privacy, outcome, rng)
    if outcome.delta is None:
        return outcome
    layout = bundle.gate if task.stage is Stage.PERSONAL else bundle.expert
    if task.encoding is Encoding.FP32:
        return replace(outcome, tensors=encode(layout, outcome.delta, task.encoding))
    # The residual is replaced before the update lies in the outbox, and keeps what the update itself was made with: if
    # the process dies in between, or too few devices answer, the round of this index is worked on again, and starts
    # again from `before`. So a residual enters exactly one update of each index, and the same one every time.
    before = _load(residual, task)
    tensors, after = with_feedback(layout, outcome.delta, before, task.encoding)
    _save(residual, task, before, after)
    return replace(outcome, tensors=tensors)


def header_of(
    device: Device,
    task: Round,
    outcome: Outcome,
    *,
    seconds: float = 0.0,
    peak_rss_mb: float = 0.0,
    bytes_down: int = 0,
) -> Update:
    """What goes with the tensors of a round's outcome. A metric that is no number is left out."""
    return Update(
        run=task.run,
        session=task.session,
        round=task.round,
        device=device.name,
        stage=task.stage,
        level=outcome.level,
        samples=outcome.samples,
        metrics={name: value for name, value in outcome.metrics.items() if math.isfinite(value)},
        counts=dict(outcome.counts),
        engine=device.engine.name,
        seconds=seconds,
        peak_rss_mb=peak_rss_mb,
        bytes_down=bytes_down,
    )


def _private(task: Round, privacy: Privacy, outcome: Outcome, rng: np.random.Generator) -> Outcome:
    """`outcome` noised, and beside its values nothing that depends on what the samples show."""
    # of stage 2 the level too: SAL activates a local expert's blocks after its accuracies
    level = task.level if task.stage is Stage.PERSONAL else outcome.level
    if outcome.delta is None:
        return Outcome(privatize_statistics(outcome.tensors, privacy, rng), samples=1, level=level)
    return Outcome(delta=privatize(outcome.delta, privacy, rng), samples=1, level=level)


def with_feedback(layout: Layout, delta: Vector, residual: Vector, encoding: Encoding) -> tuple[Tensors, Vector]:
    """The tensors of delta + residual, and what encoding has lost of them (P,). What a residual of a lower level does
    not hold counts as zeros."""
    wanted = delta.copy()
    shared = min(delta.size, residual.size)
    wanted[:shared] += residual[:shared]
    tensors = encode(layout, wanted, encoding)
    try:
        return tensors, wanted - decode(layout, tensors, encoding)
    except MessageError:  # training has diverged: the server refuses this update in words, and nothing of it is lost
        return tensors, residual


class _Header(BaseModel):
    """Of the tensors `before`, what was added to the update of the stage's round `index`, and `after`, what encoding
    then lost of it, both (P,)."""

    session: str
    stage: Stage
    index: int


def _load(path: Path, task: Round) -> Vector:
    """What has to be added to the update of a round. If this session's stage has nothing on disk that is whole and
    finite, nothing was lost."""
    try:
        header, tensors = unpack(path.read_bytes(), _Header)
        residual = np.asarray(tensors["before" if header.index == task.index else "after"], np.float32)
    except (OSError, MessageError, KeyError):
        return np.empty(0, np.float32)
    own = (header.session, header.stage) == (task.session, task.stage)
    return residual if own and residual.ndim == 1 and np.isfinite(residual).all() else np.empty(0, np.float32)


def _save(path: Path, task: Round, before: Vector, after: Vector) -> None:
    header = _Header(session=task.session, stage=task.stage, index=task.index)
    write_atomically(path, pack(header, {"before": before, "after": after}), durable=True)
