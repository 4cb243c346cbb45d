"""Checks of numbers: arguments of functions, and settings in `__post_init__` of frozen dataclasses."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Raises TypeError unless the value is a number, ValueError unless it is finite and in the range."""
    is_number = isinstance(value, Real)  # also of numpy
    if not is_number:
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if -math.inf < value < math.inf and at_least <= value <= at_most and above < value < below:
        return
    bounds = {"at least": at_least, "above": above, "below": below, "at most": at_most}
    text = " and ".join(f"{word} {_format(bound)}" for word, bound in bounds.items() if math.isfinite(bound))
    raise ValueError(f"{name} is {value!r}; it must be {text or 'finite'}")


def check_range(settings: object, field: str, **bounds: float) -> None:
    """`check_number` of a field of a dataclass."""
    check_number(f"{type(settings).__name__}.{field}", getattr(settings, field), **bounds)


def _format(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
