"""The head of class means."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfmsl.algorithms.class_means import SCALE, class_mean_head


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 99))
def test_the_first_head_has_the_directions_of_the_class_means_and_scaled_cosines_as_logits(
    classes: int, width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(1, 1, (40, width)).astype(np.float32)
    labels = rng.integers(0, classes - 1, 40)  # the last class has no samples
    one_hot = np.eye(classes)[labels]
    norms = np.linalg.norm(features, axis=1)
    head = class_mean_head(
        (one_hot.T @ features).astype(np.float32), one_hot.sum(axis=0).astype(np.float32), float(norms.sum())
    )
    weight, bias = head[: classes * width].reshape(classes, width), head[classes * width :]
    assert head.dtype == np.float32
    assert not bias.any()
    assert not weight[-1].any()
    for label in set(labels.tolist()):
        mean = features[labels == label].mean(axis=0)
        assert np.allclose(weight[label], SCALE * mean / np.linalg.norm(mean) / norms.mean(), rtol=1e-4, atol=1e-4)
