"""A pre-norm vision transformer written once, over weights with canonical names.

Every supported family is these few operations with its own weights (see `export.families`):

    patch.weight (D, 3, p, p), patch.bias (D,)
    position (1, N, D)                     its first row is the class token plus its position
    blocks.{i}.norm1|norm2.{weight,bias} (D,)
    blocks.{i}.query|key|value|output|up|down.{weight (in, out), bias}
    blocks.{i}.scale1|scale2 (D,)          only where the family has layer scale
    norm.{weight,bias} (D,)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from export.autodiff import Tape, Var
from export.graph import Graph
from protocol.bundle import ImagePreprocessing


@dataclass(frozen=True)
class Geometry:
    """What the weights do not say. Letters as in the method: N tokens, D hidden, L blocks."""

    tokens: int
    hidden: int
    blocks: int
    heads: int
    patch: int
    epsilon: float


# LoRA of one block: projection name → (A (r, D), B (D, r))
Lora = Mapping[str, tuple[Var, Var]]


@dataclass(frozen=True)
class Transformer:
    geometry: Geometry
    lora_factor: float  # alpha / r

    def embed(self, graph: Graph, pixels: str, preprocessing: ImagePreprocessing) -> Var:
        """uint8 RGB pixels (B, S, S, 3) → embedded tokens (B·N, D)."""
        g = self.geometry
        mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
        scaled = graph.op("Mul", graph.op("Cast", pixels, to=1), graph.const(1 / (255 * std)))
        normal = graph.op("Transpose", graph.op("Sub", scaled, graph.const(mean / std)), perm=[0, 3, 1, 2])
        stride = [g.patch, g.patch]
        patches = graph.op("Conv", normal, graph.frozen("patch.weight"), graph.frozen("patch.bias"), strides=stride)
        columns = graph.op("Reshape", patches, graph.ints(0, g.hidden, g.tokens - 1))
        # a row of zeros in front, to which "position" adds the class token together with its position
        padded = graph.op("Pad", graph.op("Transpose", columns, perm=[0, 2, 1]), graph.ints(0, 1, 0, 0, 0, 0))
        return Var(graph.op("Reshape", graph.op("Add", padded, graph.frozen("position")), graph.ints(-1, g.hidden)))

    def block(self, tape: Tape, x: Var, index: int, lora: Lora, class_token_only: bool = False) -> Var:
        """Block `index` on (B·N, D). With `class_token_only` the result is (B, D): exact for the last block, of which
        only the class token goes on; keys and values are still needed of every token."""
        g, key = self.geometry, f"blocks.{index}"
        normal = tape.layer_norm(x, f"{key}.norm1", g.epsilon)
        asking = normal
        if class_token_only:
            asking = tape.class_token(normal, g.tokens, g.hidden)
            x = tape.class_token(x, g.tokens, g.hidden)
        q = self._project(tape, asking, f"{key}.query", lora.get("query"))
        k = self._project(tape, normal, f"{key}.key", lora.get("key"))
        v = self._project(tape, normal, f"{key}.value", lora.get("value"))
        queries = 1 if class_token_only else g.tokens
        mixed = tape.attention(q, k, v, g.heads, queries, g.tokens, g.hidden)
        x = self._residual(tape, x, tape.linear(mixed, f"{key}.output"), f"{key}.scale1")
        inner = tape.gelu(tape.linear(tape.layer_norm(x, f"{key}.norm2", g.epsilon), f"{key}.up"))
        return self._residual(tape, x, tape.linear(inner, f"{key}.down"), f"{key}.scale2")

    def suffix(self, tape: Tape, hidden: Var, first: int, lora: Mapping[int, Lora]) -> Var:
        """Blocks `first` … L-1 and the final norm: (B·N, D) → the class token's feature (B, D)."""
        last = self.geometry.blocks - 1
        for index in range(first, last + 1):
            hidden = self.block(tape, hidden, index, lora.get(index, {}), class_token_only=index == last)
        return tape.layer_norm(hidden, "norm", self.geometry.epsilon)

    def _project(self, tape: Tape, x: Var, key: str, lora: tuple[Var, Var] | None) -> Var:
        y = tape.linear(x, key)
        if lora is None:
            return y
        down, up = lora
        return tape.project(tape.low_rank(x, down), up, plus=y, factor=self.lora_factor)

    @staticmethod
    def _residual(tape: Tape, x: Var, branch: Var, scale: str) -> Var:
        return tape.add(x, tape.scale(branch, scale) if tape.graph.has(scale) else branch)
