"""Adapts predictions to the classes that a device meets now, from its unlabelled files: EM for label shift."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedfmsl.algorithms.arrays import MIN_PROBABILITY, Floats
from fedfmsl.algorithms.label_shift import WINDOW, adapted_prior, prior_shift
from fedfmsl.algorithms.mixture import log_softmax


class ModelFacts(Protocol):
    """Of a personalized model with C classes: its temperature, class prior (C,) and held classes (C,)."""

    @property
    def temperature(self) -> float: ...
    @property
    def prior(self) -> Sequence[float]: ...
    @property
    def held(self) -> Sequence[bool]: ...


class PriorAdapter:
    """Estimates the class prior from the last WINDOW files. The first few files change nothing.

    It starts again with a model whose class prior is another, because the probabilities before depend on the old one.
    """

    def __init__(self) -> None:
        self._prior: tuple[float, ...] = ()
        self._log_p: deque[Floats] = deque(maxlen=WINDOW)

    def adapt(self, probabilities: Floats, model: ModelFacts) -> Floats:
        """The class probabilities (C,) of the next file under the adapted prior, from those of the model."""
        if self._prior != (before := tuple(model.prior)):
            self._prior = before
            self._log_p.clear()
        temperature, prior = np.float32(model.temperature), np.asarray(model.prior, np.float32)
        log_p = log_softmax(temperature * np.log(np.maximum(probabilities, MIN_PROBABILITY)))
        self._log_p.append(log_p)
        adapted = adapted_prior(np.stack(self._log_p), prior, np.asarray(model.held, bool))
        shifted = (log_p + prior_shift(prior, adapted)) / temperature
        return np.asarray(np.exp(log_softmax(shifted)), np.float32)
