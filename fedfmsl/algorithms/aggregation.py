"""Aggregation rules: how client updates become one update. They are read one at a time.

    rule = TrimmedMean(trim=0.1)
    combined = rule.aggregate([Contribution.of(update, weight=samples), ...], parts)

Each part of the vector (the head, the LoRA of each block) is aggregated over the contributions that trained it (ours,
see SAL). A contribution of a lower level holds only the first parts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from fedfmsl.algorithms.agreement import agreeing, agreements, directions, recent_agreements
from fedfmsl.algorithms.arrays import Doubles, Parts, Vector
from fedfmsl.algorithms.checks import check_range
from fedfmsl.algorithms.steps import Values, dense, norm_of
from fedfmsl.algorithms.stored_rows import stored_rows
from fedfmsl.algorithms.vector_sums import weighted_sums

FLOAT_BYTES = 4
SORT_BYTES = 4 * 1024 * 1024  # memory for the values that a robust rule keeps or sorts at a time


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client update. `read` returns its first `size` values. `agreement`: that of the device's former rounds, for
    `ScreenedMean`; None of a new one. `owner`: its device, if a round may have several of one; "": nobody else's.
    `norm`: its L2 norm; None: unknown, so it is computed where it is needed.

    A contribution of weight 0 is ignored. Raises ValueError if the weight is negative or not finite.
    """

    weight: float
    size: int
    read: Callable[[], Values]
    agreement: float | None = None
    owner: str = ""
    norm: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "weight", at_least=0)

    @classmethod
    def of(cls, update: Vector, weight: float = 1.0) -> Contribution:
        """A contribution that is in memory."""
        return cls(weight, update.size, lambda: update)

    def in_memory(self) -> Contribution:
        """The same, read once."""
        values = self.read()
        return replace(self, read=lambda: values)

    def length(self) -> float:
        """Its L2 norm."""
        return norm_of(self.read()) if self.norm is None else self.norm


@dataclass(frozen=True)
class Aggregate:
    """The combined update. `delta` (P,) is zero outside the `trained` ranges.

    Of `ScreenedMean`: the `agreements` of the contributions after this round; None of those that are ignored.
    """

    delta: Doubles
    trained: tuple[slice, ...]
    agreements: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Region:
    """Adjacent parts that were trained by the same contributions."""

    span: slice
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True, kw_only=True)
class AggregationRule(ABC):
    """`clip`: each update is first scaled down to this L2 norm. None: no clipping."""

    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None:
            check_range(self, "clip", above=0)

    def aggregate(
        self, contributions: Sequence[Contribution], parts: Parts, least: int = 1, scratch: Path | None = None
    ) -> Aggregate:
        """The update (P,) of all parts. The same contributions in the same order give the same bits.

        Parts that fewer than `least` contributions trained count as not trained: under differential privacy, their
        sum would hold too little noise. A robust rule keeps what does not fit in memory in a file without a name in
        `scratch`; None: the folder of temporary files.

        Raises ValueError if a contribution does not end where a part ends, OSError if the file cannot be written.
        """
        delta = np.zeros(_checked_size(contributions, parts))
        regions = _regions(parts, contributions, least)
        if regions:
            self._combine(regions, delta, scratch)
        return Aggregate(delta, tuple(region.span for region in regions))

    @abstractmethod
    def _combine(self, regions: Sequence[Region], delta: Doubles, scratch: Path | None) -> None:
        """Writes the combined values of the regions into `delta`. The first region has the most contributions: those of
        every other region are among them."""

    def clipped(self, limit: float) -> AggregationRule:
        """The rule with a clip of at most `limit`, which may be infinite."""
        lowest = min(limit, math.inf if self.clip is None else self.clip)
        return self if math.isinf(lowest) else replace(self, clip=lowest)

    def _factor(self, norm: float) -> float:
        """What an update of this norm is scaled down by."""
        return 1.0 if self.clip is None or norm <= self.clip else self.clip / norm


@dataclass(frozen=True, kw_only=True)
class WeightedMean(AggregationRule):
    """Σ w·Δ / Σ w (FedAvg, McMahan et al., AISTATS 2017). Memory does not depend on the number of contributions."""

    def _combine(self, regions: Sequence[Region], delta: Doubles, scratch: Path | None) -> None:
        contributions = regions[0].contributions
        weights = [c.weight * (1.0 if self.clip is None else self._factor(c.length())) for c in contributions]
        size = max(contribution.size for contribution in contributions)
        (total,) = weighted_sums(lambda index: contributions[index].read(), np.array([weights]), size)
        _divide(total, regions, delta)


@dataclass(frozen=True, kw_only=True)
class _InnerMean(AggregationRule):
    """Per coordinate, the unweighted mean without the smallest and the largest values.

    Needs all values of a coordinate at the same time. It works through ranges of coordinates whose values take at most
    `sort_bytes`.
    """

    sort_bytes: int = SORT_BYTES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "sort_bytes", at_least=1)

    @abstractmethod
    def _cut(self, n: int) -> int:
        """How many of n values are left out at each end."""

    def _read(self, contribution: Contribution) -> Vector:
        values = contribution.read()
        factor = 1.0 if self.clip is None else self._factor(norm_of(values))
        return dense(values) if factor == 1.0 else dense(values) * np.float32(factor)

    def _combine(self, regions: Sequence[Region], delta: Doubles, scratch: Path | None) -> None:
        contributions = regions[0].contributions
        with stored_rows(len(contributions), regions[-1].span.stop, self.sort_bytes, scratch) as rows:
            for contribution in contributions:
                rows.append(self._read(contribution)[: regions[-1].span.stop])
            for region in regions:
                own = [row for row, contribution in enumerate(contributions) if contribution.size >= region.span.stop]
                cut = self._cut(len(own))
                width = max(1, self.sort_bytes // (4 * len(own)))
                for start in range(region.span.start, region.span.stop, width):
                    piece = slice(start, min(start + width, region.span.stop))
                    values = rows.block(own, piece)
                    values.sort(axis=1)
                    delta[piece] = values[:, cut : len(own) - cut].mean(axis=1, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(_InnerMean):
    """Leaves out the ⌊trim · n⌋ smallest and largest values of each coordinate (Yin et al., ICML 2018).

    Of three or more values at least one at each end, unless `trim` is 0 (ours).
    """

    trim: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "trim", at_least=0, below=0.5)

    def _cut(self, n: int) -> int:
        return min(max(math.floor(self.trim * n + 1e-9), self.trim > 0), (n - 1) // 2)


@dataclass(frozen=True, kw_only=True)
class CoordinateMedian(_InnerMean):
    """The median of each coordinate (Yin et al., ICML 2018)."""

    def _cut(self, n: int) -> int:
        return (n - 1) // 2


@dataclass(frozen=True, kw_only=True)
class ScreenedMean(WeightedMean):
    """The weighted mean of the contributions that agree with the others (see `fedfmsl.algorithms.agreement`).

    Works through the contributions twice, and through those that it leaves out a third time, to subtract them. Those of
    more than `memory_bytes` are read each time: a file for them would take as long to read, and longer to write.
    """

    memory_bytes: int = SORT_BYTES

    def aggregate(
        self, contributions: Sequence[Contribution], parts: Parts, least: int = 1, scratch: Path | None = None
    ) -> Aggregate:
        whole = _checked_size(contributions, parts)
        used = [contribution for contribution in contributions if contribution.weight > 0]
        sizes = [contribution.size for contribution in used]
        if sum(sizes) * FLOAT_BYTES <= self.memory_bytes:
            used = [contribution.in_memory() for contribution in used]
        norms = [contribution.length() for contribution in used]
        weights = np.array([c.weight * self._factor(norm) for c, norm in zip(used, norms, strict=True)])
        owners = [contribution.owner or index for index, contribution in enumerate(used)]

        def read(index: int) -> Values:
            return used[index].read()

        size = max(sizes, default=0)
        total, weighted = weighted_sums(read, np.array([directions(norms), weights]), size)
        found = agreements(owners, norms, sizes, total, read)
        recent = recent_agreements(found, [contribution.agreement for contribution in used])
        kept = np.array(agreeing(recent), np.bool_)
        weighted -= weighted_sums(read, (weights * ~kept)[None], size)[0]
        regions = _regions(parts, [used[index] for index in np.flatnonzero(kept)], least)
        delta = np.zeros(whole)
        _divide(weighted, regions, delta)
        each = iter(recent)
        shown = tuple(next(each) if contribution.weight > 0 else None for contribution in contributions)
        return Aggregate(delta, tuple(region.span for region in regions), shown)


def _divide(total: Doubles, regions: Sequence[Region], delta: Doubles) -> None:
    """Writes the mean of each region into `delta`. `total`: the sum of the weighted updates."""
    for region in regions:
        delta[region.span] = total[region.span] / sum(c.weight for c in region.contributions)


def _checked_size(contributions: Sequence[Contribution], parts: Parts) -> int:
    """The size of all parts. Raises ValueError if a contribution does not end where a part ends."""
    ends: list[int] = [part.stop for part in parts.values()]
    for contribution in contributions:
        if contribution.size not in ends:
            raise ValueError(f"Contribution.size is {contribution.size}; it must be the end of a part, one of {ends}")
    return max(ends)


def _regions(parts: Parts, contributions: Sequence[Contribution], least: int) -> list[Region]:
    """The regions that at least `least` contributions trained, in order. A contribution that trained a part has trained
    all parts before it, so the number of contributions falls from region to region."""
    weighted, regions = [c for c in contributions if c.weight > 0], []
    for count, group in groupby(parts.values(), key=lambda part: sum(c.size >= part.stop for c in weighted)):
        run = list(group)
        if count >= max(least, 1):
            span = slice(run[0].start, run[-1].stop)
            regions.append(Region(span, tuple(c for c in weighted if c.size >= span.stop)))
    return regions
