"""Updates that point away from the others do not enter the mean."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pytest

from fedfmsl.algorithms.aggregation import Contribution, ScreenedMean, WeightedMean
from fedfmsl.algorithms.agreement import agreeing, agreements, directions, recent_agreements
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.algorithms.bounds import l2_norm
from fedfmsl.algorithms.vector_sums import weighted_sums

PARTS = {"head": slice(0, 300), "0": slice(300, 400)}
NOISE = 1.5  # relative to what the updates have in common: cosines of about 0.3, as of devices with different classes


def updates(devices: int, seed: int, common: float = 1.0) -> Floats:
    rng = np.random.default_rng(seed)
    shared = common * rng.normal(size=400)
    return np.asarray(shared + NOISE * rng.normal(size=(devices, 400)), np.float32)


def agreements_of(owners: Sequence[Hashable], rows: Sequence[Floats]) -> list[float]:
    norms, sizes = [l2_norm(row) for row in rows], [row.size for row in rows]
    (total,) = weighted_sums(lambda index: rows[index], directions(norms)[None], max(sizes))
    return agreements(owners, norms, sizes, total, lambda index: rows[index])


def left_out(rows: Floats, former: list[float | None], weights: list[float] | None = None) -> tuple[list[int], Floats]:
    """The indices of the contributions that do not enter the mean, and the mean."""
    contributions = [
        Contribution(weight, row.size, lambda row=row: row, before)
        for row, before, weight in zip(rows, former, weights or [1.0] * len(rows), strict=True)
    ]
    result = ScreenedMean().aggregate(contributions, PARTS)
    kept = agreeing([found for found in result.agreements if found is not None])
    return [index for index, agrees in enumerate(kept) if not agrees], np.asarray(result.delta)


@pytest.mark.parametrize("common", [1.0, 0.3, 0.0])  # 0: after convergence only noise is left
@pytest.mark.parametrize("devices", [1, 2, 3, 6, 10, 100])
def test_without_an_attacker_the_result_is_the_weighted_mean(devices: int, common: float) -> None:
    rows = updates(devices, devices, common)
    contributions = [Contribution.of(row, 1.0 + index) for index, row in enumerate(rows)]
    screened = ScreenedMean().aggregate(contributions, PARTS)
    mean = WeightedMean().aggregate(contributions, PARTS)
    assert screened.delta.tobytes() == mean.delta.tobytes()
    assert screened.trained == mean.trained


@pytest.mark.parametrize(("devices", "hostile"), [(3, 1), (6, 1), (10, 2), (100, 20)])
@pytest.mark.parametrize("factor", [-1.0, -10.0])
@pytest.mark.parametrize("same", [False, True])
def test_updates_against_the_others_are_left_out(devices: int, hostile: int, factor: float, same: bool) -> None:
    rows = updates(devices, devices)
    rows[:hostile] *= factor
    if same:  # attackers that agree with each other
        rows[:hostile] = factor * rows[hostile:].mean(axis=0)
    bad, mean = left_out(rows, [None] * devices, [1e6] * hostile + [1.0] * (devices - hostile))
    assert bad == list(range(hostile))
    assert np.allclose(mean, rows[hostile:].mean(axis=0), atol=1e-6)


def test_two_updates_of_one_device_are_not_each_others_support() -> None:
    rows = updates(4, 0)
    found = agreements_of(["a", "a", "b", "c"], [*rows])
    for own in (0, 1):
        alone = agreements_of(range(3), [*rows[[own, 2, 3]]])
        assert found[own] == pytest.approx(alone[0])
    assert found[2:] == agreements_of(range(4), [*rows])[2:]


def test_a_device_that_never_agrees_is_left_out_from_the_second_round_on() -> None:
    """As one with wrong labels: its updates are not opposed to the others, only of another direction."""
    former: list[float | None] = [None] * 6
    bad = []
    for round_ in range(3):
        rows = updates(6, round_)
        rows[0] = NOISE * np.random.default_rng([round_, 1]).normal(size=400)
        bad.append(left_out(rows, former)[0])
        found = agreements_of(range(6), [*rows])
        former = [*recent_agreements(found, former)]
    assert bad[1:] == [[0], [0]]


def test_one_bad_round_does_not_exclude_a_device_that_has_agreed_before() -> None:
    found = [0.5, 0.5, 0.45, 0.05]
    assert agreeing(recent_agreements(found, [None, None, None, None])) == [True] * 4
    assert agreeing(recent_agreements(found, [0.5, 0.5, 0.5, 0.5])) == [True] * 4
    assert agreeing(recent_agreements(found, [0.5, 0.5, 0.5, 0.1])) == [True, True, True, False]
    assert agreeing(recent_agreements([0.5, 0.5, 0.45, -0.5], [0.5] * 4)) == [True, True, True, False]


@pytest.mark.parametrize("values", [[], [0.3], [-0.2, -0.4], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0, 1.0]])
def test_at_least_half_of_the_devices_are_kept(values: list[float]) -> None:
    assert sum(agreeing(values)) >= len(values) / 2


def test_an_update_of_zeros_and_a_lower_level_do_not_disturb_the_others() -> None:
    rows = [*updates(6, 0)]
    rows[0], rows[1] = np.zeros(400, np.float32), rows[1][:300]
    found = agreements_of(range(6), rows)
    assert found[0] == 0.0
    assert min(found[1:]) > 0.2
    contributions = [Contribution.of(row) for row in rows]
    assert ScreenedMean().aggregate(contributions, PARTS).trained == (slice(0, 300), slice(300, 400))
