"""The head of a run that goes on with other classes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedfmsl.algorithms.class_mapping import NEW, class_indices, mapped_head

WIDTH = 3
NAMES = "abcdefgh"
lists = st.lists(st.sampled_from(NAMES), min_size=2, max_size=6, unique=True).map(tuple)
seeds = st.integers(0, 999)


def random_head(classes: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 2, classes * (WIDTH + 1)).astype(np.float32)


def zeros(classes: int) -> NDArray[np.float32]:
    return np.zeros(classes * (WIDTH + 1), np.float32)


def logits(head: NDArray[np.float32], names: tuple[str, ...]) -> dict[str, NDArray[np.float64]]:
    """By class, of ten samples."""
    features = np.random.default_rng(7).normal(size=(10, WIDTH))
    weight, bias = head[: -len(names)].reshape(len(names), WIDTH), head[-len(names) :]
    return {name: features @ row.astype(np.float64) + b for name, row, b in zip(names, weight, bias, strict=True)}


@settings(max_examples=50)
@given(lists, lists, seeds)
def test_kept_classes_keep_their_logits_bit_by_bit(before: tuple[str, ...], after: tuple[str, ...], seed: int) -> None:
    head = random_head(len(before), seed)
    mapped = mapped_head(head, class_indices(before, after), random_head(len(after), seed + 1))
    old, new = logits(head, before), logits(mapped, after)
    assert mapped.dtype == np.float32 and np.isfinite(mapped).all()
    assert all(np.array_equal(old[name], new[name]) for name in set(before) & set(after))


@settings(max_examples=30)
@given(lists, seeds)
def test_the_same_classes_in_the_same_order_are_the_same_bits(names: tuple[str, ...], seed: int) -> None:
    head = random_head(len(names), seed)
    assert mapped_head(head, class_indices(names, names), zeros(len(names))).tobytes() == head.tobytes()


@settings(max_examples=50)
@given(lists, st.permutations(NAMES), seeds)
def test_the_order_of_classes_permutes_predictions(before: tuple[str, ...], order: list[str], seed: int) -> None:
    """Also those of new classes."""
    head, fresh = random_head(len(before), seed), random_head(len(NAMES), seed + 1)
    one = mapped_head(head, class_indices(before, NAMES), fresh)
    moved = mapped_head(
        fresh, class_indices(NAMES, order), zeros(len(NAMES))
    )  # no class is new: only the order changes
    other = logits(mapped_head(head, class_indices(before, order), moved), tuple(order))
    for name, values in logits(one, tuple(NAMES)).items():
        assert np.allclose(other[name], values, rtol=1e-4, atol=1e-4)


@settings(max_examples=50)
@given(lists, lists, seeds, st.floats(-5, 5))
def test_new_rows_follow_the_frame_of_the_kept_ones(
    before: tuple[str, ...], after: tuple[str, ...], seed: int, shift: float
) -> None:
    """Equal shifts of all logits, of the earlier head or of the fresh one, do not change predictions."""
    head, fresh = random_head(len(before), seed), random_head(len(after), seed + 1)
    indices = class_indices(before, after)
    if (indices == NEW).all():
        return

    def differences(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
        values = np.stack(list(logits(mapped_head(one, indices, other), after).values()))
        return values - values.mean(axis=0)

    constant = np.float32(shift)
    expected = differences(head, fresh)
    assert np.allclose(differences(head + constant, fresh), expected, atol=1e-3)
    assert np.allclose(differences(head, fresh + constant), expected, atol=1e-3)


def test_a_new_class_without_a_fresh_row_starts_at_the_mean_of_the_kept_rows() -> None:
    head = random_head(3, 0)
    mapped = mapped_head(head, class_indices("abc", "xcab"), zeros(4))
    found = logits(mapped, tuple("xcab"))
    assert np.allclose(found["x"], np.mean([found[name] for name in "abc"], axis=0), atol=1e-5)


def test_a_new_row_has_the_scale_of_the_kept_rows() -> None:
    """The fresh head is ten times flatter than the earlier one, and equal otherwise."""
    head = random_head(4, 0)
    mapped = mapped_head(first_rows(head, 3), class_indices("abc", "abcd"), head / 10)
    assert np.allclose(mapped, head, atol=1e-4)


def first_rows(head: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The flat head of the first classes of four."""
    return np.concatenate([head[: count * WIDTH], head[4 * WIDTH : 4 * WIDTH + count]])


def test_without_kept_classes_the_head_is_the_fresh_one() -> None:
    fresh = random_head(2, 1)
    assert np.array_equal(mapped_head(random_head(3, 0), class_indices("abc", "xy"), fresh), fresh)


def test_heads_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 4"):
        mapped_head(np.zeros(10, np.float32), class_indices("ab", "ab"), zeros(2))
