"""Whether a device uses a new personalized model for its predictions, or keeps the one that it has (ours).

A hostile device can make the globals worse, and a new run begins with an untrained global expert. So a device compares
the likelihood of its held-out samples under both models.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fedfmsl.protocol.messages import Number, Session, Sha256, Text

MARGIN = 0.2  # nats by which the held-out likelihood may fall within a session; ours


class DivergedError(Exception):
    """The model of a round gives values that are not finite: its globals are hostile, or training has diverged."""


class ModelScore(BaseModel):
    """What the decision needs of a model.

    `has_head`: whether its global expert has a head; before, both experts know the device's own classes only. `nll`:
    mean negative log-likelihood in nats of the held-out samples with the fingerprint `held_out`. `best_nll`: the lowest
    one of the models that the device has used in this session. `kept_at`: the last round whose model was not adopted in
    favour of this one, and why; 0 if there is none. `by_hand`: the device was returned to this model, and adopts no
    other one (`edge_runtime.training.rollback`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    session: Session
    bundle: Sha256
    task: Sha256
    has_head: bool = True
    nll: float = 0.0
    best_nll: float = 0.0
    held_out: str = Field("", max_length=64)
    kept_at: Number = 0
    kept_because: Text = ""
    by_hand: bool = False


SCORES = frozenset(ModelScore.model_fields) - {"session", "bundle", "task"}  # fields for this decision only


def is_adopted(new: ModelScore, used: ModelScore | None) -> bool:
    """Whether `new` replaces the model in use. Both are scored on the same held-out samples.

    Within a session the likelihood may fall MARGIN below the best one so far. Another session's model must not be worse
    than the one in use. A model of another bundle or task, or without a global head, is always replaced; a model
    without a global head replaces no other. One that was chosen by hand stays.
    """
    if used is not None and used.by_hand:
        return False
    if used is None or (used.bundle, used.task) != (new.bundle, new.task) or not used.has_head:
        return True
    if not new.has_head:
        return False
    if used.session == new.session:
        return new.nll <= used.best_nll + MARGIN
    return new.nll <= used.nll
