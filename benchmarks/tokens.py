"""python -m benchmarks.tokens: the accuracy of frozen features with fewer tokens, merged or of smaller photos.

Tokens are merged as in ToMe (Bolya et al. 2023, Token Merging: Your ViT But Faster). The patches of an image are split
into two sets by turns, and each patch of the first is paired with the patch of the second whose key has the highest
cosine. The closest pairs become their weighted mean. The logarithm of a token's size is added to its scores. All blocks
but the last two, which level 2 trains, merge equally many. The last two take merged tokens as plain ones.

Prints rows of the frontier in benchmarks/tokens.md. A row takes seconds on a GPU, and minutes on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch.nn.functional import normalize
from transformers.activations import ACT2FN

from devices.trial.assets import ASSETS
from devices.trial.groceries import groceries
from edge_runtime.data.images import decode_pixels
from export.reference import normalize_pixels
from export.weights import Backbone, load_backbone
from fedfmsl.common.cli import application
from fedfmsl.protocol.bundle import ImagePreprocessing

TRAINED = 2  # blocks
ROWS = ["224:0", "224:12", "168:0"]
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of features whose mean squared norm is 1
SPLITS = 10
BATCH = 32

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

app = application()


@app.command()
def tokens(
    rows: list[str] = typer.Option(ROWS, help="PIXELS:COUNT, tokens that each block merges away; may be repeated."),
    weights: Path = typer.Option(ASSETS / "dinov2-s14", help="Transformers folder of a DINOv2, as the trial makes it."),
    photos: Path | None = typer.Option(None, help="DIR/{train,test}/<class>/. Default: the trial's groceries."),
) -> None:
    """Print the accuracy of a ridge classifier on frozen features, by number of tokens."""
    folder = photos or groceries()
    train, test = (sorted((folder / part).glob("*/*.*")) for part in ("train", "test"))
    files = [*train, *test]
    names = sorted({path.parent.name for path in files})
    labels = np.array([names.index(path.parent.name) for path in files])
    halves = [np.random.default_rng(seed).permutation(len(files)) < len(files) // 2 for seed in range(SPLITS)]
    print("| pixels | merged per block | tokens | accuracy | with random halves |\n|---|---|---|---|---|")
    for row in rows:
        size, count = (int(number) for number in row.split(":"))
        source = load_backbone(str(weights), None, len(names), size)
        left, found = features(source, files, count)
        given = ridge_accuracy(found, labels, np.arange(len(files)) < len(train))
        random = np.mean([ridge_accuracy(found, labels, half) for half in halves])
        print(f"| {size} | {count} | {left} | {given:.3f} | {random:.3f} |", flush=True)


def features(source: Backbone, files: Sequence[Path], count: int) -> tuple[int, Floats]:
    """The tokens that are left, and the class tokens (n, D) above the last block."""
    preprocessing, device = source.preprocessing, "cuda" if torch.cuda.is_available() else "cpu"
    assert isinstance(preprocessing, ImagePreprocessing)
    model, rows, left = source.backbone.to(device), [], 0
    with torch.inference_mode(), merging(source, count):
        for start in range(0, len(files), BATCH):
            pixels = [decode_pixels(path.read_bytes(), preprocessing) for path in files[start : start + BATCH]]
            inputs = normalize_pixels(np.stack(pixels), preprocessing).to(device)
            state = model(pixel_values=inputs).last_hidden_state
            rows.append(state[:, 0].double().cpu().numpy())
            left = state.shape[1]
    return left, np.concatenate(rows)


def ridge_accuracy(x: Floats, labels: Labels, train: NDArray[np.bool_]) -> float:
    """Accuracy of ridge regression on one-hot labels, of the rows that are not `train`. The ridge is the best one of
    leave-one-out on `train`."""
    x = x - x[train].mean(0)
    x = x / np.sqrt((x[train] ** 2).sum(1).mean())
    mean = np.eye(labels.max() + 1)[labels[train]].mean(0)
    targets = np.eye(labels.max() + 1)[labels[train]] - mean
    values, vectors = np.linalg.eigh(x[train].T @ x[train])
    rotated = x[train] @ vectors
    best, weights = -1.0, np.zeros(0)
    for ridge in RIDGES:
        inverse = 1 / (np.maximum(values, 0) + ridge)
        solution = inverse[:, None] * (rotated.T @ targets)
        error = (targets - rotated @ solution) / (1 - (rotated**2 * inverse).sum(1))[:, None]
        accuracy = ((targets - error + mean).argmax(1) == labels[train]).mean()
        if accuracy > best:
            best, weights = accuracy, vectors @ solution
    return float(((x[~train] @ weights + mean).argmax(1) == labels[~train]).mean())


@contextmanager
def merging(source: Backbone, count: int) -> Iterator[None]:
    """While the context is open, all blocks of `source.model` but the last ones merge `count` tokens away."""
    layers = source.backbone.get_submodule(source.family.layers)
    merges = _Merges(source, count, len(layers) - TRAINED)
    with ExitStack() as hooks:
        for layer in layers[:-TRAINED] if count else ():
            hooks.callback(layer.register_forward_hook(merges).remove)
        yield


class _Merges:
    """A forward hook of the merging blocks. It replaces the state (B, N, D) that a block returns."""

    def __init__(self, source: Backbone, count: int, blocks: int) -> None:
        self._keys, self._config = source.family.block_keys, source.backbone.config
        self._count, self._blocks, self._block = count, blocks, 0
        self._sizes = torch.ones(1)

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        state: torch.Tensor = inputs[0]
        if self._block == 0:
            self._sizes = torch.ones(*state.shape[:2], 1, device=state.device)
        self._block = (self._block + 1) % self._blocks
        result = self._merging_block(layer, state)
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
        x, self._sizes = merge_tokens(x, k.mean(1), self._sizes, self._count)
        inner = ACT2FN[self._config.hidden_act](part("up", part("norm2", x)))
        return x + scaled("scale2", part("down", inner))


def merge_tokens(
    x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite soft matching: x (B, N, D), keys (B, N, K) and sizes (B, N, 1) → x and sizes of N - `count` tokens. The
    first token is the class token and stays."""
    unit = normalize(keys, dim=-1)
    best, partner = (unit[:, 1::2] @ unit[:, 2::2].mT).max(-1)
    order = best.argsort(-1, descending=True)
    gone, stays = order[:, :count], order[:, count:].sort(-1).values
    into = partner.gather(1, gone)

    def reduced(values: torch.Tensor) -> torch.Tensor:
        def rows(indices: torch.Tensor) -> torch.Tensor:
            return indices[..., None].expand(-1, -1, values.shape[-1])

        first, second = values[:, 1::2], values[:, 2::2]
        second = second.scatter_add(1, rows(into), first.gather(1, rows(gone)))
        return torch.cat([values[:, :1], first.gather(1, rows(stays)), second], 1)

    total = reduced(sizes)
    return reduced(x * sizes) / total, total


if __name__ == "__main__":
    app()
