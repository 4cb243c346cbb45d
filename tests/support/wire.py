"""Random layouts and JSON, and an update and a round as examples of messages."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import (
    Round,
    Stage,
    Training,
    Update,
)

SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=6))
    return Layout.build([(str(i // 2), f"t{i}", shape) for i, shape in enumerate(shapes)])


def vector_of(layout: Layout, seed: int) -> Vector:
    return np.random.default_rng(seed).normal(size=layout.total).astype(np.float32)


UPDATE = Update(
    run="r", session="s", round=3, device="d", stage=Stage.GLOBAL, level=1, samples=5, metrics={"loss": 0.5}
)


ROUND = Round(
    run="r",
    session="s",
    round=3,
    stage=Stage.GLOBAL,
    index=0,
    of=1,
    level=1,
    training=Training(epochs=1, learning_rate=1e-3),
    sal=Sal(CapabilityQueue(2, 0), max_level=3),
    privacy=Privacy(clip=1.0, noise_multiplier=0.5, shares=4),
)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
