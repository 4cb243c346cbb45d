"""Two adapters in one forward pass, exactly, on the graphs of a bundle with one.

The sum of two LoRA of rank r with weights u and v is one LoRA of rank 2r: A is A₁ above A₂, B is u·B₁ beside v·B₂. The
graphs of a bundle do not depend on the rank except where they cut the vector of trainables into tensors. So a session
with rank 2r is opened from the same file with other cuts. The scale α/r stays that of the bundle. The heads of the
adapters are combined with the same weights (ours; the papers' models have no new head).
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import onnx
from onnx import numpy_helper

from edge_runtime.engines.runtime import onnxruntime
from edge_runtime.engines.sessions import InferenceSession, session_options
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.algorithms.mixture import log_softmax
from fedfmsl.protocol.layout import HEAD, Layout, Slot
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.methods.local_training import is_lora_a, is_lora_b, step_graphs


def wide_layout(layout: Layout) -> Layout:
    """The layout with LoRA of twice the rank."""
    return Layout.build([(slot.part, slot.name, _wide_shape(slot)) for slot in layout.slots])


def _wide_shape(slot: Slot) -> tuple[int, ...]:
    rows, *columns = slot.shape
    if is_lora_a(slot):
        return 2 * rows, *columns
    return (rows, 2 * columns[0]) if is_lora_b(slot) else slot.shape


@dataclass(frozen=True)
class Adapters:
    """Combines two adapters, each (P,) in `layout`, into the trainables of rank 2r in `wide`."""

    layout: Layout
    wide: Layout

    @classmethod
    def of(cls, bundle: TaskBundle) -> Adapters:
        return cls(bundle.expert, wide_layout(bundle.expert))

    def combine(self, first: Vector, second: Vector, weights: Floats) -> Vector:
        """The trainables of rank 2r of the sum with `weights` (2,)."""
        one, two, (u, v) = self.layout.split(first), self.layout.split(second), weights
        parts = []
        for slot in self._slots(first):
            a, b = one[slot.name], two[slot.name]
            if is_lora_a(slot):
                parts.append(np.concatenate([a, b]))
            else:
                parts.append(np.concatenate([u * a, v * b], axis=1) if is_lora_b(slot) else u * a + v * b)
        return np.concatenate([part.ravel() for part in parts]).astype(np.float32)

    def gradients(self, first: Vector, second: Vector, weights: Floats, gradient: Vector) -> tuple[Vector, Floats]:
        """From the gradient of the loss with respect to the combined trainables: those with respect to `first` (P,)
        and to the weights (2,)."""
        one, two, wide = self.layout.split(first), self.layout.split(second), self.wide.split(gradient)
        of_first, of_weights = np.empty_like(first), np.zeros(2, np.float64)
        out = self.layout.split(of_first)
        for slot in self._slots(first):
            name = slot.name
            if is_lora_a(slot):
                out[name][:] = wide[name][: slot.shape[0]]
                continue
            halves = np.split(wide[name], 2, axis=1) if is_lora_b(slot) else (wide[name], wide[name])
            out[name][:] = weights[0] * halves[0]
            of_weights += [np.vdot(halves[0], one[name]), np.vdot(halves[1], two[name])]
        return of_first, of_weights.astype(np.float32)

    def _slots(self, theta: Vector) -> list[Slot]:
        return [slot for slot in self.layout.slots if slot.end <= theta.size]


class WideEngine(StepGraphEngine):
    """Runs the graphs of a bundle with LoRA of rank 2r. For callers with an optimizer of their own."""

    @classmethod
    def beside(cls, engine: StepGraphEngine) -> WideEngine:
        """An engine of the same bundle, with the same threads."""
        return cls(engine._bundle, engine._threads)

    def _open(self, name: str, prepack: bool) -> InferenceSession:
        return open_wide(self._bundle, name, self._threads, prepack)


_ENGINES: WeakKeyDictionary[StepGraphEngine, WideEngine] = WeakKeyDictionary()


def wide_engine(context: TrainingContext) -> WideEngine:
    """The engine with LoRA of rank 2r beside the context's engine. Opened once in a process."""
    engine = step_graphs(context)
    if engine not in _ENGINES:
        _ENGINES[engine] = WideEngine.beside(engine)
    return _ENGINES[engine]


def weighted_log_p(
    context: TrainingContext, samples: Samples, first: Vector, second: Vector, weights: Floats
) -> Floats:
    """Class log-probabilities (n, C) with the adapters `first` and `second` (P,) combined by `weights` (n, 2)."""
    adapters, engine, level = Adapters.of(context.bundle), wide_engine(context), context.level_of(first)
    engine.load(level)
    if not samples:
        return np.empty((0, context.classes), np.float32)
    hidden, logits = context.cache.precise().frozen(samples, level), []
    for index, pair in enumerate(weights):
        engine.set(adapters.combine(first, second, pair))
        logits.append(engine.predict(hidden.batch([index])))
    return log_softmax(np.concatenate(logits))


def open_wide(bundle: TaskBundle, name: str, threads: int, prepack: bool = True) -> InferenceSession:
    """A session of the bundle's graph `name`, with `theta` cut as `wide_layout` says. Needs ONNX Runtime 1.21."""
    path = bundle.path(name)
    model = onnx.load(str(path), load_external_data=False)
    _widen(model.graph, bundle.expert)
    options = session_options(threads, prepack)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _widen(graph: onnx.GraphProto, layout: Layout) -> None:
    """Replaces the bounds of each slice of `theta`, and the shape that the slice gets. Bounds count from the end of
    `theta`, except the start of the head and the end of the last slice. LoRA of rank 2r has twice the values."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    reshapes = {node.input[0]: node for node in graph.node if node.op_type == "Reshape"}

    def constant(*values: int) -> str:
        name = f"wide.{'.'.join(map(str, values))}"
        if name not in stored:
            stored[name] = numpy_helper.from_array(np.array(values, np.int64), name)
            graph.initializer.append(stored[name])
        return name

    loras = iter(slot for slot in wide_layout(layout).slots if slot.part != HEAD)
    for node in graph.node:
        if node.op_type == "Slice" and node.input[0] == "theta":
            start, end = (int(numpy_helper.to_array(stored[name])[0]) for name in node.input[1:3])
            node.input[1], node.input[2] = constant(2 * start), constant(2 * end if end < 0 else end)
            if start:
                reshapes[node.output[0]].input[1] = constant(*next(loras).shape)
