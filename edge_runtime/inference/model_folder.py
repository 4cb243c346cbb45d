"""Writes the personalized model as a folder that Optimum, transformers and transformers.js open.

    config.json              class names
    preprocessor_config.json, or tokenizer.json and tokenizer_config.json
    onnx/model.onnx          `pixel_values` (B, 3, S, S) float, or `input_ids` (B, N) → `logits` (B, C)

The softmax of the logits is the probabilities of `personalized.onnx`. The graph turns standard inputs back into those
of the bundle's template: pixels as bytes, or texts padded to the bundle's length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.data.texts import TextTokenizer
from edge_runtime.inference.export_onnx import assemble, serialized
from edge_runtime.store import DeviceStore
from fedfmsl.common.whole_folder import check_own, write_folder
from fedfmsl.protocol.bundle import TOKENIZER, ImagePreprocessing, Preprocessing, TextPreprocessing
from fedfmsl.protocol.image_processor import PREPROCESSOR, image_processor
from fedfmsl.protocol.task_bundle import TaskBundle

MODEL = "onnx/model.onnx"
# The model type and class of transformers for each family. transformers.js has no image classifier of type clip, and
# reads nothing but the class names for one of type vit.
CLASSES = {
    "vit": ("vit", "ViTForImageClassification"),
    "deit": ("deit", "DeiTForImageClassification"),
    "dinov2": ("dinov2", "Dinov2ForImageClassification"),
    "clip": ("vit", "ViTForImageClassification"),
    "bert": ("bert", "BertForSequenceClassification"),
}


def write_model_folder(store: DeviceStore, folder: Path, bundle_path: Path | None = None) -> None:
    """Writes the device's newest model to `folder`. Default bundle: the one that the device downloaded.

    Raises ConfigError if `folder` is no folder or has other files. Raises InputError if the device has no personalized
    model yet, BundleError if its bundle is missing or another one.
    """
    personal = assemble(store, bundle_path)
    bundle, preprocessing = personal.bundle, personal.bundle.manifest.preprocessing
    files: dict[str, bytes | Iterable[bytes]] = {"config.json": _json(_config(bundle))}
    if isinstance(preprocessing, ImagePreprocessing):
        files[PREPROCESSOR] = _json(image_processor(preprocessing))
    else:
        files[TOKENIZER] = bundle.tokenizer().encode()
        files["tokenizer_config.json"] = _json(_tokenizer_config(bundle.tokenizer(), preprocessing))
    check_own("--folder", folder, [*files, MODEL])
    _standardize(personal.model.graph, preprocessing)
    helper.set_model_props(personal.model, personal.origin)
    write_folder(folder, {**files, MODEL: serialized(personal.model, personal.frozen, bundle)})


def _config(bundle: TaskBundle) -> dict[str, Any]:
    """transformers' configuration of a classifier with the task's classes."""
    manifest = bundle.manifest
    model_type, name = CLASSES[manifest.family]
    image = {"image_size": manifest.preprocessing.size} if manifest.preprocessing.kind == "image" else {}
    return {
        "model_type": model_type,
        "architectures": [name],
        "hidden_size": manifest.dims.hidden,
        "num_hidden_layers": manifest.dims.blocks,
        **image,
        "id2label": {str(index): name for index, name in enumerate(bundle.classes)},
        "label2id": {name: index for index, name in enumerate(bundle.classes)},
    }


def _tokenizer_config(tokenizer: str, preprocessing: TextPreprocessing) -> dict[str, Any]:
    """For transformers' PreTrainedTokenizerFast, which reads everything else in tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": preprocessing.max_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": TextTokenizer(tokenizer, preprocessing).pad_token,
    }


def _standardize(graph: onnx.GraphProto, preprocessing: Preprocessing) -> None:
    """Replaces the template's input and outputs by those that transformers uses."""
    if isinstance(preprocessing, ImagePreprocessing):
        value, before, constants = _from_pixel_values(preprocessing)
    else:
        value, before, constants = _from_input_ids(preprocessing)
    made_by = {name: node for node in graph.node for name in node.output}
    softmax = made_by[made_by["probabilities"].input[0]]
    assert softmax.op_type == "Softmax"
    nodes = [*before, *graph.node, helper.make_node("Identity", [softmax.input[0]], ["logits"])]
    classes = next(output for output in graph.output if output.name == "probabilities").type.tensor_type.shape.dim[1]
    for values in (graph.node, graph.input, graph.output):
        del values[:]
    graph.node.extend(nodes)
    graph.input.append(value)
    graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", classes.dim_value]))
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())


Steps = tuple[onnx.ValueInfoProto, list[onnx.NodeProto], dict[str, NDArray[Any]]]


def _from_pixel_values(preprocessing: ImagePreprocessing) -> Steps:
    """`pixel_values` (B, 3, S, S), normalized → `pixels` (B, S, S, 3) uint8: exactly the bytes that were normalized."""
    size = preprocessing.size
    value = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["B", 3, size, size])
    constants: dict[str, NDArray[Any]] = {
        "pixel_scale": np.array(preprocessing.std, np.float32) * 255,
        "pixel_offset": np.array(preprocessing.mean, np.float32) * 255,
        "pixel_lowest": np.array(0, np.float32),
        "pixel_highest": np.array(255, np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["pixel_values"], ["pixel_last"], perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["pixel_last", "pixel_scale"], ["pixel_scaled"]),
        helper.make_node("Add", ["pixel_scaled", "pixel_offset"], ["pixel_real"]),
        helper.make_node("Round", ["pixel_real"], ["pixel_whole"]),
        helper.make_node("Clip", ["pixel_whole", "pixel_lowest", "pixel_highest"], ["pixel_clipped"]),
        helper.make_node("Cast", ["pixel_clipped"], ["pixels"], to=TensorProto.UINT8),
    ]
    return value, nodes, constants


def _from_input_ids(preprocessing: TextPreprocessing) -> Steps:
    """`input_ids` (B, N) of any length N → `tokens`, padded or cut to the bundle's length."""
    value = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "N"])
    constants: dict[str, NDArray[Any]] = {
        "token_length": np.array([preprocessing.max_tokens], np.int64),
        "token_pad": np.array(preprocessing.pad_id, np.int64),
        "token_start": np.zeros(3, np.int64),
    }
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["token_given"], start=1, end=2),
        helper.make_node("Sub", ["token_length", "token_given"], ["token_missing"]),  # negative: Pad cuts
        helper.make_node("Concat", ["token_start", "token_missing"], ["token_pads"], axis=0),
        helper.make_node("Pad", ["input_ids", "token_pads", "token_pad"], ["tokens"]),
    ]
    return value, nodes, constants


def _json(values: object) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
