"""Aggregation of client updates, as functions over flat vectors that are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import floor

import numpy as np

from fedfmsl.algorithms.arrays import Doubles, Vector
from fedfmsl.protocol.layout import Layout
from trainer_server.config import Aggregation, Rule

SLICE_BYTES = 32 * 1024 * 1024  # of the values that a robust rule sorts at once


@dataclass(frozen=True)
class Contribution:
    """An update that lies elsewhere: `read` fetches its `size` values, those of its level's trainables."""

    weight: float
    size: int
    read: Callable[[], Vector]


@dataclass(frozen=True)
class Aggregate:
    """The updates as one: `delta` (size,), zero outside of the parts of the layout that somebody `trained`."""

    delta: Doubles
    trained: tuple[slice, ...]


def aggregate(
    settings: Aggregation, layout: Layout, size: int, contributions: Sequence[Contribution], least: int = 1
) -> Aggregate:
    """One update of `size` values, each part of the layout (the head, each block) over those who trained it (ours, see
    SAL): a contribution of a lower level holds only the first parts. One of weight 0 has no voice. Parts that fewer
    than `least` trained count as not trained: under privacy a sum over too few holds too little noise.

    The mean reads every contribution once and one at a time, so that its memory does not depend on their number. The
    other rules need all values of a coordinate at once: they work through slices of at most SLICE_BYTES and read every
    contribution anew for each, about 4 · size · n / SLICE_BYTES times, and once per level at least. The same order
    gives the same bits.
    """
    delta = np.zeros(size)
    regions = [r for r in _regions(layout, size, contributions) if len(r.voices) >= least]
    RULES[settings.rule](settings, regions, delta)
    return Aggregate(delta, tuple(region.span for region in regions))


def weighted_average(values: Sequence[tuple[float, float]]) -> float:
    """Mean of (value, weight) pairs; 0 without any weight."""
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total if total else 0.0


@dataclass(frozen=True)
class _Region:
    """Neighbouring parts that the same contributions trained."""

    span: slice
    voices: tuple[Contribution, ...]


def _regions(layout: Layout, size: int, contributions: Sequence[Contribution]) -> Iterator[_Region]:
    """Those somebody trained. Who trained a part has trained all before it: regions follow each other by their number
    of voices, the first has the most."""
    weighty = [c for c in contributions if c.weight > 0]
    parts = [part for part in layout.parts.values() if part.stop <= size]
    for count, group in groupby(parts, key=lambda part: sum(c.size >= part.stop for c in weighty)):
        run = list(group)
        if count:
            span = slice(run[0].start, run[-1].stop)
            yield _Region(span, tuple(c for c in weighty if c.size >= span.stop))


def _read(settings: Aggregation, contribution: Contribution) -> Vector:
    """The values of a contribution, scaled down to an L2 norm of `clip` where that is set."""
    vector = contribution.read()
    if settings.clip is None:
        return vector
    # not a BLAS norm: its sum, and so the last bit of it, depends on the number of threads
    norm = float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
    return vector if norm <= settings.clip else vector * np.float32(settings.clip / norm)


def _mean(settings: Aggregation, regions: Sequence[_Region], delta: Doubles) -> None:
    """Σ w·Δ / Σ w."""
    for contribution in regions[0].voices if regions else ():
        vector = _read(settings, contribution)
        for region in regions:
            if contribution.size >= region.span.stop:
                delta[region.span] += np.multiply(vector[region.span], contribution.weight, dtype=np.float64)
    for region in regions:
        delta[region.span] /= sum(c.weight for c in region.voices)


def _trimmed_mean(settings: Aggregation, regions: Sequence[_Region], delta: Doubles) -> None:
    """⌊trim · n⌋ values are left out at each end (Yin et al., ICML 2018)."""
    _mean_of_the_inner(settings, regions, delta, lambda n: min(floor(settings.trim * n + 1e-9), (n - 1) // 2))


def _median(settings: Aggregation, regions: Sequence[_Region], delta: Doubles) -> None:
    """All but the middle value, or the middle two, are left out (Yin et al., ICML 2018)."""
    _mean_of_the_inner(settings, regions, delta, lambda n: (n - 1) // 2)


def _mean_of_the_inner(
    settings: Aggregation, regions: Sequence[_Region], delta: Doubles, cut: Callable[[int], int]
) -> None:
    """Per coordinate, the unweighted mean of n values without the `cut(n)` least and as many of the greatest."""
    for region in regions:
        n = len(region.voices)
        width = min(max(1, SLICE_BYTES // (4 * n)), region.span.stop - region.span.start)
        room = np.empty((width, n), np.float32)
        for start in range(region.span.start, region.span.stop, width):
            piece = slice(start, min(start + width, region.span.stop))
            values = room[: piece.stop - piece.start]
            for column, contribution in enumerate(region.voices):
                values[:, column] = _read(settings, contribution)[piece]
            values.sort(axis=1)
            delta[piece] = values[:, cut(n) : n - cut(n)].mean(axis=1, dtype=np.float64)


RULES: dict[Rule, Callable[[Aggregation, Sequence[_Region], Doubles], None]] = {
    Rule.MEAN: _mean,
    Rule.TRIMMED_MEAN: _trimmed_mean,
    Rule.MEDIAN: _median,
}
