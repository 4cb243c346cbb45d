"""Reverse-mode differentiation while a graph is being written (ours).

Each primitive emits its forward nodes and notes how its gradient is emitted; `gradients` then writes the backward pass
in reverse order. A gradient is only emitted where something trainable lies below it, so a frozen weight costs nothing
and the lowest active block never computes the gradient of its input.

Activations are two-dimensional, (B·N, D), so that every projection is one Gemm; only attention sees (B, H, N, D/H).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from export.graph import Graph


@dataclass(frozen=True)
class Var:
    """A tensor of the graph, and whether anything trainable lies below it."""

    name: str
    trainable: bool = False


class Tape:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._backward: list[tuple[Var, Callable[[str], None]]] = []
        self._gradients: dict[str, str] = {}

    def gradients(self, of: Sequence[Var]) -> list[str]:
        """Emits the backward pass from every seeded gradient (see the losses) and returns those of `of`."""
        for output, backward in reversed(self._backward):
            if output.name in self._gradients:
                backward(self._gradients[output.name])
        return [self._gradients[var.name] for var in of]

    def _record(self, name: str, inputs: Sequence[Var], backward: Callable[[str], None]) -> Var:
        output = Var(name, any(var.trainable for var in inputs))
        if output.trainable:
            self._backward.append((output, backward))
        return output

    def _accumulate(self, var: Var, gradient: Callable[[], str]) -> None:
        if var.trainable:
            new = gradient()
            old = self._gradients.get(var.name)
            self._gradients[var.name] = new if old is None else self.graph.op("Add", old, new)

    def add(self, a: Var, b: Var) -> Var:
        def backward(g: str) -> None:
            self._accumulate(a, lambda: g)
            self._accumulate(b, lambda: g)

        return self._record(self.graph.op("Add", a.name, b.name), [a, b], backward)

    def scale(self, x: Var, key: str) -> Var:
        """Layer scale: x (·, D) times a frozen vector (D,)."""
        op, weight = self.graph.op, self.graph.frozen(key)

        def backward(g: str) -> None:
            self._accumulate(x, lambda: op("Mul", g, weight))

        return self._record(op("Mul", x.name, weight), [x], backward)

    def linear(self, x: Var, key: str) -> Var:
        """x (·, I) through the frozen `key.weight` (I, O) and `key.bias` (O,)."""
        op, weight = self.graph.op, self.graph.frozen(f"{key}.weight")

        def backward(g: str) -> None:
            self._accumulate(x, lambda: op("Gemm", g, weight, transB=1))

        return self._record(op("Gemm", x.name, weight, self.graph.frozen(f"{key}.bias")), [x], backward)

    def project(self, x: Var, weight: Var, plus: Var, factor: float = 1.0) -> Var:
        """factor · x Wᵀ + plus, with a trainable weight (O, I); `plus` is (·, O), or a trainable bias (O,)."""
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
        """A trainable bias (O,) as it is added to every row: its gradient is summed over rows."""
        op = self.graph.op

        def backward(g: str) -> None:
            self._accumulate(bias, lambda: op("ReduceSum", g, self.graph.ints(0), keepdims=0))

        return self._record(op("Identity", bias.name), [bias], backward)

    def layer_norm(self, x: Var, key: str, epsilon: float) -> Var:
        """LayerNorm over the last axis with frozen `key.weight` and `key.bias` (D,)."""
        op, weight = self.graph.op, self.graph.frozen(f"{key}.weight")
        y, mean, inverse = self.graph.ops(
            "LayerNormalization", 3, x.name, weight, self.graph.frozen(f"{key}.bias"), epsilon=epsilon
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
        """The exact GELU, x·Φ(x). Φ is computed again on the way back: cheaper than keeping it in memory."""
        op, const = self.graph.op, self.graph.const

        def gradient(g: str) -> str:
            erf = op("Erf", op("Mul", x.name, const(math.sqrt(0.5))))
            cdf = op("Mul", op("Add", erf, const(1.0)), const(0.5))
            density = op("Exp", op("Mul", op("Mul", x.name, x.name), const(-0.5)))
            slope = op("Mul", op("Mul", x.name, density), const(1 / math.sqrt(2 * math.pi)))
            return op("Mul", g, op("Add", cdf, slope))

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

    def attention(
        self, q: Var, k: Var, v: Var, heads: int, queries: int, tokens: int, hidden: int, mask: str | None = None
    ) -> Var:
        """Softmax attention of `queries` tokens over `tokens`: (B·Q, D), (B·N, D), (B·N, D) → (B·Q, D).

        `mask` (B, 1, 1, N), a constant, is added to the scores.
        """
        op, ints = self.graph.op, self.graph.ints
        width = hidden // heads
        factor = self.graph.const(1 / math.sqrt(width))

        def to_heads(x: str, count: int, perm: Sequence[int]) -> str:
            return op("Transpose", op("Reshape", x, ints(-1, count, heads, width)), perm=list(perm))

        def from_heads(x: str) -> str:
            return op("Reshape", op("Transpose", x, perm=[0, 2, 1, 3]), ints(-1, hidden))

        def swap(x: str) -> str:
            return op("Transpose", x, perm=[0, 1, 3, 2])

        # (B, H, Q, d), (B, H, d, N), (B, H, N, d)
        qh = op("Mul", to_heads(q.name, queries, (0, 2, 1, 3)), factor)
        kt = to_heads(k.name, tokens, (0, 2, 3, 1))
        vh = to_heads(v.name, tokens, (0, 2, 1, 3))
        scores = op("MatMul", qh, kt)
        weights = op("Softmax", scores if mask is None else op("Add", scores, mask), axis=-1)
        out = from_heads(op("MatMul", weights, vh))

        def backward(g: str) -> None:
            gh = to_heads(g, queries, (0, 2, 1, 3))
            self._accumulate(v, lambda: from_heads(op("MatMul", swap(weights), gh)))
            if q.trainable or k.trainable:
                gw = op("MatMul", gh, swap(vh))
                along = op("ReduceSum", op("Mul", gw, weights), ints(-1))
                gs = op("Mul", weights, op("Sub", gw, along))
                self._accumulate(q, lambda: from_heads(op("Mul", op("MatMul", gs, swap(kt)), factor)))
                self._accumulate(k, lambda: from_heads(op("MatMul", swap(gs), qh)))

        return self._record(out, [q, k, v], backward)

    def expert_loss(
        self, logits: Var, labels: str, weights: str, gate: str, other: str, bias: str, classes: int
    ) -> str:
        """Σ wᵢ · −log(exp(gateᵢ) p(yᵢ) + exp(otherᵢ)), seeding the gradient of `logits` (B, C).

        p is the softmax of logits + bias (C,). `gate` (B,) is the log weight of this expert and `other` (B,) the log of
        the other expert's weighted likelihood: the MoFM likelihood. With gate 0 and other −∞ (a large negative number)
        it is the cross-entropy.
        """
        op = self.graph.op
        log_p = op("LogSoftmax", op("Add", logits.name, bias), axis=-1)
        column = op("Unsqueeze", labels, self.graph.ints(1))
        own = op("Add", gate, op("Squeeze", op("GatherElements", log_p, column, axis=1), self.graph.ints(1)))
        total = _log_add(self.graph, own, other)
        loss = op("Neg", op("ReduceSum", op("Mul", weights, total), keepdims=0))
        share = op("Mul", weights, op("Exp", op("Sub", own, total)))
        one_hot = op("OneHot", labels, self.graph.const(classes, np.int64), self.graph.const([0.0, 1.0]), axis=-1)
        gradient = op("Mul", op("Sub", op("Exp", log_p), one_hot), op("Unsqueeze", share, self.graph.ints(1)))
        self._gradients[logits.name] = gradient
        return loss

    def gate_loss(self, logits: Var, expert_log_p: str, weights: str) -> str:
        """Σ wᵢ · −log Σₑ gateₑ pₑ(yᵢ), seeding the gradient of the gate's `logits` (B, 2)."""
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
    rest = graph.op("Log", graph.op("Add", graph.const(1.0), graph.op("Exp", graph.op("Sub", low, high))))
    return graph.op("Add", high, rest)
