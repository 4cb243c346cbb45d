"""Writes a bundle: graphs, frozen weights, initial trainables and manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from export.backbone_onnx import write_backbone_onnx
from export.graph import WEIGHTS_FILE, WeightFile
from export.graphs import GraphWriter, gate_layout, lora_layout
from export.models import RANDOM
from export.ort_training import write_artifacts
from export.parity import check_parity
from export.reference import initial_expert
from export.transformer import Geometry, Transformer
from export.weights import Backbone
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.errors import BundleError, ConfigError
from fedfmsl.protocol.bundle import (
    FP16,
    MANIFEST,
    TOKENIZER,
    Bundle,
    Dims,
    FileEntry,
    LoraSpec,
    Manifest,
    PeftSpec,
    file_sha256,
)
from fedfmsl.protocol.layout import Layout, expert_layout
from fedfmsl.protocol.setting_types import Precision
from fedfmsl.protocol.task_bundle import with_numbered_classes


def build_bundle(
    source: Backbone,
    levels: int | None,
    lora: LoraSpec,
    out: Path,
    seed: int,
    precision: Precision = "fp32",
    ort_training: bool = False,
    fp16: bool = False,
) -> Iterator[tuple[int, int, str]]:
    """Writes the bundle to `out`, as a whole or not at all. Yields (steps done, all steps, current step).

    A bundle that is there already stays: a server or a device may use it. Raises ConfigError if it is another one, and
    for invalid levels, precision or `out`. Raises BundleError if a graph differs from torch + PEFT.
    """
    geometry = source.family.geometry(source.model.config, source.size)
    levels = check_levels(levels, geometry)
    for option, wanted in (("--ort-training", ort_training), ("--fp16", fp16)):
        if wanted and precision != "fp32":
            raise ConfigError(f"{option} needs --precision fp32, not {precision}; omit one of them")
    check_out(out, precision, levels)
    spec = _Spec(source, geometry, levels, lora, precision)
    steps = 1 + (4 + ort_training + 3 * fp16) * levels + 2 + 2
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        created = tempfile.TemporaryDirectory(dir=out.parent)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"--out {out} cannot be created ({error.strerror}); choose another folder") from error
    with created as scratch:
        root = Path(scratch) / "bundle"
        root.mkdir()
        done = 0
        yield done, steps, "backbone (optimum)"
        with WeightFile(root / WEIGHTS_FILE) as weight_file:
            writer = spec.graph_writer(root, weight_file)
            for done, name in enumerate(chain(writer.write_all(), writer.write_fp16() if fp16 else ()), start=1):
                yield done, steps, name
            for level in range(1, levels + 1) if ort_training else ():
                done += 1
                yield done, steps, write_artifacts(writer, level)
            if precision == "fp32":  # needs fp32 weights, which an int8 bundle does not have
                write_backbone_onnx(source, root / "backbone.onnx", weight_file)
        if source.tokenizer:
            (root / TOKENIZER).write_text(source.tokenizer, encoding="utf-8")
        # not save_file, which lets nobody but the owner read the file
        (root / "init.safetensors").write_bytes(save(_initial_tensors(spec, seed)))
        (root / MANIFEST).write_text(_manifest(spec, root).model_dump_json(indent=1), encoding="utf-8")
        written = with_numbered_classes(Bundle.load(root), spec.outputs)
        for level, kind in product(sorted({1, levels}), ("", FP16) if fp16 else ("",)):
            yield done + 1, steps, f"compare with PEFT, {kind}level {level}"
            check_parity(written, source, level, seed, kind)
        _keep_or_rename(root, out)
    yield steps, steps, "done"


def check_levels(levels: int | None, geometry: Geometry) -> int:
    """Raises ConfigError if the model has fewer blocks. Default: all of them."""
    if levels and levels > geometry.blocks:
        raise ConfigError(f"--levels {levels} is more than the {geometry.blocks} blocks of the model; lower it")
    return levels or geometry.blocks


def check_out(out: Path, precision: Precision, levels: int | None = None) -> None:
    """Raises ConfigError if a bundle of these options cannot be written to `out`, as far as that is known before the
    build."""
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out} exists and is not a bundle; choose another folder")
        return
    try:
        there = Bundle.load(out).manifest
    except BundleError as error:
        raise ConfigError(f"--out {out} holds a bundle that cannot be read ({error}); choose another folder") from error
    if there.precision != precision or levels not in (None, there.levels):
        raise _other_bundle(out)


def _keep_or_rename(root: Path, out: Path) -> None:
    """Raises ConfigError if `out` holds another bundle than `root`."""
    if (out / MANIFEST).exists():
        if (out / MANIFEST).read_bytes() != (root / MANIFEST).read_bytes():
            raise _other_bundle(out)
        Bundle.load(out).verify()
        return
    try:
        root.rename(out)  # also over an empty folder
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from error


def _other_bundle(out: Path) -> ConfigError:
    return ConfigError(
        f"--out {out} holds another bundle, which a server or a device may use; choose another --out, or delete that "
        "folder first"
    )


@dataclass(frozen=True)
class _Spec:
    """What a bundle is built from, and the layouts that follow from it."""

    source: Backbone
    geometry: Geometry
    levels: int
    lora: LoraSpec
    precision: Precision

    @property
    def outputs(self) -> int:
        """The classes of the torch model that the graphs are compared with. No class of it is in the bundle."""
        return int(self.source.model.config.num_labels)

    @property
    def experts(self) -> Layout:
        """The layout of all blocks, also of those above `levels`."""
        loras = lora_layout(self.source.family, self.geometry, self.lora.rank)
        return expert_layout(self.outputs, self.geometry.feature, loras)

    @property
    def loras(self) -> Layout:
        """The layout of the LoRA up to `levels`."""
        layout = self.experts
        slots = [slot for slot in layout.slots if layout.size(0) < slot.end <= layout.size(self.levels)]
        return Layout.build([(slot.part, slot.name, slot.shape) for slot in slots])

    @property
    def gate(self) -> Layout:
        return gate_layout(self.geometry.feature)

    @property
    def peft(self) -> PeftSpec:
        family, origin = self.source.family, self.source.origin
        return PeftSpec(
            base=origin.base if origin else RANDOM,
            revision=origin.commit if origin else None,
            prefix=family.backbone,
            layers_pattern=family.layers_pattern,
            head_width=self.geometry.feature,
            classifier_width=family.classifier_width * self.geometry.feature,
            base_class=f"{family.reference.__module__}.{family.reference.__name__}",
        )

    def graph_writer(self, root: Path, weight_file: WeightFile) -> GraphWriter:
        source = self.source
        return GraphWriter(
            root=root,
            family=source.family,
            transformer=Transformer(self.geometry, self.lora.alpha / self.lora.rank),
            weights=source.family.weights(source.model, source.size),
            weight_file=weight_file,
            preprocessing=source.preprocessing,
            experts=self.experts,
            gate=self.gate,
            levels=self.levels,
            precision=self.precision,
        )


def _initial_tensors(spec: _Spec, seed: int) -> dict[str, Floats]:
    layout, blocks = spec.experts, spec.geometry.blocks
    expert = initial_expert(spec.source, spec.lora, spec.peft, layout, blocks, seed)
    return {"lora": expert[layout.size(0) : layout.size(spec.levels)], "gate": _initial_gate(spec.gate, seed)}


def _initial_gate(layout: Layout, seed: int) -> Vector:
    """The initial gate adapter (G,): a Kaiming-uniform first layer, zeros elsewhere. Both experts have equal weight."""
    rng = np.random.default_rng(seed)
    vector = np.zeros(layout.total, np.float32)
    down = layout.split(vector)["gate.down.weight"]
    bound = (1 / down.shape[1]) ** 0.5
    down[:] = rng.uniform(-bound, bound, down.shape)
    return vector


def _manifest(spec: _Spec, root: Path) -> Manifest:
    """The manifest of the files in `root`."""
    source, geometry = spec.source, spec.geometry
    return Manifest(
        model=source.name,
        family=source.family.model_type,
        precision=spec.precision,
        preprocessing=source.preprocessing,
        dims=Dims(
            tokens=geometry.tokens,
            hidden=geometry.hidden,
            feature=geometry.feature,
            blocks=geometry.blocks,
        ),
        lora=spec.lora,
        levels=spec.levels,
        lora_layout=spec.loras.slots,
        gate_layout=spec.gate.slots,
        peft=spec.peft,
        backbone_parameters=source.parameters,
        files={
            path.name: FileEntry(size=path.stat().st_size, sha256=file_sha256(path)) for path in sorted(root.iterdir())
        },
    )
