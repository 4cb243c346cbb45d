"""Merging of similar tokens in the frozen prefix (ToMe: Bolya et al. 2023, Token Merging: Your ViT But Faster).

The patches of an image are divided alternately into two sets. Each patch of the first set is paired with the patch of
the second set whose key has the highest cosine. The most similar pairs become one token: the mean, weighted by the
numbers of patches in the two. Attention in the prefix is proportional: the logarithm of a token's size is added to its
scores.

The blocks above the prefix take merged tokens as plain ones, so a hidden state has no sizes (ours). Their LoRA is
trained that way, and it is no less accurate (benchmarks/tokens.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.graph import Graph
from fedfmsl.errors import ConfigError


def schedule(tokens: int, special: int, blocks: int, left: int) -> tuple[int, ...]:
    """How many of the `tokens` each of `blocks` blocks merges away, so that `left` are left: equally many.

    `special` tokens are never merged. Raises ConfigError if there is no block, or if it is not possible.
    """
    gone, patches = tokens - left, tokens - special
    if not blocks:
        raise ConfigError("--merge-to needs a block below the highest level, where tokens are merged; lower --levels")
    if gone < 1:
        raise ConfigError(f"--merge-to {left} is not less than the {tokens} tokens of an image; lower it")
    counts = tuple(gone * (block + 1) // blocks - gone * block // blocks for block in range(blocks))
    for block, count in enumerate(counts):
        if count > patches // 2:  # a merge takes patches of the first set only
            raise ConfigError(
                f"--merge-to {left} would merge {count} of {patches} patches in block {block}, more than half of them; "
                "raise it, or lower --levels"
            )
        patches -= count
    return counts


def merge(
    graph: Graph, x: str, keys: str, sizes: str, tokens: int, special: int, heads: int, hidden: int, count: int
) -> tuple[str, str]:
    """Merges `count` R tokens away: x and keys (B·N, D), sizes (B·N, 1) → x (B·(N-R), D), sizes (B·(N-R), 1).

    The result has the special tokens, the rest of the first set and the second set, each in its old order. So rounding
    decides something only where two pairs are equally similar.
    """
    op, ints = graph.op, graph.ints
    first, second = np.arange(special, tokens, 2), np.arange(special + 1, tokens, 2)
    cosines = _cosines(graph, keys, tokens, heads, hidden, first, second)
    partner = op("ArgMax", cosines, axis=2, keepdims=0)
    best = op("ReduceMax", cosines, ints(2), keepdims=0)
    images = op("Shape", best, end=1)
    _, order = graph.ops("TopK", 2, best, ints(first.size), axis=1)  # indices in the first set, the closest pair first
    gone = op("Slice", order, ints(0), ints(count), ints(1))
    others = op("Slice", order, ints(count), ints(first.size), ints(1))
    stays, _ = graph.ops("TopK", 2, others, ints(first.size - count), axis=1, largest=0)  # sorted

    def place(values: NDArray[np.int64], indices: str) -> str:
        return op("Gather", graph.const(values, np.int64), indices)

    def in_every_image(values: NDArray[np.int64]) -> str:
        return op("Expand", graph.const(values[None], np.int64), op("Concat", images, ints(1), axis=0))

    taken, into = place(first, gone), place(second, op("GatherElements", partner, gone, axis=1))
    kept = op("Concat", in_every_image(np.arange(special)), place(first, stays), in_every_image(second), axis=1)
    # (B, N-R, R): one where a kept token takes up one that is gone
    takes_up = op("Cast", op("Equal", op("Unsqueeze", kept, ints(2)), op("Unsqueeze", into, ints(1))), to=1)
    number, stride = graph.const(0, np.int64), graph.const(tokens, np.int64)
    start = op("Unsqueeze", op("Range", number, op("Mul", op("Squeeze", images), stride), stride), ints(1))

    def reduced(values: str, width: int) -> str:
        of_kept, of_taken = (op("Gather", values, op("Add", start, places)) for places in (kept, taken))
        return op("Reshape", op("Add", of_kept, op("MatMul", takes_up, of_taken)), ints(-1, width))

    total = reduced(sizes, 1)
    return op("Div", reduced(op("Mul", x, sizes), hidden), total), total


def _cosines(
    graph: Graph,
    keys: str,
    tokens: int,
    heads: int,
    hidden: int,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
) -> str:
    """The cosines of the tokens of two sets, of their keys' mean over the heads: (B, |first|, |second|)."""
    op = graph.op
    mean = op(
        "ReduceMean", op("Reshape", keys, graph.ints(-1, tokens, heads, hidden // heads)), graph.ints(2), keepdims=0
    )
    unit = op("Div", mean, op("ReduceL2", mean, graph.ints(2)))
    a, b = (op("Gather", unit, graph.const(places, np.int64), axis=1) for places in (first, second))
    return op("MatMul", a, op("Transpose", b, perm=[0, 2, 1]))
