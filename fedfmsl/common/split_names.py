"""The usual names of folders and files that hold a split of a data set (ours)."""

from __future__ import annotations

import re
from enum import Enum

_NAMES = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<test>test(?:ing)?)|(?P<validation>val(?:id(?:ation)?)?|dev|eval(?:uation)?))"
    r"(?:[-_ ]?(?:set|split|data|images|photos|texts))?",
    re.IGNORECASE,
)


class Role(Enum):
    TRAIN = "train"
    TEST = "test"
    VALIDATION = "validation"


def role_of(name: str) -> Role | None:
    """The split that a name like `Training`, `test_set` or `val` says. None: it says none."""
    found = _NAMES.fullmatch(name)
    return Role(found.lastgroup) if found else None
