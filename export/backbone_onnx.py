"""Exports the frozen backbone with optimum, which compares it with torch. The file is independent of our own graphs."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import numpy_helper
from optimum.exporters.onnx import export, validate_model_outputs
from optimum.exporters.tasks import TasksManager
from optimum.utils import DummyVisionInputGenerator

from export.graph import INLINE_BYTES, WeightFile
from export.weights import Backbone
from fedfmsl.errors import BundleError

OPSET = 17
TOLERANCE = 1e-3  # optimum's value for vision transformers


def write_backbone_onnx(source: Backbone, path: Path, weight_file: WeightFile) -> None:
    """Writes `path`: normalized pixels (B, 3, S, S), or tokens (B, N) and their mask → last hidden state (B, N, D).

    The weights are stored in `weight_file`. Raises BundleError if ONNX Runtime and torch differ by more than TOLERANCE.
    """
    backbone = source.family.optimum_model(source.model) if source.family.optimum_model else source.backbone
    model_config = copy.deepcopy(backbone.config)
    make_config = TasksManager.get_exporter_config_constructor(
        "onnx", model_type=model_config.model_type, task="feature-extraction", library_name="transformers"
    )
    shapes = {"batch_size": 2}
    if source.family.input == "tokens":
        shapes["sequence_length"] = source.size
        config = make_config(model_config)
    else:
        model_config.image_size = source.size
        config = make_config(model_config)
        # optimum's generator for DINOv2 reads the image size from a preprocessor file, which may be missing
        config.DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        raw = Path(folder) / "model.onnx"
        _, outputs = export(backbone, config, raw, opset=OPSET, input_shapes=shapes)
        try:
            validate_model_outputs(config, backbone, raw, outputs, TOLERANCE, shapes, use_subprocess=False)
        except ValueError as error:
            raise BundleError(
                f"{source.name}: outputs of ONNX Runtime and torch differ by more than {TOLERANCE}; this model cannot "
                "be exported"
            ) from error
        model = onnx.load(str(raw))
    for index, tensor in enumerate(model.graph.initializer):
        if len(tensor.raw_data) > INLINE_BYTES:
            stored = weight_file.tensor(tensor.name, numpy_helper.to_array(tensor))
            model.graph.initializer[index].CopyFrom(stored)
    path.write_bytes(model.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides tracer warnings and optimum's log lines. Errors are still raised."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
