"""The merging of tokens in torch, after Bolya et al. 2023 and apart from `export.merging`: what graphs must equal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers.activations import ACT2FN

from export.merging import schedule
from export.weights import Backbone
from fedfmsl.protocol.bundle import Manifest


@contextmanager
def merging(source: Backbone, manifest: Manifest) -> Iterator[None]:
    """The first blocks of `source.model` merge tokens as those of the bundle do, while the context is open."""
    if manifest.merged_from is None:
        yield
        return
    dims, special = manifest.dims, source.family.geometry(source.model.config, source.size).special
    counts = schedule(manifest.merged_from, special, dims.blocks - manifest.levels, dims.tokens)
    merges = _Merges(source, special, counts)
    layers = source.backbone.get_submodule(source.family.layers)
    with ExitStack() as hooks:
        for layer in layers[: len(counts)]:
            hooks.callback(layer.register_forward_hook(merges).remove)
        yield


class _Merges:
    """A forward hook of the merging blocks. It replaces the state (B, N, D) that a block returns."""

    def __init__(self, source: Backbone, special: int, counts: tuple[int, ...]) -> None:
        self._keys, self._config = source.family.block_keys, source.backbone.config
        self._special, self._counts = special, counts
        self._block = 0
        self._sizes = torch.ones(1)

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        state: torch.Tensor = inputs[0]
        if self._block == 0:
            self._sizes = torch.ones(*state.shape[:2], 1)
        result = self._merging_block(layer, state)
        self._block = (self._block + 1) % len(self._counts)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def _merging_block(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        def part(name: str, value: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = layer.get_submodule(self._keys[name])(value)
            return result

        def scaled(name: str, branch: torch.Tensor) -> torch.Tensor:
            return branch * layer.get_parameter(self._keys[name]) if name in self._keys else branch

        heads = self._config.num_attention_heads
        normal = part("norm1", x)
        q, k, v = (part(name, normal).unflatten(2, (heads, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + self._sizes.log().mT[:, None]
        x = x + scaled("scale1", part("output", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        x, self._sizes = merge_tokens(x, k.mean(1), self._sizes, self._counts[self._block], self._special)
        inner = ACT2FN[self._config.hidden_act](part("up", part("norm2", x)))
        return x + scaled("scale2", part("down", inner))


def merge_tokens(
    x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor, count: int, special: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite soft matching: x (B, N, D), keys (B, N, K) and sizes (B, N, 1) → x and sizes of N - `count` tokens."""
    unit = normalize(keys, dim=-1)
    best, partner = (unit[:, special::2] @ unit[:, special + 1 :: 2].mT).max(-1)
    order = best.argsort(-1, descending=True)
    gone, stays = order[:, :count], order[:, count:].sort(-1).values
    into = partner.gather(1, gone)

    def reduced(values: torch.Tensor) -> torch.Tensor:
        def rows(indices: torch.Tensor) -> torch.Tensor:
            return indices[..., None].expand(-1, -1, values.shape[-1])

        first, second = values[:, special::2], values[:, special + 1 :: 2]
        second = second.scatter_add(1, rows(into), first.gather(1, rows(gone)))
        return torch.cat([values[:, :special], first.gather(1, rows(stays)), second], 1)

    total = reduced(sizes)
    return reduced(x * sizes) / total, total
