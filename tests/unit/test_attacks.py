"""The attacks of the membership benchmark find what is there to find, and no more."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.attacks import (
    balanced_accuracy,
    class_gram,
    cosine,
    feature_from_logits,
    least_squares_weights,
    linear_weights,
    moment_gram,
)
from fedfmsl.algorithms.class_means import class_sums
from fedfmsl.algorithms.discriminant import second_moments

PHOTOS, WIDTH, CLASSES = 120, 64, 4
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(1, 1, (PHOTOS, WIDTH))
LABELS = np.arange(PHOTOS) % CLASSES
MEMBERS = RNG.permutation(np.arange(PHOTOS) < PHOTOS // 2)


def test_class_sums_of_features_tell_every_member() -> None:
    sums = class_sums(FEATURES[MEMBERS].astype(np.float32), LABELS[MEMBERS], CLASSES)["class_sums"]
    for label, total in enumerate(sums):
        own = label == LABELS
        weights = least_squares_weights(FEATURES[own], total.astype(np.float64))
        assert balanced_accuracy(weights, MEMBERS[own], LABELS[own]) == 1
    gram = class_gram(FEATURES, LABELS)
    assert balanced_accuracy(linear_weights(gram, gram @ MEMBERS, 0.5), MEMBERS, LABELS) == 1


def test_second_moments_tell_every_member_and_the_gram_is_theirs() -> None:
    gram = moment_gram(FEATURES)
    terms = np.stack([second_moments(row[None]) for row in FEATURES.astype(np.float32)]).astype(np.float64)
    assert np.allclose(gram, terms @ terms.T, rtol=1e-4)
    assert balanced_accuracy(linear_weights(gram, gram @ MEMBERS, 0.5), MEMBERS, LABELS) == 1


@pytest.mark.parametrize("numbers", [1, 2])
def test_fewer_numbers_tell_less(numbers: int) -> None:
    """Of m candidates of a class, N numbers tell the members in a share of about ½ + 0.4 · √(N / m)."""
    found = []
    for seed in range(30):
        members = np.random.default_rng(seed).permutation(PHOTOS) < PHOTOS // 2
        gram = class_gram(FEATURES[:, :numbers], LABELS)
        found.append(balanced_accuracy(linear_weights(gram, gram @ members, 0.5), members, LABELS))
    # the attacker knows the counts anyhow
    expected = 0.5 + 0.4 * (numbers * CLASSES / PHOTOS) ** 0.5
    assert np.mean(found) == pytest.approx(expected, abs=0.04)


def test_a_lone_photo_s_sum_is_its_feature_and_its_logits_are_not() -> None:
    photo, others = FEATURES[0], FEATURES[1:].mean(axis=0)
    weight = RNG.normal(size=(CLASSES, WIDTH))
    guess = feature_from_logits(weight, weight @ photo, others)
    assert np.allclose(weight @ guess, weight @ photo)
    assert cosine(photo - others, photo - others) == pytest.approx(1)
    assert cosine(guess - others, photo - others) == pytest.approx((CLASSES / WIDTH) ** 0.5, abs=0.15)
