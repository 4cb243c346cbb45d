"""Checks of settings, for `__post_init__` of frozen dataclasses."""

from __future__ import annotations

import math
from typing import Any


def check_range(
    settings: object,
    field: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Raises ValueError unless the field is a finite number in the range."""
    value: Any = getattr(settings, field)
    if math.isfinite(value) and at_least <= value <= at_most and above < value < below:
        return
    bounds = {"at least": at_least, "above": above, "below": below, "at most": at_most}
    text = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    raise ValueError(f"{type(settings).__name__}.{field} is {value!r}; it must be {text or 'finite'}")
