"""The floating-point operations of the matrix products of an ONNX graph, from its shapes."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

PRODUCTS = ("Gemm", "MatMul", "MatMulInteger")


def graph_flops(path: Path, batch: int, trainables: int, head: tuple[int, int]) -> int:
    """The sum of 2·M·N·K over all products, for P = `trainables` and a `head` (C, F)."""
    model = onnx.load(str(path), load_external_data=False)
    # how graphs find C and C·F, which shape inference cannot follow: kind of node, kind of its first input
    known = {("Div", "shape"): head[0], ("Mul", "div"): prod(head), ("Shape", "bias"): head[0]}
    for node in list(model.graph.node):
        if node.op_type == "MatMulIntegerToFloat":  # shape inference does not know it; shapes as for MatMulInteger
            node.op_type, node.domain = "MatMulInteger", ""
            del node.input[2:]
        kind = node.op_type, node.input[0].split(".")[0] if node.input else ""
        if kind in known:
            value = np.array([known[kind]])
            model.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
            model.graph.node.remove(node)
    sizes = {"B": batch, "P": trainables, "C": head[0]}
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    model = shape_inference.infer_shapes(model, data_prop=True)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]:
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    total = 0
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            inner = shapes[node.input[0]][0 if transposed else -1]
            total += 2 * prod(shapes[node.output[0]]) * inner
    return total
