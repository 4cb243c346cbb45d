"""Whether a device uses a new personalized model for its predictions, or keeps the one that it has (ours).

A hostile device can make the globals worse, and a new run begins with an untrained global expert. So a device compares
the likelihood of its held-out samples under both models.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fedfmsl.protocol.messages import Number, Session, Sha256

MARGIN = 0.2  # nats by which the held-out likelihood may fall within a run; ours


class ModelScore(BaseModel):
    """What the decision needs of a model.

    `expert`: SHA-256 of the global expert, "" before there is one. `nll`: mean negative log-likelihood in nats of the
    held-out samples with the fingerprint `held_out`. `best_nll`: the lowest one of the models that the device has used
    in this session. `kept_at`: the last round whose model was not adopted in favour of this one; 0 if none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    session: Session
    bundle: Sha256
    expert: Sha256
    nll: float = 0.0
    best_nll: float = 0.0
    held_out: str = Field("", max_length=64)
    kept_at: Number = 0


def is_adopted(new: ModelScore, used: ModelScore | None) -> bool:
    """Whether `new` replaces the model in use. Both are scored on the same held-out samples.

    A model without a global expert never replaces one with a global expert, which knows novel classes too. Within a
    session the likelihood may fall MARGIN below the best one so far. Another session's model must not be worse.
    """
    if used is None or used.bundle != new.bundle or not used.expert:
        return True
    if not new.expert:
        return False
    if used.session == new.session:
        return new.nll <= used.best_nll + MARGIN
    return new.nll <= used.nll
