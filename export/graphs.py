"""The graphs of a bundle, composed from the transformer and the tape.

Letters of shapes: B batch, N tokens, D hidden size, F feature width, L blocks, C classes, P trainables of a level, G
trainables of the gate adapter. B, C and P are symbolic: the inputs of a graph decide them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from export.autodiff import Tape, Var
from export.families.family import LORA_TARGETS, Family
from export.frozen import PRECISIONS
from export.graph import Array, Graph, WeightFile
from export.transformer import Geometry, Lora, Transformer
from fedfmsl.protocol.bundle import FP16, Preprocessing, TextPreprocessing
from fedfmsl.protocol.layout import Layout

GATE_WIDTH = 16


def lora_layout(family: Family, geometry: Geometry, rank: int) -> Layout:
    """The LoRA of each block, from block L-1 to block 0. So a lower level is a prefix."""
    shapes: list[tuple[str, str, tuple[int, ...]]] = []
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


LAST = 2**63 - 1  # the end of a slice up to the last value
MASKED_SCORE = -1e9  # added to an attention score: the weight is then exactly zero


@dataclass(frozen=True)
class Padding:
    """The padding of a batch of texts.

    `rows` (B, N, 1): 1 for real tokens, 0 for padding. `mask` (B, 1, 1, N): added to attention scores, 0 for real
    tokens, MASKED_SCORE for padding.
    """

    rows: str
    mask: str


@dataclass(frozen=True)
class GraphWriter:
    """Writes every graph of one bundle into `root`.

    Texts are padded to N tokens, and every graph with attention must know which tokens are padding. So the rows of
    padded tokens in a hidden state (B, N, D) are zero (ours). Rows of real tokens never are, because of the LayerNorm.
    """

    root: Path
    family: Family
    transformer: Transformer
    weights: Mapping[str, Array]
    weight_file: WeightFile
    preprocessing: Preprocessing
    experts: Layout
    gate: Layout
    levels: int
    precision: str  # of the products with frozen weights, one of PRECISIONS

    def write_all(self) -> Iterator[str]:
        """Writes all graphs. Yields the name of each file after it is written."""
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

    def write_fp16(self) -> Iterator[str]:
        """Writes the graphs that a GPU computes, with products in float16. Yields the name of each file."""
        writer, blocks = replace(self, precision="fp16"), self.transformer.geometry.blocks
        yield self._save(f"{FP16}features.onnx", writer.features())
        for level in range(1, self.levels + 1):
            if level > 1:
                yield self._save(f"{FP16}lift-{blocks - level}.onnx", writer.lift(blocks - level))
            yield self._save(f"{FP16}step-{level}.onnx", writer.step(level))
            yield self._save(f"{FP16}predict-{level}.onnx", writer.predict(level))

    def features(self) -> Graph:
        """pixels or tokens → the hidden state below each level's suffix, `hidden_{k}` (B, N, D), and `pooled` (B, F).

        A pass takes as long for one output as for all of them (see `edge_runtime.engines.sessions.run`).
        """
        g, graph = self.transformer.geometry, self._graph("features")
        tape = self._tape(graph)
        x, padding = self._samples(graph)
        for block in range(g.blocks):
            level = g.blocks - block
            if level <= self.levels:
                self._output_state(graph, x, padding, f"hidden_{level}")
            x = self.transformer.block(tape, x, block, {}, class_token_only=level == 1, mask=_mask(padding))
        pooled = self.transformer.tail(tape, x)
        graph.output(pooled.name, "pooled", ["B", g.feature])
        return graph

    def lift(self, block: int) -> Graph:
        """hidden state below `block`, LoRA of the block → hidden state above it (B, N, D)."""
        graph = self._graph(f"lift-{block}")
        tape, (hidden, padding) = self._tape(graph), self._hidden(graph)
        part = self.experts.parts[str(block)]
        theta = graph.input("theta", np.float32, [part.stop - part.start])
        loras = self._loras(self._parameters(graph, theta, self.experts, part, trainable=False))
        x = self.transformer.block(tape, hidden, block, loras[block], mask=_mask(padding))
        self._output_state(graph, x, padding, "lifted")
        return graph

    def step(self, level: int) -> Graph:
        """hidden state, trainables, loss terms → loss and gradient (P,). See `Tape.expert_loss` for the loss."""
        graph = self._graph(f"step-{level}")
        tape = self._tape(graph)
        parameters = self._theta(graph, "theta", level, trainable=True)
        loss = self._loss(graph, tape, level, parameters)
        self._output_gradient(graph, tape, loss, list(parameters.values()))
        return graph

    def forward(self, level: int) -> Graph:
        """The loss of `step`, with each trainable as a parameter. onnxruntime-training adds the gradient."""
        graph = self._graph(f"forward-{level}")
        slots = [slot for slot in self.experts.slots if slot.end <= self.experts.size(level)]
        parameters = {slot.name: Var(graph.parameter(slot.name, slot.shape)) for slot in slots}
        graph.output(self._loss(graph, self._tape(graph), level, parameters), "loss", [])
        return graph

    def predict(self, level: int) -> Graph:
        """hidden state, trainables → `logits` (B, C) and the class token's `feature` (B, F)."""
        graph = self._graph(f"predict-{level}")
        tape, (hidden, padding) = self._tape(graph), self._hidden(graph)
        parameters = self._theta(graph, "theta", level, trainable=False)
        logits, feature = self._expert(tape, hidden, padding, level, parameters)
        graph.output(logits.name, "logits", ["B", "C"])
        graph.output(feature.name, "feature", ["B", self.transformer.geometry.feature])
        return graph

    def personal(self, level: int) -> Graph:
        """The template of the personalized model. A device provides all inputs except pixels or tokens.

        `kept_bias`, `given_bias` and `held_bias` (C,): see `fedfmsl.algorithms.mixture.Biases`. The output
        `probabilities` (B, C) is the softmax of the mixture's log p / `temperature` (1,). The backbone (for the gate)
        and both experts share the frozen prefix.
        """
        g, graph = self.transformer.geometry, self._graph(f"personal-{level}")
        tape = self._tape(graph)
        x, padding = self._samples(graph)
        first = g.blocks - level
        for block in range(first):
            x = self.transformer.block(tape, x, block, {}, mask=_mask(padding))
        kept, given, held = (graph.input(f"{n}_bias", np.float32, ["C"]) for n in ("kept", "given", "held"))
        logits = {}
        for expert in ("global", "local"):
            parameters = self._theta(graph, f"{expert}_theta", level, trainable=False)
            logits[expert] = self._expert(tape, x, padding, level, parameters)[0].name
        biased = [graph.op("Add", logits["global"], bias) for bias in (kept, given)]
        offset = graph.op("Concat", *(graph.op("ReduceLogSumExp", b, graph.ints(1)) for b in biased), axis=1)
        pooled = self.transformer.suffix(tape, x, first, {}, _mask(padding))
        log_gate = self._log_gate(graph, tape, pooled, offset, self._gate_theta(graph, trainable=False))
        graph.output(graph.op("Exp", log_gate), "gate", ["B", 2])
        joint = [graph.op("LogSoftmax", e, axis=-1) for e in (biased[0], graph.op("Add", logits["local"], held))]
        stacked = graph.op("Concat", *(graph.op("Unsqueeze", log_p, graph.ints(1)) for log_p in joint), axis=1)
        weighted = graph.op("Add", stacked, graph.op("Unsqueeze", log_gate, graph.ints(2)))
        mixed = graph.op("ReduceLogSumExp", weighted, graph.ints(1), keepdims=0)
        tempered = graph.op("Div", mixed, graph.input("temperature", np.float32, [1]))
        graph.output(graph.op("Softmax", tempered, axis=-1), "probabilities", ["B", "C"])
        return graph

    def gate_predict(self) -> Graph:
        """pooled feature (B, F), log weights of Bayes' rule (B, 2) → log weights of global and local expert (B, 2)."""
        graph = self._graph("gate-predict")
        pooled, offset = self._pooled(graph), graph.input("offset", np.float32, ["B", 2])
        log_gate = self._log_gate(graph, self._tape(graph), pooled, offset, self._gate_theta(graph, trainable=False))
        graph.output(log_gate, "log_gate", ["B", 2])
        return graph

    def gate_step(self) -> Graph:
        """pooled feature, log weights of Bayes' rule, both experts' log-likelihoods (B, 2) → loss, gradient (G,)."""
        graph = self._graph("gate-step")
        tape, pooled, offset = self._tape(graph), self._pooled(graph), graph.input("offset", np.float32, ["B", 2])
        expert_log_p = graph.input("expert_log_p", np.float32, ["B", 2])
        weights = graph.input("weights", np.float32, ["B"])
        parameters = self._gate_theta(graph, trainable=True)
        loss = tape.gate_loss(self._gate_logits(graph, tape, pooled, offset, parameters), expert_log_p, weights)
        self._output_gradient(graph, tape, loss, list(parameters.values()))
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

    def _samples(self, graph: Graph) -> tuple[Var, Padding | None]:
        """The input for a batch of images or texts → embedded tokens (B·N, D)."""
        preprocessing = self.preprocessing
        if isinstance(preprocessing, TextPreprocessing):
            tokens = graph.input("tokens", np.int64, ["B", preprocessing.max_tokens])
            padded = graph.op("Equal", tokens, graph.const(preprocessing.pad_id, np.int64))
            real = graph.op("Unsqueeze", graph.op("Not", padded), graph.ints(2))
            return self.transformer.embed_tokens(graph, tokens), self._padding(graph, real)
        size = preprocessing.size
        pixels = graph.input("pixels", np.uint8, ["B", size, size, 3])
        return self.transformer.embed(graph, pixels, preprocessing), None

    def _hidden(self, graph: Graph) -> tuple[Var, Padding | None]:
        """The input for a batch of hidden states → (B·N, D)."""
        g, padding = self.transformer.geometry, None
        hidden = graph.input("hidden", np.float32, ["B", g.tokens, g.hidden])
        if isinstance(self.preprocessing, TextPreprocessing):
            largest = graph.op("ReduceMax", graph.op("Abs", hidden), graph.ints(2))
            padding = self._padding(graph, graph.op("Greater", largest, graph.const(0.0)))
        return Var(graph.op("Reshape", hidden, graph.ints(-1, g.hidden))), padding

    def _output_state(self, graph: Graph, x: Var, padding: Padding | None, name: str) -> None:
        """Makes the hidden state x (B·N, D) the output `name` (B, N, D), with zeros for padded tokens."""
        g = self.transformer.geometry
        state = graph.op("Reshape", x.name, graph.ints(-1, g.tokens, g.hidden))
        graph.output(graph.op("Mul", state, padding.rows) if padding else state, name, ["B", g.tokens, g.hidden])

    def _padding(self, graph: Graph, real: str) -> Padding:
        """From the mask of real tokens (B, N, 1), boolean."""
        rows = graph.op("Cast", real, to=onnx.TensorProto.FLOAT)
        keys = graph.op("Reshape", rows, graph.ints(-1, 1, 1, self.transformer.geometry.tokens))
        return Padding(rows, graph.op("Mul", graph.op("Sub", keys, graph.const(1.0)), graph.const(-MASKED_SCORE)))

    def _pooled(self, graph: Graph) -> Var:
        return Var(graph.input("pooled", np.float32, ["B", self.transformer.geometry.feature]))

    def _parameters(self, graph: Graph, theta: str, layout: Layout, part: slice, trainable: bool) -> dict[str, Var]:
        """The tensors of the slice `part` of the layout's vector, which is the end of `theta`."""
        variables = {}
        for slot in layout.slots:
            if part.start <= slot.offset and slot.end <= part.stop:
                end = slot.end - part.stop
                bounds = graph.ints(slot.offset - part.stop), graph.ints(end or LAST)
                flat = graph.op("Slice", theta, *bounds)
                variables[slot.name] = Var(graph.op("Reshape", flat, graph.ints(*slot.shape)), trainable)
        return variables

    def _theta(self, graph: Graph, name: str, level: int, trainable: bool) -> dict[str, Var]:
        """The trainables of `level`, from a vector (P,). Its length tells C: the head has F + 1 values per class."""
        feature, loras = self.transformer.geometry.feature, slice(self.experts.size(0), self.experts.size(level))
        theta = graph.input(name, np.float32, ["P"])
        head = graph.op("Slice", theta, graph.ints(0), graph.ints(loras.start - loras.stop))
        classes = graph.op("Div", graph.op("Shape", head), graph.ints(feature + 1))
        biases = graph.op("Mul", classes, graph.ints(feature))  # index of the first bias
        weight = graph.op("Reshape", graph.op("Slice", head, graph.ints(0), biases), graph.ints(-1, feature))
        return {
            "classifier.weight": Var(weight, trainable),
            "classifier.bias": Var(graph.op("Slice", head, biases, graph.ints(LAST)), trainable),
            **self._parameters(graph, theta, self.experts, loras, trainable),
        }

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

    def _expert(
        self, tape: Tape, hidden: Var, padding: Padding | None, level: int, parameters: Mapping[str, Var]
    ) -> tuple[Var, Var]:
        first = self.transformer.geometry.blocks - level
        feature = self.transformer.suffix(tape, hidden, first, self._loras(parameters), _mask(padding))
        bias = tape.broadcast(parameters["classifier.bias"])
        if self.precision == "fp16":
            feature = tape.normalize(feature)
        return tape.project(feature, parameters["classifier.weight"], plus=bias), feature

    def _loss(self, graph: Graph, tape: Tape, level: int, parameters: Mapping[str, Var]) -> str:
        """Adds the inputs of a training batch. Returns the expert's loss."""
        hidden, padding = self._hidden(graph)
        labels = graph.input("labels", np.int64, ["B"])
        weights, gate, other = (graph.input(name, np.float32, ["B"]) for name in ("weights", "gate", "other"))
        bias = graph.input("bias", np.float32, ["C"])
        logits, _ = self._expert(tape, hidden, padding, level, parameters)
        return tape.expert_loss(logits, labels, weights, gate, other, bias)

    def _gate_logits(self, graph: Graph, tape: Tape, pooled: Var, offset: str, parameters: Mapping[str, Var]) -> Var:
        """`offset` (B, 2) + gate adapter: LayerNorm without affine parameters, F → 16, GELU, 16 → 2 (ours)."""
        ones = graph.const(np.ones(self.transformer.geometry.feature))
        normal = Var(graph.op("LayerNormalization", pooled.name, ones))
        down = tape.broadcast(parameters["gate.down.bias"])
        inner = tape.gelu(tape.project(normal, parameters["gate.down.weight"], plus=down))
        bias = tape.add(tape.broadcast(parameters["gate.up.bias"]), Var(offset))
        return tape.project(inner, parameters["gate.up.weight"], plus=bias)

    def _log_gate(self, graph: Graph, tape: Tape, pooled: Var, offset: str, parameters: Mapping[str, Var]) -> str:
        return graph.op("LogSoftmax", self._gate_logits(graph, tape, pooled, offset, parameters).name, axis=-1)

    def _output_gradient(self, graph: Graph, tape: Tape, loss: str, parameters: list[Var]) -> None:
        flat = [graph.op("Reshape", gradient, graph.ints(-1)) for gradient in tape.gradients(parameters)]
        gradient = graph.op("Concat", *flat, axis=0)
        graph.output(loss, "loss", [])
        graph.output(gradient, "gradient", ["P"])


def _mask(padding: Padding | None) -> str | None:
    return padding.mask if padding else None
