"""The floating-point operations of the matrix products of an ONNX graph, from its shapes."""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx
from onnx import shape_inference

PRODUCTS = ("Gemm", "MatMul", "MatMulInteger")


def graph_flops(path: Path, batch: int) -> int:
    """The sum of 2·M·N·K over all products, at batch size `batch`."""
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulIntegerToFloat":  # shape inference does not know it; shapes as for MatMulInteger
            node.op_type, node.domain = "MatMulInteger", ""
            del node.input[2:]
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "B":
                dim.dim_value = batch
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
