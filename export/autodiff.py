"""Reverse-mode differentiation during graph construction (ours).

Each primitive adds its forward nodes and records a function that adds its backward nodes. `gradients` calls these
functions in reverse order. A gradient is added only if it leads to a trainable. So frozen weights have no gradient
nodes, and the lowest active block does not compute the gradient of its input.

Activations are two-dimensional, (B·N, D), so that every projection is one Gemm. Only attention uses (B, H, N, D/H).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.frozen import TINY, Frozen
from export.graph import Graph


@dataclass(frozen=True)
class Var:
    """A tensor of the graph. `trainable`: it depends on a trainable."""

    name: str
    trainable: bool = False


class Tape:
    """Adds operations to a graph and records their gradients. Tensors are `Var`s; shapes are in the docstrings."""

    def __init__(self, graph: Graph, frozen: Frozen) -> None:
        self.graph = graph
        self._frozen = frozen
        self._backward: list[tuple[Var, Callable[[str], None]]] = []
        self._gradients: dict[str, str] = {}
        self._factor = ""  # of `normalize`
        self._divided: set[str] = set()  # names of the tensors whose gradient is divided by it
        self._below = False  # whether gradients that are added now are

    def gradients(self, of: Sequence[Var]) -> list[str]:
        """Adds the backward pass, from the gradients that the losses set. Returns the gradients of `of`."""
        for output, backward in reversed(self._backward):
            if output.name in self._gradients:
                self._below = output.name in self._divided
                backward(self._gradients[output.name])
        return [self._whole_gradient(var.name) for var in of]

    def _whole_gradient(self, name: str) -> str:
        gradient = self._gradients[name]
        return self.graph.op("Mul", gradient, self._factor) if name in self._divided else gradient

    def _record(self, name: str, inputs: Sequence[Var], backward: Callable[[str], None]) -> Var:
        output = Var(name, any(var.trainable for var in inputs))
        if output.trainable:
            self._backward.append((output, backward))
        return output

    def _accumulate(self, var: Var, gradient: Callable[[], str]) -> None:
        if var.trainable:
            new = gradient()
            if self._below:
                self._divided.add(var.name)
            old = self._gradients.get(var.name)
            self._gradients[var.name] = new if old is None else self.graph.op("Add", old, new)

    def add(self, a: Var, b: Var) -> Var:
        def backward(g: str) -> None:
            self._accumulate(a, lambda: g)
            self._accumulate(b, lambda: g)

        return self._record(self.graph.op("Add", a.name, b.name), [a, b], backward)

    def normalize(self, x: Var) -> Var:
        """The identity. The backward pass below it computes with a gradient whose largest value is 1, and the gradients
        of trainables are multiplied again at its end (ours). So gradients of a small loss are not lost in float16. But
        for rounding the result is the same, because a backward pass is linear in its gradient."""
        op = self.graph.op

        def backward(g: str) -> None:
            self._below = True
            self._factor = op("Max", op("ReduceMax", op("Abs", g), keepdims=0), self.graph.const(TINY))
            self._accumulate(x, lambda: op("Div", g, self._factor))

        return self._record(op("Identity", x.name), [x], backward)

    def scale(self, x: Var, key: str) -> Var:
        """Layer scale: x (·, D) times a frozen vector (D,)."""
        op, weight = self.graph.op, self.graph.frozen(key)

        def backward(g: str) -> None:
            self._accumulate(x, lambda: op("Mul", g, weight))

        return self._record(op("Mul", x.name, weight), [x], backward)

    def linear(self, x: Var, key: str) -> Var:
        """x (·, I) through the frozen `key.weight` (I, O) and `key.bias` (O,)."""

        def backward(g: str) -> None:
            self._accumulate(x, lambda: self._frozen.transposed(g, key))

        return self._record(self._frozen.linear(x.name, key), [x], backward)

    def linear_transposed(self, x: Var, key: str) -> Var:
        """x (·, O) through the transpose of the frozen `key.weight` (I, O), without a bias."""

        def backward(g: str) -> None:
            self._accumulate(x, lambda: self._frozen.product(g, key))

        return self._record(self._frozen.transposed(x.name, key), [x], backward)

    def project(self, x: Var, weight: Var, plus: Var, factor: float = 1.0) -> Var:
        """factor · x Wᵀ + plus, with a trainable weight W (O, I). `plus` is (·, O), or a trainable bias (O,)."""
        op = self.graph.op

        def backward(g: str) -> None:
            self._accumulate(weight, lambda: op("Gemm", g, x.name, transA=1, alpha=factor))
            self._accumulate(x, lambda: op("Gemm", g, weight.name, alpha=factor))
            self._accumulate(plus, lambda: g)

        name = op("Gemm", x.name, weight.name, plus.name, transB=1, alpha=factor)
        return self._record(name, [x, weight, plus], backward)

    def low_rank(self, x: Var, down: Var) -> Var:
        """x Aᵀ: the LoRA matrix A (r, I) applied to x (·, I)."""
        op = self.graph.op

        def backward(g: str) -> None:
            self._accumulate(down, lambda: op("Gemm", g, x.name, transA=1))
            self._accumulate(x, lambda: op("Gemm", g, down.name))

        return self._record(op("Gemm", x.name, down.name, transB=1), [x, down], backward)

    def broadcast(self, bias: Var) -> Var:
        """A trainable bias (O,) that is added to every row. Its gradient is summed over rows."""
        op = self.graph.op

        def backward(g: str) -> None:
            self._accumulate(bias, lambda: op("ReduceSum", g, self.graph.ints(0), keepdims=0))

        return self._record(op("Identity", bias.name), [bias], backward)

    def layer_norm(self, x: Var, key: str, eps: float) -> Var:
        """LayerNorm over the last axis with frozen `key.weight` and `key.bias` (D,)."""
        op, weight = self.graph.op, self.graph.frozen(f"{key}.weight")
        y, mean, inverse = self.graph.ops(
            "LayerNormalization", 3, x.name, weight, self.graph.frozen(f"{key}.bias"), epsilon=eps
        )

        def gradient(g: str) -> str:
            axis = self.graph.ints(-1)
            normal = op("Mul", op("Sub", x.name, mean), inverse)
            gw = op("Mul", g, weight)
            along_mean = op("ReduceMean", gw, axis)
            along_normal = op("ReduceMean", op("Mul", gw, normal), axis)
            centred = op("Sub", op("Sub", gw, along_mean), op("Mul", normal, along_normal))
            return op("Mul", centred, inverse)

        return self._record(y, [x], lambda g: self._accumulate(x, lambda: gradient(g)))

    def gelu(self, x: Var) -> Var:
        """The exact GELU, x·Φ(x). The backward pass computes Φ again, because that is cheaper than storing it."""
        op, const = self.graph.op, self.graph.const

        def gradient(g: str) -> str:
            # Φ + x·φ = ½ (1 + erf u + 2/√π · u · exp(−u²)) with u = x/√2: the form with the fewest memory passes
            u = op("Mul", x.name, const(math.sqrt(0.5)))
            density = op("Exp", op("Sub", const(math.log(2 / math.sqrt(math.pi))), op("Mul", u, u)))
            twice = op("Add", op("Add", op("Erf", u), op("Mul", u, density)), const(1.0))
            return op("Mul", op("Mul", g, const(0.5)), twice)

        return self._record(op("Gelu", x.name), [x], lambda g: self._accumulate(x, lambda: gradient(g)))

    def quick_gelu(self, x: Var) -> Var:
        """CLIP's approximation of GELU, x·σ(1.702 x)."""
        op, const = self.graph.op, self.graph.const
        gate = op("Sigmoid", op("Mul", x.name, const(1.702)))

        def gradient(g: str) -> str:
            inner = op("Mul", op("Mul", x.name, const(1.702)), op("Sub", const(1.0), gate))
            return op("Mul", op("Mul", g, gate), op("Add", inner, const(1.0)))

        return self._record(op("Mul", x.name, gate), [x], lambda g: self._accumulate(x, lambda: gradient(g)))

    def tanh(self, x: Var) -> Var:
        op = self.graph.op
        y = op("Tanh", x.name)

        def gradient(g: str) -> str:
            return op("Mul", g, op("Sub", self.graph.const(1.0), op("Mul", y, y)))

        return self._record(y, [x], lambda g: self._accumulate(x, lambda: gradient(g)))

    def class_token(self, x: Var, tokens: int, hidden: int) -> Var:
        """Token 0 of each image: (B·N, D) → (B, D)."""
        op, ints = self.graph.op, self.graph.ints
        images = op("Reshape", x.name, ints(-1, tokens, hidden))
        first = op("Gather", images, self.graph.const(0, np.int64), axis=1)

        def gradient(g: str) -> str:
            padded = op("Pad", op("Unsqueeze", g, ints(1)), ints(0, 0, 0, 0, tokens - 1, 0))
            return op("Reshape", padded, ints(-1, hidden))

        return self._record(first, [x], lambda g: self._accumulate(x, lambda: gradient(g)))

    def attention(self, q: Var, k: Var, v: Var, heads: int, tokens: int, hidden: int, mask: str | None = None) -> Var:
        """Softmax attention of all tokens over all tokens: q, k, v (B·N, D) → (B·N, D).

        `mask` (B, 1, 1, N), a constant, is added to the scores.
        """
        op, ints = self.graph.op, self.graph.ints
        width = hidden // heads
        factor = self.graph.const(1 / math.sqrt(width))

        def to_heads(x: str, perm: Sequence[int]) -> str:
            return op("Transpose", op("Reshape", x, ints(-1, tokens, heads, width)), perm=list(perm))

        def swap(x: str) -> str:
            return op("Transpose", x, perm=[0, 1, 3, 2])

        def from_heads(x: str) -> str:
            return op("Reshape", op("Transpose", x, perm=[0, 2, 1, 3]), ints(-1, hidden))

        # (B, H, N, d), (B, H, d, N), (B, H, N, d)
        qh = op("Mul", to_heads(q.name, (0, 2, 1, 3)), factor)
        kt = to_heads(k.name, (0, 2, 3, 1))
        vh = to_heads(v.name, (0, 2, 1, 3))
        scores = op("MatMul", qh, kt)
        weights = op("Softmax", scores if mask is None else op("Add", scores, mask), axis=-1)
        out = op("MatMul", weights, vh)

        def backward(g: str) -> None:
            gh = to_heads(g, (0, 2, 1, 3))
            self._accumulate(v, lambda: from_heads(op("MatMul", swap(weights), gh)))
            if q.trainable or k.trainable:
                gs = self._softmax_gradient(weights, op("MatMul", gh, swap(vh)), op("Mul", gh, out))
                self._accumulate(q, lambda: from_heads(op("Mul", op("MatMul", gs, swap(kt)), factor)))
                self._accumulate(k, lambda: from_heads(op("MatMul", swap(gs), qh)))

        return self._record(from_heads(out), [q, k, v], backward)

    def pool(self, q: Var, x: Var, heads: int, tokens: int, hidden: int, mask: str | None = None) -> Var:
        """Softmax attention with one query per head and the tokens as keys and values: (B·H, D), (B·N, D) → (B·H, D).

        `mask` (B, 1, 1, N), a constant, is added to the scores.
        """
        op, ints = self.graph.op, self.graph.ints

        def swap(y: str) -> str:
            return op("Transpose", y, perm=[0, 2, 1])

        queries = op("Reshape", q.name, ints(-1, heads, hidden))
        states = op("Reshape", x.name, ints(-1, tokens, hidden))
        scores = op("MatMul", queries, swap(states))
        weights = op("Softmax", scores if mask is None else op("Add", scores, op("Squeeze", mask, ints(1))), axis=-1)
        out = op("MatMul", weights, states)

        def flat(y: str) -> str:
            return op("Reshape", y, ints(-1, hidden))

        def backward(g: str) -> None:
            gh = op("Reshape", g, ints(-1, heads, hidden))
            gw = op("MatMul", gh, swap(states))
            gs = self._softmax_gradient(weights, gw, op("Mul", gw, weights))
            self._accumulate(q, lambda: flat(op("MatMul", gs, states)))
            self._accumulate(x, lambda: flat(op("MatMul", swap(gs), queries)))
            self._accumulate(x, lambda: flat(op("MatMul", swap(weights), gh)))

        return self._record(flat(out), [q, x], backward)

    def spread_heads(self, x: Var, heads: int, hidden: int) -> Var:
        """(B, D) → (B·H, D): row h has the columns of head h, divided by √(D/H), and zeros elsewhere."""
        op, ints = self.graph.op, self.graph.ints
        scaled = self.graph.const(_head_columns(heads, hidden) / math.sqrt(hidden // heads))

        def backward(g: str) -> None:
            rows = op("Mul", op("Reshape", g, ints(-1, heads, hidden)), scaled)
            self._accumulate(x, lambda: op("ReduceSum", rows, ints(1), keepdims=0))

        rows = op("Mul", op("Unsqueeze", x.name, ints(1)), scaled)
        return self._record(op("Reshape", rows, ints(-1, hidden)), [x], backward)

    def join_heads(self, x: Var, heads: int, hidden: int) -> Var:
        """(B·H, D) → (B, D): takes the columns of head h from row h."""
        op, ints = self.graph.op, self.graph.ints
        mask = self.graph.const(_head_columns(heads, hidden))

        def backward(g: str) -> None:
            rows = op("Mul", op("Unsqueeze", g, ints(1)), mask)
            self._accumulate(x, lambda: op("Reshape", rows, ints(-1, hidden)))

        rows = op("Mul", op("Reshape", x.name, ints(-1, heads, hidden)), mask)
        return self._record(op("ReduceSum", rows, ints(1), keepdims=0), [x], backward)

    def _softmax_gradient(self, weights: str, gradient: str, terms: str) -> str:
        """The gradient of the scores from the `gradient` of the softmax weights.

        It needs the row sums Σ w·∂w, which equal those of ∂out·out (Dao et al. 2022). `terms` is either product. The
        narrower one is faster; w·∂w is more precise.
        """
        op = self.graph.op
        return op("Mul", weights, op("Sub", gradient, op("ReduceSum", terms, self.graph.ints(-1))))

    def expert_loss(self, logits: Var, labels: str, weights: str, gate: str, other: str, bias: str) -> str:
        """The loss Σ wᵢ · −log(exp(gateᵢ) p(yᵢ) + exp(otherᵢ)). Sets the gradient of `logits` (B, C).

        p is the softmax of logits + `bias` (C,). `gate` (B,): log gate weight of this expert. `other` (B,): log of the
        other expert's weighted likelihood. The loss is the negative log-likelihood of MoFM. With gate 0 and a large
        negative `other` it is the cross-entropy.
        """
        op = self.graph.op
        log_p = op("LogSoftmax", op("Add", logits.name, bias), axis=-1)
        column = op("Unsqueeze", labels, self.graph.ints(1))
        own = op("Add", gate, op("Squeeze", op("GatherElements", log_p, column, axis=1), self.graph.ints(1)))
        total = _log_add(self.graph, own, other)
        loss = op("Neg", op("ReduceSum", op("Mul", weights, total), keepdims=0))
        if logits.trainable:
            share = op("Mul", weights, op("Exp", op("Sub", own, total)))
            one_hot = op("OneHot", labels, op("Shape", bias), self.graph.const([0.0, 1.0]), axis=-1)
            gradient = op("Mul", op("Sub", op("Exp", log_p), one_hot), op("Unsqueeze", share, self.graph.ints(1)))
            self._gradients[logits.name] = gradient
        return loss

    def gate_loss(self, logits: Var, expert_log_p: str, weights: str) -> str:
        """The loss Σ wᵢ · −log Σₑ gateₑ pₑ(yᵢ), over experts e. Sets the gradient of the gate's `logits` (B, 2)."""
        op = self.graph.op
        log_gate = op("LogSoftmax", logits.name, axis=-1)
        joint = op("Add", log_gate, expert_log_p)
        total = op("ReduceLogSumExp", joint, self.graph.ints(-1))
        column = op("Unsqueeze", weights, self.graph.ints(1))
        loss = op("Neg", op("ReduceSum", op("Mul", column, total), keepdims=0))
        responsibility = op("Exp", op("Sub", joint, total))
        self._gradients[logits.name] = op("Mul", column, op("Sub", op("Exp", log_gate), responsibility))
        return loss


def _log_add(graph: Graph, a: str, b: str) -> str:
    """log(exp a + exp b), without overflow."""
    high, low = graph.op("Max", a, b), graph.op("Min", a, b)
    log1p = graph.op("Log", graph.op("Add", graph.const(1.0), graph.op("Exp", graph.op("Sub", low, high))))
    return graph.op("Add", high, log1p)


def _head_columns(heads: int, hidden: int) -> NDArray[np.float32]:
    """(H, D): one where the column belongs to the head."""
    return np.repeat(np.eye(heads, dtype=np.float32), hidden // heads, axis=1)
