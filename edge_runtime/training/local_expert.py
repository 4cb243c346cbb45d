"""Stage 2: the local expert, which never leaves the device, and the gate adapter, which does every round."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from pydantic import BaseModel

from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import Device, Samples
from edge_runtime.training.loop import Targets, predict_log, train
from edge_runtime.training.stages import Globals, Outcome, seed_of
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.algorithms.mixture import accuracy, gate_statistics, label_log_p, mix, nll
from fedfmsl.algorithms.sal import Sal, SalState
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import Round
from fedfmsl.protocol.tensors import pack, unpack


class _Header(BaseModel):
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
    """`theta` and `best` are vectors of the bundle's highest level (P,); the blocks below the level are the global
    expert's. `best`, at `best_level`, had the lowest held-out negative log-likelihood of the mixture so far; `held_out`
    says on which slice (see `_name_of`)."""

    theta: Vector
    sal: SalState
    best: Vector
    best_level: int
    best_nll: float
    round: int = -1  # of stage 2
    held_out: str = ""

    @classmethod
    def from_global(cls, device: Device, expert: Vector, sal: Sal) -> LocalExpert:
        """The global expert, with the device's class prior in the head's bias, at SAL's first level."""
        theta = device.completed(expert)
        device.bundle.expert.split(theta)["classifier.bias"][:] += device.prior
        start = device.within_cap(sal).start()
        return cls(theta, start, theta, start.level, np.inf)

    @classmethod
    def load(cls, device: Device, session: str) -> LocalExpert | None:
        """The one kept from earlier rounds of the same session, if there is one."""
        try:
            header, tensors = unpack(device.store.personal.read_bytes(), _Header)
            theta, best = (np.asarray(tensors[name], np.float32) for name in ("theta", "best"))
        except (OSError, MessageError, KeyError):
            return None
        if header.session != session or {theta.shape, best.shape} != {(device.bundle.expert.total,)}:
            return None
        sal = SalState(header.level, header.queue, header.seen)
        return cls(theta, sal, best, header.best_level, header.best_nll, header.round, header.held_out)

    def save(self, device: Device, session: str) -> None:
        header = _Header(
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
        write_atomically(device.store.personal, blob, durable=True)


@dataclass(frozen=True)
class Mixture:
    """A device's MoFM over some images: log gate weights (n, 2) and both experts' class log-probabilities (n, C)."""

    log_gate: Floats
    global_log_p: Floats
    local_log_p: Floats

    @property
    def log_p(self) -> Floats:
        return mix(self.log_gate, self.global_log_p, self.local_log_p)


def mixture(device: Device, images: Samples, given: Globals, theta: Vector, level: int) -> Mixture:
    """The mixture of the global expert, with the device's prior, and a local expert at `level`."""
    pooled = device.cache.pooled(images, device.level_of(given.expert))
    return Mixture(
        log_gate=device.gate.weights(given.gate, pooled),
        global_log_p=device.log_p(images, given.expert, device.prior),
        local_log_p=local_log_p(device, images, given, theta, level),
    )


def local_log_p(device: Device, images: Samples, given: Globals, theta: Vector, level: int) -> Floats:
    """Class log-probabilities (n, C) of a local expert, over the classes this device holds."""
    device.engine.load(level)
    device.engine.set(theta[: device.bundle.expert.size(level)])
    return predict_log(device.engine, device.hidden(images, given.expert, level), device.mask)


def train_personal(device: Device, task: Round, given: Globals) -> Outcome:
    """Local epochs of the local expert on the mixture's likelihood, then steps of the gate on the held-out slice."""
    slices = device.slices
    expert = LocalExpert.load(device, task.session)
    if expert is None or task.index == 0:
        expert = LocalExpert.from_global(device, given.expert, task.sal)
    if expert.held_out != _name_of(slices.held_out):  # samples have come or gone: only on the same can two be compared
        before = mixture(device, slices.held_out, given, expert.best, expert.best_level)
        score = nll(before.log_p, labels_of(slices.held_out))
        expert = replace(expert, best_nll=score, held_out=_name_of(slices.held_out))
    if expert.round < task.index:
        expert = _train_local(device, task, given, expert)
        expert.save(device, task.session)
    return _train_gate(device, given, expert)


def _train_local(device: Device, task: Round, given: Globals, expert: LocalExpert) -> LocalExpert:
    engine, layout, images, level = device.engine, device.bundle.expert, device.slices.train, expert.sal.level
    trained = min(level, device.level_cap)  # the cap may have been lowered since
    labels = labels_of(images)
    log_gate = device.gate.weights(given.gate, device.cache.pooled(images, device.level_of(given.expert)))
    global_log_p = label_log_p(device.log_p(images, given.expert, device.prior), labels)
    targets = Targets(labels, gate=log_gate[:, 1], other=log_gate[:, 0] + global_log_p)
    engine.load(trained)
    size = layout.size(trained)
    engine.set(expert.theta[:size], task.training)
    applied = max(level, device.level_of(given.expert))  # further down the local expert is the global one
    hidden = device.hidden(images, expert.theta[: layout.size(applied)], trained)
    train(engine, hidden, targets, device.mask, task.training, seed_of(device, task), device.report)
    theta = expert.theta.copy()
    theta[:size] = engine.get()
    after = mixture(device, device.slices.held_out, given, theta, level)
    unseen = labels_of(device.slices.held_out)
    sal = device.within_cap(task.sal).observe(expert.sal, accuracy(after.local_log_p, unseen))
    expert = replace(expert, theta=theta, sal=sal, round=task.index)
    cost = nll(after.log_p, unseen)
    return replace(expert, best=theta, best_level=level, best_nll=cost) if cost < expert.best_nll else expert


def _train_gate(device: Device, given: Globals, expert: LocalExpert) -> Outcome:
    images = device.slices.held_out
    labels = labels_of(images)
    seen = mixture(device, images, given, expert.best, expert.best_level)
    expert_log_p = np.stack([label_log_p(seen.global_log_p, labels), label_log_p(seen.local_log_p, labels)], axis=1)
    pooled = device.cache.pooled(images, device.level_of(given.expert))
    gate = device.gate.train(given.gate, pooled, expert_log_p)
    weight, entropy = gate_statistics(seen.log_gate)
    metrics = {
        "held_out_mofm": accuracy(seen.log_p, labels),
        "held_out_local": accuracy(seen.local_log_p, labels),
        "held_out_global_prior": accuracy(seen.global_log_p, labels),
        "mean_local_weight": weight,
        "gate_entropy": entropy,
        "local_level": float(expert.sal.level),
    }
    return Outcome(delta=gate - given.gate, samples=len(images), level=expert.sal.level, metrics=metrics)


def _name_of(slice_: Samples) -> str:
    """The same for the same contents and labels."""
    said = sorted(f"{sample.sha256} {sample.label}" for sample in slice_)
    return hashlib.sha256("\n".join(said).encode()).hexdigest()
