"""Merging of tokens: graphs against a torch implementation of the paper, and what a build refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.bundles import (
    Built,
    build,
    hidden_of,
    random_samples,
    random_theta,
    relative_error,
    run_graph,
    shared_weights,
)
from support.personal_graph import check_the_personalized_graph
from support.torch_reference import features_of, torch_expert

from export.bundle import merged
from export.merging import schedule
from export.merging_reference import merge_tokens, merging
from export.reference import torch_inputs
from export.transformer import Geometry
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.bundle import MANIFEST

LEFT = 9


@pytest.fixture(scope="module", params=["deit", "dinov2"])
def merging_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Of 16 patches, some are merged in each of the first two blocks. DeiT has two special tokens."""
    return build(shared_weights(request.param), tmp_path_factory.mktemp("merging") / "b", levels=1, merge_to=LEFT)


def test_the_graphs_equal_torch_with_the_merging_of_the_paper(merging_bundle: Built) -> None:
    built, manifest = merging_bundle, merging_bundle.bundle.manifest
    samples, theta = random_samples(built, 5, seed=1), random_theta(built.bundle, 1, 1)
    inputs = torch_inputs(samples, manifest.preprocessing)
    hidden = hidden_of(built, samples, 1)
    (logits,) = run_graph(built.bundle, "predict-1.onnx", ["logits"], hidden=hidden, theta=theta)
    (pooled,) = run_graph(built.bundle, "features.onnx", ["pooled"], pixels=samples)
    below_the_last: list[torch.Tensor] = []
    last = built.source.backbone.get_submodule(built.source.family.layers)[-1]
    hook = last.register_forward_pre_hook(lambda _, states: below_the_last.append(states[0]))
    with merging(built.source, manifest):
        features = features_of(built, samples)
        with torch.no_grad(), torch_expert(built, theta) as model:
            theirs = model(**inputs).logits.numpy()
    hook.remove()
    assert hidden.shape == (5, LEFT, manifest.dims.hidden) and manifest.dims.tokens == LEFT
    assert relative_error(hidden, below_the_last[0].numpy()) < 1e-5
    assert relative_error(pooled, features) < 1e-5
    assert relative_error(logits, theirs) < 1e-5
    assert relative_error(features_of(built, samples), features) > 1e-2  # without merging


def test_the_personalized_graph_merges_the_same_tokens(merging_bundle: Built) -> None:
    check_the_personalized_graph(merging_bundle, 1, 1.0, np.array([3, 0, 8, 1]))


def test_the_state_of_an_image_does_not_depend_on_its_batch(merging_bundle: Built) -> None:
    samples = random_samples(merging_bundle, 3, seed=2)
    alone = np.concatenate([hidden_of(merging_bundle, sample[None], 1) for sample in samples])
    assert relative_error(hidden_of(merging_bundle, samples, 1), alone) < 1e-5


def test_only_a_bundle_that_merges_names_it_in_its_manifest(merging_bundle: Built, vit: Built) -> None:
    manifest = merging_bundle.bundle.manifest
    assert manifest.merged_from == 16 + (2 if manifest.family == "deit" else 1)
    assert "merged_from" not in (vit.bundle.root / MANIFEST).read_text()


def test_the_reference_merges_the_most_similar_pair_into_its_weighted_mean() -> None:
    keys = torch.tensor([[[9.0, 9], [0, 1], [1, 0], [0.9, 0.1], [0, -1]]])  # token 3 is most like token 2
    x, sizes = torch.arange(5.0).reshape(1, 5, 1), torch.tensor([[[1.0], [1], [1], [3], [1]]])
    merged_x, merged_sizes = merge_tokens(x, keys, sizes, count=1, special=1)
    assert merged_x.flatten().tolist() == [0, 1, (2 * 1 + 3 * 3) / 4, 4]
    assert merged_sizes.flatten().tolist() == [1, 1, 4, 1]


def test_every_block_below_the_highest_level_merges_equally_many() -> None:
    assert schedule(tokens=257, special=1, blocks=10, left=137) == (12,) * 10
    assert schedule(tokens=257, special=1, blocks=9, left=140) == (13,) * 9
    assert sum(schedule(tokens=257, special=1, blocks=9, left=150)) == 107


@pytest.mark.parametrize(
    ("levels", "left", "message"),
    [
        (12, 100, "needs a block below the highest level"),
        (2, 257, "--merge-to 257 is not less than the 257 tokens"),
        (11, 100, "157 of 256 patches in block 0, more than half"),
    ],
)
def test_a_merging_that_is_not_possible_is_refused(levels: int, left: int, message: str) -> None:
    geometry = Geometry(tokens=257, hidden=384, feature=384, blocks=12, heads=6, norm_eps=1e-6, patch=14)
    with pytest.raises(ConfigError, match=message):
        merged(geometry, levels, left)


def test_a_text_model_merges_nothing(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--merge-to is for images"):
        build(bert_folder, tmp_path / "b", levels=1, merge_to=5)
