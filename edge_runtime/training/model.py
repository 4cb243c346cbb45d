"""The personalized model as a device stores it: MoFM of global expert, local expert and gate, with its calibration.

The device replaces it after every round, unless its held-out samples are less likely under the new one
(`edge_runtime.training.adoption`). The file holds small tensors only: they are inputs of the bundle's template
`personal-{level}.onnx`, which holds the frozen weights. The file never leaves the device.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.data.samples import labels_of
from edge_runtime.training.adoption import DivergedError, is_adopted
from edge_runtime.training.context import Samples, TrainingContext
from edge_runtime.training.local_expert import LocalExpert, fingerprint
from edge_runtime.training.mixture import expert_outputs, global_temperature, tempered
from edge_runtime.training.personal_model import ModelHeader, PersonalModel
from edge_runtime.training.stages import Globals, class_mean_expert
from edge_runtime.training.stored_model import (
    model_chosen_by_hand,
    read_personal_model,
    stored_model,
    write_personal_model,
)
from fedfmsl.algorithms.arrays import MIN_PROBABILITY, Floats
from fedfmsl.algorithms.calibration import calibrate, fit_temperature, unknown_threshold
from fedfmsl.algorithms.mixture import Biases, nll
from fedfmsl.errors import InputError
from fedfmsl.protocol.messages import Round

BY_HAND = "the device was returned to it by hand; python -m edge_runtime rollback --undo adopts new models again"


def make_personal_model(context: TrainingContext, round_: Round, published: Globals) -> PersonalModel:
    """The device's model after this round, with the published globals.

    Before stage 2 the local expert is the global expert with the device's log class prior. Before there is a global
    expert, or while its head is zeros, both experts have the head of the device's own class means, and novel classes
    have no probability (ours).
    Runs both experts on the held-out split. Raises DivergedError if their outputs are not finite.
    """
    expert, gate, biases = published.expert, published.gate, context.biases
    has_head = bool(expert[: context.bundle.expert.size(0)].any())
    if not has_head:
        expert = class_mean_expert(context)[: context.bundle.expert.size(1)]
        biases = Biases.of_counts(context.class_counts, novel_rate=0.0)
    if not gate.size:
        gate = context.bundle.initial()[1]
    complete = Globals(expert, expert, gate)
    scale = global_temperature(context, complete)
    expert = tempered(context, expert, scale)
    saved = LocalExpert.load(context, round_.session)
    local = saved or LocalExpert.from_global(context, expert, round_.sal)
    level = max(context.level_of(expert), local.best_level)
    samples = context.splits.held_out
    log_p = expert_outputs(context, samples, complete, scale, local.best, level).mixture(context, gate, biases).log_p
    temperature = fit_temperature(log_p, labels_of(samples))
    score = nll(calibrate(log_p, temperature), labels_of(samples))
    if np.isnan(log_p).any() or not np.isfinite(score):
        raise DivergedError(
            f"the model of round {round_.round} gives values that are not finite, so its globals are hostile, or "
            "training has diverged"
        )
    size = context.bundle.expert.size(level)
    header = ModelHeader(
        run=round_.run,
        session=round_.session,
        round=round_.round,
        device=context.device_name,
        level=level,
        bundle=context.bundle.sha256,
        task=context.bundle.task.sha256,
        expert=round_.expert,
        gate=round_.gate,
        temperature=temperature,
        threshold=unknown_threshold(np.exp(calibrate(log_p, temperature).max(axis=1))),
        prior=tuple(np.exp(biases.prior).tolist()),
        held=tuple((context.class_counts > 0).tolist()),
        has_head=has_head,
        nll=score,
        best_nll=score,
        held_out=fingerprint(samples),
    )
    tensors = {
        "global_theta": context.to_highest_level(expert)[:size],
        "local_theta": local.best[:size],
        "gate_theta": gate,
        "kept_bias": biases.kept,
        "given_bias": biases.given,
        "held_bias": biases.held,
    }
    return PersonalModel(header, tensors)


def save_personal_model(
    context: TrainingContext, round_: Round, published: Globals, model: PersonalModel | None = None
) -> str:
    """Adopts the model of this round, or keeps the one in use. Returns why it was kept; "" if it was not. `model`: of
    this round, if it is already known.

    Raises OSError if the disk is full.
    """
    chosen = model_chosen_by_hand(context.store)
    if chosen is not None:
        return f"predictions keep the model of run {chosen.header.run}, round {chosen.header.round}: {BY_HAND}"
    used, text = _model_in_use(context), ""
    former = stored_model(context.store)
    try:
        model = model or make_personal_model(context, round_, published)
    except DivergedError as error:
        if used is not None:
            kept = used.changed(kept_at=round_.round, kept_because="its values are not finite")
            write_personal_model(context.store, kept)
        return f"{error}; predictions {'keep the earlier model' if used else 'have no model yet'}"
    new = model.header
    if former is not None and (former.header.session, former.header.round) == (new.session, new.round):
        former = None  # the round is computed again
    if is_adopted(new, used.header if used else None):
        if used and used.header.session == new.session and used.header.has_head:
            model = model.changed(best_nll=min(new.nll, used.header.best_nll))
    else:
        assert used is not None
        old = used.header
        why = (
            f"held-out samples are less likely under it ({new.nll:.2f} instead of {old.nll:.2f} nats)"
            if new.has_head
            else "there is no global head yet"
        )
        text = f"predictions keep the model of run {old.run}, round {old.round}, not that of round {new.round}: {why}"
        model, former = used.changed(kept_at=new.round, kept_because=why), None
    tasks, task = context.store.tasks, context.bundle.task
    if tasks.read(task.sha256) is None:  # the model cannot be read without it
        tasks.write(task.blob)
    write_personal_model(context.store, model, former)
    return text


def served_model(context: TrainingContext, new: PersonalModel | None) -> PersonalModel | None:
    """The model that predictions use once the device has decided about `new`, its model of this round; None if it has
    none. Writes nothing."""
    used, chosen = _model_in_use(context), model_chosen_by_hand(context.store)
    is_new = new is not None and chosen is None and is_adopted(new.header, used.header if used else None)
    return new if is_new else used


def _model_in_use(context: TrainingContext) -> PersonalModel | None:
    """The stored model, scored on the present held-out samples. None if there is none of this bundle and task."""
    try:
        model = read_personal_model(context.store)
    except InputError:
        return None
    samples = context.splits.held_out
    if (model.header.bundle, model.header.task) != (context.bundle.sha256, context.bundle.task.sha256):
        return None
    if model.header.held_out == fingerprint(samples):
        return model
    try:
        score = nll(model.calibrated(model_log_p(context, model, samples)), labels_of(samples))
    except (KeyError, ValueError):  # tensors of another shape
        return None
    if not np.isfinite(score):
        return None
    return model.changed(nll=score, best_nll=score, held_out=fingerprint(samples))


def model_log_p(context: TrainingContext, model: PersonalModel, samples: Samples) -> Floats:
    """Class log-probabilities (n, C) of a stored model, not calibrated."""
    tensors, none = model.tensors, np.empty(0, np.float32)
    theta = tensors["global_theta"]
    local = context.to_highest_level(tensors["local_theta"])
    outputs = expert_outputs(context, samples, Globals(theta, none, none), 1.0, local, model.header.level)
    prior = np.log(np.maximum(model.header.prior, MIN_PROBABILITY)).astype(np.float32)
    biases = Biases(prior, tensors["kept_bias"], tensors["given_bias"], tensors["held_bias"])
    return outputs.mixture(context, tensors["gate_theta"], biases).log_p
