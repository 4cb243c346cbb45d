"""Which slice a sample is of, while samples come, go and come back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.data.samples import (
    HELD_OUT_SHARE,
    LEAST,
    TEST_SHARE,
    Sample,
    Split,
    Splits,
    assign_new_samples,
    assign_splits,
)

CLASSES = 2
PARTS = (Split.TRAIN, Split.HELD_OUT, Split.TEST)


def sample(number: int, label: int = 0) -> Sample:
    return Sample(Path(f"{number}.jpg"), hashlib.sha256(f"{number}".encode()).hexdigest(), label)


def parts_of(slices: Splits) -> dict[str, Split]:
    """In the order in which a ledger keeps them."""
    dealt = zip(PARTS, (slices.train, slices.held_out, slices.test), strict=True)
    return {each.sha256: part for part, samples in dealt for each in samples}


def features_of(samples: tuple[Sample, ...], scenes: int = 5) -> np.ndarray:
    """Of a few scenes, a content always the same; those of one scene are alike but not equal."""
    rows = []
    for each in samples:
        number = int(each.sha256[:8], 16)
        scene = np.random.default_rng(number % scenes).normal(size=16)
        rows.append(scene + 0.1 * np.random.default_rng(number).normal(size=16))
    return np.array(rows, np.float32).reshape(-1, 16)


class Device:
    """What a device keeps from one look to the next."""

    def __init__(self) -> None:
        self.kept: dict[str, Split] = {}

    def look(self, samples: list[Sample], apart: list[Sample] | None = None) -> Splits:
        present = {each.sha256 for each in samples + (apart or [])}
        slices = assign_splits(
            samples, apart, {sha256: part for sha256, part in self.kept.items() if sha256 in present}
        )
        slices = assign_new_samples(slices, features_of(slices.unassigned_samples))
        self.kept |= parts_of(slices)
        return slices


# At each look: which of 30 contents are there, and which of them the user keeps apart, if any.
Looks = st.lists(
    st.tuples(st.sets(st.integers(0, 29)), st.none() | st.sets(st.integers(0, 29))), min_size=1, max_size=8
)


@settings(max_examples=200, deadline=None)
@given(looks=Looks, relabelled=st.sets(st.integers(0, 29), max_size=3))
def test_however_samples_come_and_go_none_is_tested_and_trained_and_every_class_trains_and_holds_out(
    looks: list[tuple[set[int], set[int] | None]], relabelled: set[int]
) -> None:
    device = Device()
    tested: set[str] = set()
    trained: set[str] = set()
    for index, (numbers, apart) in enumerate(looks):

        def labelled(number: int, index: int = index) -> Sample:
            return sample(number, (number + (index if number in relabelled else 0)) % CLASSES)

        lie_apart = None if apart is None else [labelled(number) for number in sorted(apart)]
        slices = device.look([labelled(number) for number in sorted(numbers)], lie_apart)
        assert not slices.unassigned
        assert len({each.sha256 for each in slices.samples}) == len(slices.samples)
        trained |= {each.sha256 for each in slices.train + slices.held_out}
        tested |= {each.sha256 for each in slices.test}
        assert not trained & tested
        assert {each.label for each in slices.train} == {each.label for each in slices.held_out}
        used = {each.path for each in slices.samples}
        assert used | {each.path for each in slices.skipped} == {sample(n).path for n in numbers | (apart or set())}
        for label in range(CLASSES):
            unused = [n for n in numbers if labelled(n).label == label and sample(n).path not in used]
            assert apart is not None or len(unused) < LEAST


@settings(max_examples=200, deadline=None)
@given(looks=st.lists(st.sets(st.integers(0, 29)), min_size=1, max_size=6))
def test_a_sample_changes_over_only_where_its_class_had_lost_a_whole_slice(looks: list[set[int]]) -> None:
    device = Device()
    for numbers in looks:
        before = dict(device.kept)
        slices = device.look([sample(number) for number in sorted(numbers)])
        old = [before[sha256] for sha256 in parts_of(slices) if sha256 in before]
        changed = [sha256 for sha256, part in parts_of(slices).items() if before.get(sha256, part) is not part]
        assert len(changed) <= 1
        if changed:
            assert len({*old} - {Split.TEST}) == 1
            new = {part for sha256, part in parts_of(slices).items() if sha256 not in before}
            assert new <= {Split.TEST}  # any other would have filled the slice


def test_the_order_of_samples_does_not_change_when_others_come() -> None:
    """So that a round done again after a restart shuffles the same way."""
    device = Device()
    first = device.look([sample(number) for number in range(20)])
    again = device.look([sample(number) for number in reversed(range(20))])
    assert (again.train, again.held_out, again.test) == (first.train, first.held_out, first.test)
    more = device.look([sample(number) for number in range(40)])
    for old, new in ((first.train, more.train), (first.held_out, more.held_out), (first.test, more.test)):
        assert new[: len(old)] == old
        assert len(new) > len(old)


def test_newcomers_are_tested_on_as_their_hashes_say_about_a_fifth_of_them() -> None:
    device = Device()
    device.look([sample(number) for number in range(10)])
    slices = device.look([sample(number) for number in range(500)])
    late = {each.sha256 for each in slices.test} - {sample(number).sha256 for number in range(10)}
    assert late == {s.sha256 for s in map(sample, range(10, 500)) if int(s.sha256[:8], 16) / 2**32 < TEST_SHARE}
    assert abs(len(late) / 490 - TEST_SHARE) < 0.05


def test_newcomers_join_the_slice_of_what_they_look_like() -> None:
    device = Device()
    device.look([sample(number) for number in range(10)])
    slices = device.look([sample(number) for number in range(60)])
    scenes: dict[int, set[Split]] = {}
    for sha256, part in parts_of(slices).items():
        if part is not Split.TEST:
            scenes.setdefault(int(sha256[:8], 16) % 5, set()).add(part)
    known = {scene: parts for scene, parts in scenes.items() if len(parts) == 1}
    assert len(known) >= 4  # the first deal may have parted one scene, for it holds out a number of samples


def test_scenes_that_look_like_nothing_keep_the_share_that_is_held_out() -> None:
    """Each newcomer a scene of its own: nothing it looks like."""
    device = Device()
    device.look([sample(number) for number in range(5)])
    for count in range(6, 200, 7):
        samples = [sample(number) for number in range(count)]
        slices = assign_splits(samples, None, device.kept)
        features = np.eye(200, dtype=np.float32)[: len(slices.unassigned_samples)]
        slices = assign_new_samples(slices, features)
        device.kept = parts_of(slices)
        share = len(slices.held_out) / len(slices.train + slices.held_out)
        assert abs(share - HELD_OUT_SHARE) < 0.6 / len(slices.train + slices.held_out) + 0.1


def test_twins_are_never_parted_however_many_come_at_once() -> None:
    device = Device()
    first = device.look([sample(number) for number in range(12)])
    rng = np.random.default_rng(0)
    directions = {each.sha256: rng.normal(size=16) for each in first.samples}
    samples = list(first.samples)
    twin_of: dict[str, str] = {}
    for number in range(100, 160):
        new = sample(number)
        twin_of[new.sha256] = samples[rng.integers(len(samples))].sha256  # of an old one, or of another newcomer
        directions[new.sha256] = directions[twin_of[new.sha256]] * rng.uniform(0.5, 2)
        samples.append(new)
    slices = assign_splits(samples, None, device.kept)
    features = np.array([directions[each.sha256] for each in slices.unassigned_samples], np.float32)
    parts = parts_of(assign_new_samples(slices, features))
    tested = {sha256 for sha256, part in parts.items() if part is Split.TEST}
    for new, twin in twin_of.items():
        if new not in tested and twin not in tested:
            assert parts[new] is parts[twin]
