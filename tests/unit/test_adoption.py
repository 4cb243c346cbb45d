"""Whether a new personalized model replaces the one in use."""

from __future__ import annotations

import pytest

from edge_runtime.training.adoption import MARGIN, ModelScore, is_adopted

USED = ModelScore(session="s", bundle="a" * 64, task="b" * 64, nll=0.6, best_nll=0.5)


@pytest.mark.parametrize(
    ("change", "adopted"),
    [
        ({"nll": 0.4}, True),
        ({"nll": 0.5 + MARGIN - 0.01}, True),
        ({"nll": 0.5 + MARGIN + 0.01}, False),  # relative to the best, so that it cannot fall step by step
        ({"nll": 0.6, "session": "t"}, True),
        ({"nll": 0.61, "session": "t"}, False),  # a new run must be as good
        ({"nll": 0.1, "session": "t", "has_head": False}, False),  # it knows the device's own classes only
        ({"nll": 9.0, "bundle": "b" * 64}, True),
    ],
)
def test_a_model_is_adopted_unless_held_out_samples_are_less_likely(change: dict[str, object], adopted: bool) -> None:
    assert is_adopted(USED.model_copy(update=change), USED) is adopted


def test_the_first_model_and_any_model_after_one_without_a_global_head_are_adopted() -> None:
    assert is_adopted(USED, None)
    assert is_adopted(USED.model_copy(update={"nll": 9.0}), USED.model_copy(update={"has_head": False}))
