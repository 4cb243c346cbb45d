"""The graphs of a bundle, composed from the transformer and the tape. Shapes use the letters of the method:
B batch, N tokens, D hidden size, F width of the feature, L blocks, C classes, P trainables of a level, G trainables of
the gate adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from export.autodiff import Tape, Var
from export.families.family import LORA_TARGETS, Family
from export.frozen import PRECISIONS
from export.graph import Array, Graph, WeightFile
from export.transformer import Geometry, Lora, Transformer
from protocol.bundle import Precision, Preprocessing
from protocol.layout import HEAD, Layout

GATE_WIDTH = 16


def expert_layout(family: Family, geometry: Geometry, rank: int, classes: int) -> Layout:
    """Head first, then LoRA block by block from the head towards the input."""
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        (HEAD, "classifier.weight", (classes, geometry.feature)),
        (HEAD, "classifier.bias", (classes,)),
    ]
    for block in reversed(range(geometry.blocks)):
        for target in LORA_TARGETS:
            module = family.projection(block, target)
            shapes.append((str(block), f"{module}.lora_A.weight", (rank, geometry.hidden)))
            shapes.append((str(block), f"{module}.lora_B.weight", (geometry.hidden, rank)))
    return Layout.build(shapes)


def gate_layout(feature: int) -> Layout:
    return Layout.build(
        [
            ("gate", "gate.down.weight", (GATE_WIDTH, feature)),
            ("gate", "gate.down.bias", (GATE_WIDTH,)),
            ("gate", "gate.up.weight", (2, GATE_WIDTH)),
            ("gate", "gate.up.bias", (2,)),
        ]
    )


@dataclass(frozen=True)
class GraphWriter:
    """Writes every graph of one bundle into `root`."""

    root: Path
    family: Family
    transformer: Transformer
    weights: Mapping[str, Array]
    weight_file: WeightFile
    preprocessing: Preprocessing
    experts: Layout
    gate: Layout
    classes: int
    levels: int
    precision: Precision

    def write_all(self) -> Iterator[str]:
        """Yields the name of each file once it is written."""
        blocks = self.transformer.geometry.blocks
        yield self._save("features.onnx", self.features())
        for level in range(1, self.levels + 1):
            if level > 1:
                yield self._save(f"lift-{blocks - level}.onnx", self.lift(blocks - level))
            yield self._save(f"step-{level}.onnx", self.step(level))
            yield self._save(f"predict-{level}.onnx", self.predict(level))
            yield self._save(f"personal-{level}.onnx", self.personal(level))
        yield self._save("gate-step.onnx", self.gate_step())
        yield self._save("gate-predict.onnx", self.gate_predict())

    def features(self) -> Graph:
        """pixels → the hidden state below each level's suffix, `hidden_{k}` (B, N, D), and `pooled` (B, F).

        A caller that fetches only some outputs runs only what they need.
        """
        g, graph = self.transformer.geometry, self._graph("features")
        tape = self._tape(graph)
        x = self._pixels(graph)
        for block in range(g.blocks):
            level = g.blocks - block
            if level <= self.levels:
                images = graph.op("Reshape", x.name, graph.ints(-1, g.tokens, g.hidden))
                graph.output(images, f"hidden_{level}", ["B", g.tokens, g.hidden])
            x = self.transformer.block(tape, x, block, {}, class_token_only=level == 1)
        pooled = self.transformer.tail(tape, x)
        graph.output(pooled.name, "pooled", ["B", g.feature])
        return graph

    def lift(self, block: int) -> Graph:
        """hidden state below `block`, its LoRA → hidden state above it (B, N, D)."""
        g, graph = self.transformer.geometry, self._graph(f"lift-{block}")
        tape, hidden = self._tape(graph), self._hidden(graph)
        part = self.experts.parts[str(block)]
        theta = graph.input("theta", np.float32, [part.stop - part.start])
        loras = self._loras(self._parameters(graph, theta, self.experts, part, trainable=False))
        x = self.transformer.block(tape, hidden, block, loras[block])
        images = graph.op("Reshape", x.name, graph.ints(-1, g.tokens, g.hidden))
        graph.output(images, "lifted", ["B", g.tokens, g.hidden])
        return graph

    def step(self, level: int) -> Graph:
        """One LoRA step's loss and gradient (P,), for cross-entropy and the MoFM likelihood alike."""
        graph = self._graph(f"step-{level}")
        tape = self._tape(graph)
        parameters = self._theta(graph, "theta", level, trainable=True)
        loss = self._loss(graph, tape, level, parameters)
        self._emit(graph, tape, loss, list(parameters.values()))
        return graph

    def forward(self, level: int) -> Graph:
        """The loss of `step` without its gradient, each trainable a parameter of its own: what onnxruntime-training
        differentiates itself."""
        graph = self._graph(f"forward-{level}")
        slots = [slot for slot in self.experts.slots if slot.end <= self.experts.size(level)]
        parameters = {slot.name: Var(graph.parameter(slot.name, slot.shape)) for slot in slots}
        graph.output(self._loss(graph, self._tape(graph), level, parameters), "loss", [])
        return graph

    def predict(self, level: int) -> Graph:
        """hidden state, trainables → `logits` (B, C) and the class token's `feature` (B, F)."""
        graph = self._graph(f"predict-{level}")
        tape, hidden = self._tape(graph), self._hidden(graph)
        parameters = self._theta(graph, "theta", level, trainable=False)
        logits, feature = self._expert(tape, hidden, level, parameters)
        graph.output(logits.name, "logits", ["B", self.classes])
        graph.output(feature.name, "feature", ["B", self.transformer.geometry.feature])
        return graph

    def personal(self, level: int) -> Graph:
        """The personalized model as a template: a device turns all inputs but `pixels` into constants.

        `global_bias` (C,) is the device's log class prior, `local_bias` (C,) masks the classes it does not hold.
        The frozen prefix is shared; above it the backbone (for the gate) and both experts part.
        """
        g, graph = self.transformer.geometry, self._graph(f"personal-{level}")
        tape = self._tape(graph)
        x = self._pixels(graph)
        first = g.blocks - level
        for block in range(first):
            x = self.transformer.block(tape, x, block, {})
        joint = []
        pooled = self.transformer.suffix(tape, x, first, {})
        log_gate = self._log_gate(graph, tape, pooled, self._gate_theta(graph, trainable=False))
        graph.output(graph.op("Exp", log_gate), "gate", ["B", 2])
        for expert in ("global", "local"):
            parameters = self._theta(graph, f"{expert}_theta", level, trainable=False)
            bias = graph.input(f"{expert}_bias", np.float32, [self.classes])
            logits, _ = self._expert(tape, x, level, parameters)
            joint.append(graph.op("LogSoftmax", graph.op("Add", logits.name, bias), axis=-1))
        stacked = graph.op("Concat", *(graph.op("Unsqueeze", log_p, graph.ints(1)) for log_p in joint), axis=1)
        weighted = graph.op("Add", stacked, graph.op("Unsqueeze", log_gate, graph.ints(2)))
        mixed = graph.op("ReduceLogSumExp", weighted, graph.ints(1), keepdims=0)
        graph.output(graph.op("Exp", mixed), "probabilities", ["B", self.classes])
        return graph

    def gate_predict(self) -> Graph:
        """pooled feature (B, F) → log weights of the global and the local expert (B, 2)."""
        graph = self._graph("gate-predict")
        log_gate = self._log_gate(
            graph, self._tape(graph), self._pooled(graph), self._gate_theta(graph, trainable=False)
        )
        graph.output(log_gate, "log_gate", ["B", 2])
        return graph

    def gate_step(self) -> Graph:
        """pooled feature, both experts' log-likelihoods of the label (B, 2) → loss, gradient (G,)."""
        graph = self._graph("gate-step")
        tape, pooled = self._tape(graph), self._pooled(graph)
        expert_log_p = graph.input("expert_log_p", np.float32, ["B", 2])
        weights = graph.input("weights", np.float32, ["B"])
        parameters = self._gate_theta(graph, trainable=True)
        loss = tape.gate_loss(self._gate_logits(graph, tape, pooled, parameters), expert_log_p, weights)
        self._emit(graph, tape, loss, list(parameters.values()))
        return graph

    def _tape(self, graph: Graph) -> Tape:
        return Tape(graph, PRECISIONS[self.precision](graph))

    def _graph(self, name: str) -> Graph:
        return Graph(name, self.weights, self.weight_file)

    def _save(self, name: str, graph: Graph) -> str:
        model = graph.model()
        (self.root / name).write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(self.root / name))
        return name

    def _pixels(self, graph: Graph) -> Var:
        size = self.preprocessing.size
        pixels = graph.input("pixels", np.uint8, ["B", size, size, 3])
        return self.transformer.embed(graph, pixels, self.preprocessing)

    def _hidden(self, graph: Graph) -> Var:
        g = self.transformer.geometry
        hidden = graph.input("hidden", np.float32, ["B", g.tokens, g.hidden])
        return Var(graph.op("Reshape", hidden, graph.ints(-1, g.hidden)))

    def _pooled(self, graph: Graph) -> Var:
        return Var(graph.input("pooled", np.float32, ["B", self.transformer.geometry.feature]))

    def _parameters(self, graph: Graph, theta: str, layout: Layout, part: slice, trainable: bool) -> dict[str, Var]:
        """The tensors of `theta`, which holds `part` of the layout's vector."""
        variables = {}
        for slot in layout.slots:
            if part.start <= slot.offset and slot.end <= part.stop:
                bounds = graph.ints(slot.offset - part.start), graph.ints(slot.end - part.start)
                flat = graph.op("Slice", theta, *bounds)
                variables[slot.name] = Var(graph.op("Reshape", flat, graph.ints(*slot.shape)), trainable)
        return variables

    def _theta(self, graph: Graph, name: str, level: int, trainable: bool) -> dict[str, Var]:
        size = self.experts.size(level)
        theta = graph.input(name, np.float32, [size])
        return self._parameters(graph, theta, self.experts, slice(0, size), trainable)

    def _gate_theta(self, graph: Graph, trainable: bool) -> dict[str, Var]:
        theta = graph.input("gate_theta", np.float32, [self.gate.total])
        return self._parameters(graph, theta, self.gate, slice(0, self.gate.total), trainable)

    def _loras(self, parameters: Mapping[str, Var]) -> dict[int, Lora]:
        loras: dict[int, Lora] = {}
        for block in range(self.transformer.geometry.blocks):
            modules = {target: self.family.projection(block, target) for target in LORA_TARGETS}
            loras[block] = {
                target: (parameters[f"{module}.lora_A.weight"], parameters[f"{module}.lora_B.weight"])
                for target, module in modules.items()
                if f"{module}.lora_A.weight" in parameters
            }
        return loras

    def _expert(self, tape: Tape, hidden: Var, level: int, parameters: Mapping[str, Var]) -> tuple[Var, Var]:
        first = self.transformer.geometry.blocks - level
        feature = self.transformer.suffix(tape, hidden, first, self._loras(parameters))
        bias = tape.broadcast(parameters["classifier.bias"])
        return tape.project(feature, parameters["classifier.weight"], plus=bias), feature

    def _loss(self, graph: Graph, tape: Tape, level: int, parameters: Mapping[str, Var]) -> str:
        """hidden state, labels, weights, mixture → the expert's loss."""
        hidden = self._hidden(graph)
        labels = graph.input("labels", np.int64, ["B"])
        weights, gate, other = (graph.input(name, np.float32, ["B"]) for name in ("weights", "gate", "other"))
        bias = graph.input("bias", np.float32, [self.classes])
        logits, _ = self._expert(tape, hidden, level, parameters)
        return tape.expert_loss(logits, labels, weights, gate, other, bias, self.classes)

    def _gate_logits(self, graph: Graph, tape: Tape, pooled: Var, parameters: Mapping[str, Var]) -> Var:
        """LayerNorm (its affine part lies in the next layer), F → 16, GELU, 16 → 2 (ours)."""
        ones = graph.const(np.ones(self.transformer.geometry.feature))
        normal = Var(graph.op("LayerNormalization", pooled.name, ones))
        down = tape.broadcast(parameters["gate.down.bias"])
        inner = tape.gelu(tape.project(normal, parameters["gate.down.weight"], plus=down))
        return tape.project(inner, parameters["gate.up.weight"], plus=tape.broadcast(parameters["gate.up.bias"]))

    def _log_gate(self, graph: Graph, tape: Tape, pooled: Var, parameters: Mapping[str, Var]) -> str:
        return graph.op("LogSoftmax", self._gate_logits(graph, tape, pooled, parameters).name, axis=-1)

    def _emit(self, graph: Graph, tape: Tape, loss: str, parameters: list[Var]) -> None:
        flat = [graph.op("Reshape", gradient, graph.ints(-1)) for gradient in tape.gradients(parameters)]
        gradient = graph.op("Concat", *flat, axis=0)
        graph.output(loss, "loss", [])
        graph.output(gradient, "gradient", ["P"])
