"""The transformer of all supported families, with weights under canonical names (see `export.families`):

patch.weight (D, 3, p, p), patch.bias (D,)      images only, p pixels per patch side
words (V, D)                           texts only, V tokens in the vocabulary
position (1, N, D)                     the first rows include the embeddings of the special tokens
embed_norm.{weight,bias} (D,)          only if a norm follows the embeddings
blocks.{i}.norm1|norm2.{weight,bias} (D,)
blocks.{i}.query|key|value|output|up|down.{weight (in, out), bias}
blocks.{i}.scale1|scale2 (D,)          only if the family has layer scale
norm.{weight,bias} (D,)                only if the blocks do not end with a norm
pooler.{weight (D, D), bias}           only if the feature is tanh of a projection
projection.{weight (D, F), bias}       only if the feature is a projection
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
    """Sizes and variants. `tokens` N, `hidden` D, `feature` F, `blocks` L.

    `special`: number of tokens before the patches; the class token is the first. `patch`: pixels per side, None for
    texts. `norm`: LayerNorm before ("pre") or after ("post") attention and MLP.
    """

    tokens: int
    hidden: int
    feature: int
    blocks: int
    heads: int
    norm_eps: float
    patch: int | None = None
    special: int = 1
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    norm: Literal["pre", "post"] = "pre"


# LoRA of one block: projection name → (A (r, D), B (D, r))
Lora = Mapping[str, tuple[Var, Var]]


@dataclass(frozen=True)
class Transformer:
    """Adds the forward pass to a graph. Letters of shapes as in `export.graphs`."""

    geometry: Geometry
    lora_factor: float  # alpha / r

    def embed_tokens(self, graph: Graph, tokens: str) -> Var:
        """Token IDs (B, N) → embedded tokens (B·N, D)."""
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
        # adds rows of zeros in front; "position" then adds the special tokens and their positions
        padded = graph.op("Pad", graph.op("Transpose", columns, perm=[0, 2, 1]), graph.ints(0, g.special, 0, 0, 0, 0))
        return self._embedded(graph, graph.op("Add", padded, graph.frozen("position")))

    def block(
        self, tape: Tape, x: Var, index: int, lora: Lora, class_token_only: bool = False, mask: str | None = None
    ) -> Var:
        """Block `index` on x (B·N, D).

        With `class_token_only` the result is the class token (B, D). This is exact for the last block, because the tail
        reads only the class token. `mask` (B, 1, 1, N) excludes padded tokens.
        """
        g, key = self.geometry, f"blocks.{index}"
        post = g.norm == "post"
        normal = x if post else tape.layer_norm(x, f"{key}.norm1", g.norm_eps)
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
            x = tape.layer_norm(x, f"{key}.norm1", g.norm_eps)
        normal = x if post else tape.layer_norm(x, f"{key}.norm2", g.norm_eps)
        inner = self._activate(tape, tape.linear(normal, f"{key}.up"))
        x = self._residual(tape, x, tape.linear(inner, f"{key}.down"), f"{key}.scale2")
        return tape.layer_norm(x, f"{key}.norm2", g.norm_eps) if post else x

    def _class_token_attention(self, tape: Tape, normal: Var, key: str, lora: Lora, mask: str | None) -> Var:
        """The class token's attention (B, D) over `normal` (B·N, D), without computing keys and values (ours).

        q·(W x) = (Wᵀ q)·x: the key weights are applied to each head's query instead of to every token. The bias of the
        key shifts all scores of a softmax equally and is left out. The sum of values is the value of the sum, so tokens
        are summed before the value projection.
        """
        g = self.geometry
        q = self._project(tape, tape.class_token(normal, g.tokens, g.hidden), f"{key}.query", lora.get("query"))
        query = tape.linear_transposed(tape.spread_heads(q, g.heads, g.hidden), f"{key}.key")
        pooled = tape.pool(query, normal, g.heads, g.tokens, g.hidden, mask)
        v = self._project(tape, pooled, f"{key}.value", lora.get("value"))
        return tape.join_heads(v, g.heads, g.hidden)

    def suffix(self, tape: Tape, hidden: Var, first: int, lora: Mapping[int, Lora], mask: str | None = None) -> Var:
        """Blocks `first` to L-1 and the tail: hidden state (B·N, D) → feature (B, F)."""
        last = self.geometry.blocks - 1
        for index in range(first, last + 1):
            hidden = self.block(tape, hidden, index, lora.get(index, {}), class_token_only=index == last, mask=mask)
        return self.tail(tape, hidden)

    def tail(self, tape: Tape, x: Var) -> Var:
        """The class token after the last block (B, D) → feature (B, F)."""
        has = tape.graph.has
        if has("norm.weight"):
            x = tape.layer_norm(x, "norm", self.geometry.norm_eps)
        if has("pooler.weight"):
            x = tape.tanh(tape.linear(x, "pooler"))
        return tape.linear(x, "projection") if has("projection.weight") else x

    def _embedded(self, graph: Graph, tokens: str) -> Var:
        """(B, N, D) → (B·N, D), with the norm after the embeddings if the family has one."""
        x = Var(graph.op("Reshape", tokens, graph.ints(-1, self.geometry.hidden)))
        if not graph.has("embed_norm.weight"):
            return x
        return Tape(graph, Float32(graph)).layer_norm(x, "embed_norm", self.geometry.norm_eps)

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
