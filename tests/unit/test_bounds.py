"""Bounds on single contributions, relative to those of the others."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedfmsl.algorithms.bounds import capped_weights, l2_norm, norm_limit


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ([], []),
        ([0, 0], [0, 0]),
        ([100, 80, 120, 1e6], [100, 80, 120, 165]),
        ([1e6], [1e6]),
        ([0, 0, 0, 50, 60, 1e6], [0, 0, 0, 50, 60, 90]),  # devices without samples do not lower the cap
    ],
)
def test_a_weight_is_capped_relative_to_the_median(weights: list[float], wanted: list[float]) -> None:
    assert capped_weights(weights) == wanted


@pytest.mark.parametrize(
    ("norms", "recent", "limit"),
    [
        ([], (), math.inf),
        ([0.7, 0.8, 0.6, 999.0], (), 1.5),
        ([999.0], (0.7, 0.8, 0.6), 1.4),  # alone in its round
        ([999.0, 0.7, 999.0], (0.7, 0.8, 0.6), 1.4),  # the majority of its round
        ([0.0, 0.0, 0.0], (), 0.0),
    ],
)
def test_the_limit_of_norms_follows_the_median(norms: list[float], recent: tuple[float, ...], limit: float) -> None:
    assert norm_limit(norms, recent) == pytest.approx(limit)


def test_the_norm_does_not_overflow() -> None:
    assert l2_norm(np.full(4, 1e38, np.float32)) == pytest.approx(2e38)
