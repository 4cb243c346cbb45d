"""Of several processes with one name, the newest."""

from __future__ import annotations

from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from fedfmsl.protocol.duplicate_name import DuplicateNameGuard


def after(*instances: str) -> DuplicateNameGuard:
    return reduce(DuplicateNameGuard.observe, instances, DuplicateNameGuard("me"))


def test_a_process_seen_before_this_one_is_earlier_for_ever() -> None:
    guard = after("before", "me", "before")
    assert not guard.is_newer("before")
    assert not guard.is_newer("me")
    assert guard.is_newer("after")


def test_nothing_is_newer_until_this_process_has_seen_itself() -> None:
    assert not after("other").confirmed
    assert not after("other").is_newer("another")


@given(st.permutations("abcde"), st.data())
def test_of_any_number_of_processes_only_the_last_to_publish_finds_no_newer_one(
    names: list[str], data: st.DataObject
) -> None:
    """Each subscribes before it publishes, and receives the retained status first."""
    stay = []
    for position, name in enumerate(names):
        since = data.draw(st.integers(0, position))
        received = names[max(since - 1, 0) :]
        guard = reduce(DuplicateNameGuard.observe, received, DuplicateNameGuard(name))
        stay += [] if any(guard.is_newer(other) for other in received) else [name]
    assert stay == [names[-1]]
