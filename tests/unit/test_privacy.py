"""Noise on the device, and its privacy budget."""

from __future__ import annotations

from math import erf, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfmsl.algorithms.accounting import (
    MOST_HOLDERS,
    epsilon,
    epsilons,
    gaussian_epsilon,
    strongest_mu_squared,
)
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.class_means import class_mean_head
from fedfmsl.algorithms.fixed_point import numbers
from fedfmsl.algorithms.privacy import Privacy, clipped, privatize, privatize_statistics, privatize_words
from fedfmsl.algorithms.secure_aggregation import NEIGHBOURS

CLASSES, FEATURE = 5, 48
ALMOST_NONE = Privacy(clip=1.0, noise_multiplier=1e-7, shares=1)


def sums(rng: np.random.Generator, images: int = 30) -> dict[str, Vector]:
    """The statistics of a device with images of every class but the last."""
    means = np.random.default_rng(7).normal(size=(CLASSES, FEATURE))
    labels = np.arange(images) % (CLASSES - 1)
    features = means[labels] + 0.3 * rng.normal(size=(images, FEATURE))
    one_hot = np.eye(CLASSES)[labels]
    return {
        "class_sums": (one_hot.T @ features).astype(np.float32),
        "class_counts": one_hot.sum(axis=0).astype(np.float32),
        "norm_sum": np.array([np.linalg.norm(features, axis=1).sum()], np.float32),
    }


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_without_noise_only_longer_updates_are_clipped(clip: float, length: float, seed: int) -> None:
    direction = np.random.default_rng(seed).normal(size=20)
    delta = (direction / np.linalg.norm(direction) * length).astype(np.float32)
    quiet = Privacy(clip=clip, noise_multiplier=1e-12, shares=1)
    result = privatize(delta, quiet, np.random.default_rng(0))
    assert np.linalg.norm(result) == pytest.approx(min(clip, length), rel=1e-5)
    assert result @ delta == pytest.approx(np.linalg.norm(result) * np.linalg.norm(delta), rel=1e-5)


@pytest.mark.parametrize("shares", [1, 16])
def test_the_noise_is_gaussian_with_the_documented_deviation(shares: int) -> None:
    privacy = Privacy(clip=3.0, noise_multiplier=0.8, shares=shares)
    noise = privatize(np.zeros(200_000, np.float32), privacy, np.random.default_rng(1))
    deviation = 0.8 * 3.0 / sqrt(shares)
    assert noise.mean() == pytest.approx(0, abs=5 * deviation / sqrt(noise.size))
    assert noise.std() == pytest.approx(deviation, rel=0.01)
    assert (np.abs(noise) < deviation).mean() == pytest.approx(erf(1 / sqrt(2)), abs=0.005)


def test_the_shares_of_all_devices_add_up_to_the_whole_noise() -> None:
    privacy, rng = Privacy(clip=2.0, noise_multiplier=1.5, shares=10), np.random.default_rng(2)
    total = sum(privatize(np.zeros(20_000, np.float32), privacy, rng).astype(np.float64) for _ in range(10))
    assert np.std(total) == pytest.approx(1.5 * 2.0, rel=0.02)


def test_two_updates_have_different_noise() -> None:
    privacy, delta = Privacy(clip=1.0, noise_multiplier=1.0, shares=1), np.zeros(8, np.float32)
    one, two = (privatize(delta, privacy, np.random.default_rng()) for _ in range(2))
    assert not np.isclose(one, two).any()


def test_with_almost_no_noise_the_head_is_that_of_the_plain_class_means() -> None:
    rng = np.random.default_rng(3)
    plain = [sums(rng) for _ in range(4)]
    private = [privatize_statistics(one, ALMOST_NONE, rng) for one in plain]

    def head(all_: list[dict[str, Vector]]) -> Vector:
        total = {name: np.sum([one[name] for one in all_], axis=0) for name in all_[0]}
        return class_mean_head(total["class_sums"], total["class_counts"], float(total["norm_sum"][0]))

    held = (CLASSES - 1) * FEATURE  # the row of the class without samples is only noise
    assert np.allclose(head(private)[:held], head(plain)[:held], rtol=0.02, atol=0.01)
    assert not np.allclose(head(private)[:held], 1.1 * head(plain)[:held], rtol=0.02, atol=0.01)


@given(st.integers(0, 99), st.floats(1e-3, 1e4), st.integers(0, 40))
def test_no_device_changes_the_private_statistics_by_more_than_their_sensitivity(
    seed: int, scale: float, images: int
) -> None:
    own = {
        name: tensor * np.float32(scale if name != "class_counts" else 1)
        for name, tensor in sums(np.random.default_rng(seed), images).items()
    }
    sent = privatize_statistics(own, ALMOST_NONE, np.random.default_rng(0))
    largest = 4 * sqrt(FEATURE)
    u = np.append(sent["class_sums"].ravel(), sent["norm_sum"] / largest) / sqrt(2)
    assert np.linalg.norm(u) <= 1 + 1e-5


def test_the_private_statistics_have_the_noise_of_their_sensitivity() -> None:
    privacy, rng = Privacy(clip=99.0, noise_multiplier=0.5, shares=4), np.random.default_rng(4)
    own, samples = sums(rng), [privatize_statistics(sums(np.random.default_rng(5)), privacy, rng) for _ in range(400)]
    assert np.std([one["class_sums"] for one in samples], axis=0).mean() == pytest.approx(sqrt(2) * 0.25, rel=0.02)
    norms = np.std([one["norm_sum"] for one in samples])
    assert norms == pytest.approx(sqrt(2) * 0.25 * 4 * sqrt(FEATURE), rel=0.1)
    assert {name: tensor.shape for name, tensor in samples[0].items()} == {name: t.shape for name, t in own.items()}
    assert all(tensor.dtype == np.float32 for tensor in samples[0].values())


def test_the_private_counts_are_the_same_for_any_images() -> None:
    rng = np.random.default_rng(6)
    counts = [privatize_statistics(sums(rng, images), ALMOST_NONE, rng)["class_counts"] for images in (0, 3, 40)]
    assert all(np.array_equal(c, np.full(CLASSES, 1 / CLASSES, np.float32)) for c in counts)


def test_a_negative_sum_of_norms_gives_a_head_with_bounded_weights() -> None:
    rng = np.random.default_rng(0)
    directions, counts = rng.normal(size=(CLASSES, FEATURE)).astype(np.float32), np.full(CLASSES, 0.2, np.float32)
    head = class_mean_head(directions, counts, -3.0)
    assert np.isfinite(head).all()
    assert np.abs(head).max() <= 20 * 64 / sqrt(FEATURE)


def test_fixed_point_noise_adds_up_to_the_whole_noise_and_leaves_the_norm_bounded() -> None:
    privacy, rng, size = Privacy(clip=2.0, noise_multiplier=1.5, shares=10), np.random.default_rng(2), 20_000
    values = clipped(rng.normal(size=size).astype(np.float32), privacy)
    deviation = np.full(size, privacy.share)
    deviation[:100] = 0
    words = [privatize_words(values, deviation, rng, bits=30) for _ in range(privacy.shares)]
    total = numbers(np.sum(words, axis=0, dtype=np.uint64), 30)
    assert np.std(total[100:] - privacy.shares * values[100:]) == pytest.approx(1.5 * 2.0, rel=0.02)
    exact = numbers(privatize_words(values, np.zeros(size), rng, bits=30), 30)
    assert np.linalg.norm(exact) <= 2.0 and np.allclose(exact, values, atol=2**-30)
    assert np.array_equal(total[:100], privacy.shares * exact[:100])
    with pytest.raises(ValueError, match=r"noise of 1e-08 is below 100 steps of fixed-point numbers; raise --dp-noise"):
        privatize_words(values, np.full(size, 1e-8), rng, bits=30)


@pytest.mark.parametrize(  # computed by dp-accounting's PLDAccountant, the tightest
    ("noise", "rounds", "expected"),
    [(0.1, 1, 91.8173), (0.5, 17, 68.3646), (1.1, 17, 22.3458), (1.1, 200, 136.6135), (4.0, 1, 0.92634)],
)
def test_epsilon_is_that_of_the_tightest_accountant(noise: float, rounds: int, expected: float) -> None:
    assert epsilon(Privacy(clip=1.0, noise_multiplier=noise, shares=8), rounds, 1e-5) == pytest.approx(expected, 1e-5)


def test_epsilon_of_rounds_with_different_noise_is_that_of_dp_accounting() -> None:
    """Google's Rényi accountant is an upper bound, by at most a tenth here."""
    from dp_accounting import GaussianDpEvent
    from dp_accounting.rdp import RdpAccountant

    bound = RdpAccountant()
    for noise, rounds in ((0.7, 3), (2.0, 9)):
        bound.compose(GaussianDpEvent(noise), rounds)
    spent = gaussian_epsilon(3 / 0.7**2 + 9 / 2.0**2, 1e-5)
    assert 0.9 * bound.get_epsilon(1e-5) < spent < bound.get_epsilon(1e-5)


def test_the_same_noise_protects_less_from_those_who_know_a_part_of_it() -> None:
    privacy = Privacy(clip=1.0, noise_multiplier=1.0, shares=10)

    def spent(**known: Any) -> list[float]:
        return list(epsilons(privacy, 18, 1e-5, **known).values())

    def alone(shares: int) -> float:
        """ε if the rest of the noise is of so many shares."""
        return gaussian_epsilon(18 * 10 / shares, 1e-5)

    assert spent() == [alone(10), alone(9), alone(1), alone(1)]
    assert spent(updates=20)[:2] == spent()[:2]
    assert spent(updates=20)[2] == gaussian_epsilon(20 * 10, 1e-5)
    assert spent(secure=True, updates=20) == [alone(10), alone(9), alone(10), alone(9)]
    assert spent(secure=True, colluders=3)[3] == alone(7)
    assert spent(secure=True, colluders=4)[3] == alone(1)  # more than a third of them undo secure aggregation
    assert strongest_mu_squared(privacy, secure=True) == 10 / 9 and strongest_mu_squared(privacy, secure=False) == 10
    single = Privacy(clip=1.0, noise_multiplier=1.0, shares=1)  # a second update in the sum brings another share
    assert set(epsilons(single, 5, 1e-5).values()) == {gaussian_epsilon(5, 1e-5)}
    assert MOST_HOLDERS == NEIGHBOURS + 1


def test_without_mechanisms_or_with_much_noise_nothing_is_spent() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == gaussian_epsilon(1e-12, 1e-5) == 0.0
    assert gaussian_epsilon(1e-8, 1e-9) < 1e-3 and gaussian_epsilon(1e6, 1e-9) == pytest.approx(5.06e5, rel=1e-3)


def test_epsilon_grows_with_rounds_and_falls_with_noise_and_delta() -> None:
    def spent(noise: float = 1.0, rounds: int = 10, delta: float = 1e-5) -> float:
        return epsilon(Privacy(clip=1.0, noise_multiplier=noise, shares=1), rounds, delta)

    assert epsilon(Privacy(clip=1.0, noise_multiplier=1.0, shares=1), 0, 1e-5) == 0
    assert spent(rounds=5) < spent(rounds=10) < spent(rounds=11)
    assert spent(noise=2.0) < spent(noise=1.5) < spent()
    assert spent(delta=1e-3) < spent() < spent(delta=1e-9)
    assert spent() == epsilon(Privacy(clip=7.0, noise_multiplier=1.0, shares=30), 10, 1e-5)


@pytest.mark.parametrize(
    ("rounds", "delta", "text"),
    [
        (10, 1.0, "delta is 1.0; it must be above 0 and below 1"),
        (10, 0.0, "delta is 0.0; it must be above 0 and below 1"),
        (0, 2.0, "delta is 2.0; it must be above 0 and below 1"),
        (-1, 1e-5, "rounds is -1; it must be at least 0"),
    ],
)
def test_epsilon_refuses_rounds_and_delta_out_of_range(rounds: int, delta: float, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        epsilon(Privacy(clip=1.0, noise_multiplier=1.0, shares=1), rounds, delta)
