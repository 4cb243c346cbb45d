"""The split of a sample, while samples come, go and come back."""

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


def parts_of(splits: Splits) -> dict[str, Split]:
    """In the order in which a ledger keeps them."""
    assigned = zip(PARTS, (splits.train, splits.held_out, splits.test), strict=True)
    return {each.sha256: part for part, samples in assigned for each in samples}


def features_of(samples: tuple[Sample, ...], scenes: int = 5) -> np.ndarray:
    """A content always has the same features. Those of one scene are similar but not equal."""
    rows = []
    for each in samples:
        number = int(each.sha256[:8], 16)
        scene = np.random.default_rng(number % scenes).normal(size=16)
        rows.append(scene + 0.1 * np.random.default_rng(number).normal(size=16))
    return np.array(rows, np.float32).reshape(-1, 16)


class Device:
    """What a device keeps from one scan to the next."""

    def __init__(self) -> None:
        self.kept: dict[str, Split] = {}

    def scan(self, samples: list[Sample], tests: list[Sample] | None = None) -> Splits:
        present = {each.sha256 for each in samples + (tests or [])}
        splits = assign_splits(
            samples, tests, {sha256: part for sha256, part in self.kept.items() if sha256 in present}
        )
        splits = assign_new_samples(splits, features_of(splits.unassigned_samples))
        self.kept |= parts_of(splits)
        return splits


# Of each scan: which of 30 contents exist, and which of them are in the user's test folder, if there is one.
Scans = st.lists(
    st.tuples(st.sets(st.integers(0, 29)), st.none() | st.sets(st.integers(0, 29))), min_size=1, max_size=8
)


@settings(max_examples=200, deadline=None)
@given(scans=Scans, relabelled=st.sets(st.integers(0, 29), max_size=3))
def test_no_sample_is_both_trained_and_tested_and_every_class_trains_and_holds_out(
    scans: list[tuple[set[int], set[int] | None]], relabelled: set[int]
) -> None:
    device = Device()
    tested: set[str] = set()
    trained: set[str] = set()
    for index, (numbers, test_numbers) in enumerate(scans):

        def labelled(number: int, index: int = index) -> Sample:
            return sample(number, (number + (index if number in relabelled else 0)) % CLASSES)

        tests = None if test_numbers is None else [labelled(number) for number in sorted(test_numbers)]
        splits = device.scan([labelled(number) for number in sorted(numbers)], tests)
        assert not splits.unassigned
        assert len({each.sha256 for each in splits.samples}) == len(splits.samples)
        trained |= {each.sha256 for each in splits.train + splits.held_out}
        tested |= {each.sha256 for each in splits.test}
        assert not trained & tested
        assert {each.label for each in splits.train} == {each.label for each in splits.held_out}
        used = {each.path for each in splits.samples}
        assert used | {each.path for each in splits.skipped} == {
            sample(n).path for n in numbers | (test_numbers or set())
        }
        for label in range(CLASSES):
            unused = [n for n in numbers if labelled(n).label == label and sample(n).path not in used]
            assert tests is not None or len(unused) < LEAST


@settings(max_examples=200, deadline=None)
@given(scans=st.lists(st.sets(st.integers(0, 29)), min_size=1, max_size=6))
def test_a_sample_moves_only_if_its_class_has_lost_a_whole_split(scans: list[set[int]]) -> None:
    device = Device()
    for numbers in scans:
        before = dict(device.kept)
        splits = device.scan([sample(number) for number in sorted(numbers)])
        old = [before[sha256] for sha256 in parts_of(splits) if sha256 in before]
        changed = [sha256 for sha256, part in parts_of(splits).items() if before.get(sha256, part) is not part]
        assert len(changed) <= 1
        if changed:
            assert len({*old} - {Split.TEST}) == 1
            new = {part for sha256, part in parts_of(splits).items() if sha256 not in before}
            assert new <= {Split.TEST}  # another new sample would have filled the split


def test_the_order_of_samples_does_not_change_when_others_come() -> None:
    """So a round that is repeated after a restart shuffles in the same way."""
    device = Device()
    first = device.scan([sample(number) for number in range(20)])
    again = device.scan([sample(number) for number in reversed(range(20))])
    assert (again.train, again.held_out, again.test) == (first.train, first.held_out, first.test)
    more = device.scan([sample(number) for number in range(40)])
    for old, new in ((first.train, more.train), (first.held_out, more.held_out), (first.test, more.test)):
        assert new[: len(old)] == old
        assert len(new) > len(old)


def test_about_a_fifth_of_new_samples_are_test_samples_by_their_hashes() -> None:
    device = Device()
    device.scan([sample(number) for number in range(10)])
    splits = device.scan([sample(number) for number in range(500)])
    late = {each.sha256 for each in splits.test} - {sample(number).sha256 for number in range(10)}
    assert late == {s.sha256 for s in map(sample, range(10, 500)) if int(s.sha256[:8], 16) / 2**32 < TEST_SHARE}
    assert abs(len(late) / 490 - TEST_SHARE) < 0.05


def test_new_samples_join_the_split_of_their_near_duplicates() -> None:
    device = Device()
    device.scan([sample(number) for number in range(10)])
    splits = device.scan([sample(number) for number in range(60)])
    scenes: dict[int, set[Split]] = {}
    for sha256, part in parts_of(splits).items():
        if part is not Split.TEST:
            scenes.setdefault(int(sha256[:8], 16) % 5, set()).add(part)
    known = {scene: parts for scene, parts in scenes.items() if len(parts) == 1}
    assert len(known) >= 4  # the first assignment holds out a number of samples, and may divide one scene


def test_samples_without_near_duplicates_keep_the_held_out_share() -> None:
    """Each new sample is a scene of its own."""
    device = Device()
    device.scan([sample(number) for number in range(5)])
    for count in range(6, 200, 7):
        samples = [sample(number) for number in range(count)]
        splits = assign_splits(samples, None, device.kept)
        features = np.eye(200, dtype=np.float32)[: len(splits.unassigned_samples)]
        splits = assign_new_samples(splits, features)
        device.kept = parts_of(splits)
        share = len(splits.held_out) / len(splits.train + splits.held_out)
        assert abs(share - HELD_OUT_SHARE) < 0.6 / len(splits.train + splits.held_out) + 0.1


def test_near_duplicates_are_never_in_two_splits() -> None:
    device = Device()
    first = device.scan([sample(number) for number in range(12)])
    rng = np.random.default_rng(0)
    directions = {each.sha256: rng.normal(size=16) for each in first.samples}
    samples = list(first.samples)
    original_of: dict[str, str] = {}
    for number in range(100, 160):
        new = sample(number)
        original_of[new.sha256] = samples[rng.integers(len(samples))].sha256  # an old sample or another new one
        directions[new.sha256] = directions[original_of[new.sha256]] * rng.uniform(0.5, 2)
        samples.append(new)
    splits = assign_splits(samples, None, device.kept)
    features = np.array([directions[each.sha256] for each in splits.unassigned_samples], np.float32)
    parts = parts_of(assign_new_samples(splits, features))
    tested = {sha256 for sha256, part in parts.items() if part is Split.TEST}
    for new, original in original_of.items():
        if new not in tested and original not in tested:
            assert parts[new] is parts[original]
