"""A transformer written once, over weights with canonical names.

Every supported family is these few operations with its own weights (see `export.families`):

    patch.weight (D, 3, p, p), patch.bias (D,)      of an image
    words (V, D)                           of a text, of V known tokens
    position (1, N, D)                     its first rows are the special tokens plus their positions
    embed_norm.{weight,bias} (D,)          only where a norm follows the embeddings
    blocks.{i}.norm1|norm2.{weight,bias} (D,)
    blocks.{i}.query|key|value|output|up|down.{weight (in, out), bias}
    blocks.{i}.scale1|scale2 (D,)          only where the family has layer scale
    norm.{weight,bias} (D,)                only where the blocks do not end with a norm
    pooler.{weight (D, D), bias}           only where the feature is tanh of a projection
    projection.{weight (D, F), bias}       only where the feature is a projection
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from export.autodiff import Tape, Var
from export.frozen import Float32
from export.graph import Graph
from fedfmsl.protocol.bundle import ImagePreprocessing


@dataclass(frozen=True)
class Geometry:
    """What the weights do not say. Letters as in the method: N tokens, D hidden, L blocks; F width of the feature.

    `special` tokens come before the patches, first of them the class token; `patch` is None for a text.
    """

    tokens: int
    hidden: int
    feature: int
    blocks: int
    heads: int
    epsilon: float
    patch: int | None = None
    special: int = 1
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    norm: Literal["pre", "post"] = "pre"


# LoRA of one block: projection name → (A (r, D), B (D, r))
Lora = Mapping[str, tuple[Var, Var]]


@dataclass(frozen=True)
class Transformer:
    geometry: Geometry
    lora_factor: float  # alpha / r

    def embed_tokens(self, graph: Graph, tokens: str) -> Var:
        """Token ids (B, N) of texts → embedded tokens (B·N, D)."""
        words = graph.op("Gather", graph.frozen("words"), tokens)
        return self._embedded(graph, graph.op("Add", words, graph.frozen("position")))

    def embed(self, graph: Graph, pixels: str, preprocessing: ImagePreprocessing) -> Var:
        """uint8 RGB pixels (B, S, S, 3) → embedded tokens (B·N, D)."""
        g = self.geometry
        mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
        scaled = graph.op("Mul", graph.op("Cast", pixels, to=1), graph.const(1 / (255 * std)))
        normal = graph.op("Transpose", graph.op("Sub", scaled, graph.const(mean / std)), perm=[0, 3, 1, 2])
        stride = [g.patch, g.patch]
        patches = graph.op("Conv", normal, graph.frozen("patch.weight"), graph.frozen("patch.bias"), strides=stride)
        columns = graph.op("Reshape", patches, graph.ints(0, g.hidden, g.tokens - g.special))
        # rows of zeros in front, to which "position" adds the special tokens together with their positions
        padded = graph.op("Pad", graph.op("Transpose", columns, perm=[0, 2, 1]), graph.ints(0, g.special, 0, 0, 0, 0))
        return self._embedded(graph, graph.op("Add", padded, graph.frozen("position")))

    def block(
        self, tape: Tape, x: Var, index: int, lora: Lora, class_token_only: bool = False, mask: str | None = None
    ) -> Var:
        """Block `index` on (B·N, D). With `class_token_only` the result is (B, D): exact for the last block, of which
        only the class token goes on. `mask` (B, 1, 1, N) keeps padded tokens out."""
        g, key = self.geometry, f"blocks.{index}"
        post = g.norm == "post"
        normal = x if post else tape.layer_norm(x, f"{key}.norm1", g.epsilon)
        if class_token_only:
            x = tape.class_token(x, g.tokens, g.hidden)
            mixed = self._class_token_attention(tape, normal, key, lora, mask)
        else:
            q = self._project(tape, normal, f"{key}.query", lora.get("query"))
            k = tape.linear(normal, f"{key}.key")
            v = self._project(tape, normal, f"{key}.value", lora.get("value"))
            mixed = tape.attention(q, k, v, g.heads, g.tokens, g.hidden, mask)
        x = self._residual(tape, x, tape.linear(mixed, f"{key}.output"), f"{key}.scale1")
        if post:
            x = tape.layer_norm(x, f"{key}.norm1", g.epsilon)
        normal = x if post else tape.layer_norm(x, f"{key}.norm2", g.epsilon)
        inner = self._activate(tape, tape.linear(normal, f"{key}.up"))
        x = self._residual(tape, x, tape.linear(inner, f"{key}.down"), f"{key}.scale2")
        return tape.layer_norm(x, f"{key}.norm2", g.epsilon) if post else x

    def _class_token_attention(self, tape: Tape, normal: Var, key: str, lora: Lora, mask: str | None) -> Var:
        """The class token's attention (B, D) over `normal` (B·N, D), without a key or a value of any token (ours).

        q·(W x) = (Wᵀ q)·x, so each head's query goes through the key weights instead of every token; the key's bias
        only shifts a softmax. And a sum of values is the value of the sum, so tokens are summed first.
        """
        g = self.geometry
        q = self._project(tape, tape.class_token(normal, g.tokens, g.hidden), f"{key}.query", lora.get("query"))
        asked = tape.linear_transposed(tape.spread_heads(q, g.heads, g.hidden), f"{key}.key")
        pooled = tape.pool(asked, normal, g.heads, g.tokens, g.hidden, mask)
        v = self._project(tape, pooled, f"{key}.value", lora.get("value"))
        return tape.join_heads(v, g.heads, g.hidden)

    def suffix(self, tape: Tape, hidden: Var, first: int, lora: Mapping[int, Lora], mask: str | None = None) -> Var:
        """Blocks `first` … L-1 and the tail: (B·N, D) → the class token's feature (B, F)."""
        last = self.geometry.blocks - 1
        for index in range(first, last + 1):
            hidden = self.block(tape, hidden, index, lora.get(index, {}), class_token_only=index == last, mask=mask)
        return self.tail(tape, hidden)

    def tail(self, tape: Tape, x: Var) -> Var:
        """The class token after the last block (B, D) → its feature (B, F)."""
        has = tape.graph.has
        if has("norm.weight"):
            x = tape.layer_norm(x, "norm", self.geometry.epsilon)
        if has("pooler.weight"):
            x = tape.tanh(tape.linear(x, "pooler"))
        return tape.linear(x, "projection") if has("projection.weight") else x

    def _embedded(self, graph: Graph, tokens: str) -> Var:
        """(B, N, D) → (B·N, D), normed where the family does so."""
        x = Var(graph.op("Reshape", tokens, graph.ints(-1, self.geometry.hidden)))
        if not graph.has("embed_norm.weight"):
            return x
        return Tape(graph, Float32(graph)).layer_norm(x, "embed_norm", self.geometry.epsilon)

    def _activate(self, tape: Tape, x: Var) -> Var:
        return tape.quick_gelu(x) if self.geometry.activation == "quick_gelu" else tape.gelu(x)

    def _project(self, tape: Tape, x: Var, key: str, lora: tuple[Var, Var] | None) -> Var:
        y = tape.linear(x, key)
        if lora is None:
            return y
        down, up = lora
        return tape.project(tape.low_rank(x, down), up, plus=y, factor=self.lora_factor)

    @staticmethod
    def _residual(tape: Tape, x: Var, branch: Var, scale: str) -> Var:
        return tape.add(x, tape.scale(branch, scale) if tape.graph.has(scale) else branch)
