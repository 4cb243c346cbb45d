"""The bundle: a frozen backbone exported once, immutable, addressed by the SHA-256 of its manifest.

    manifest.json           this module's `Manifest`
    backbone.weights        the frozen weights, once, as ONNX external data of every graph
    backbone.onnx           pixels → last hidden state: the backbone's own ONNX, for any tool
    features.onnx           pixels → hidden state below each level's suffix, pooled feature
    lift-{j}.onnx           hidden state, LoRA of block j → hidden state above block j
    step-{k}.onnx           level k: hidden state, labels, weights, trainables → loss, gradient
    predict-{k}.onnx        level k: hidden state, trainables → class logits, class-token feature
    personal-{k}.onnx       level k: pixels, both experts, gate, temperature → class probabilities (a template)
    gate-step.onnx, gate-predict.onnx
    init.safetensors        the trainables every run starts from; a zero-shot head where there is a text tower
    tokenizer.json          of a text model: how texts become tokens, a file of Hugging Face's `tokenizers`
    ort-training-{k}.onnx, ort-training-{k}.checkpoint, ort-training-optimizer.onnx
                            level k's step for onnxruntime-training, where it was asked for

"pixels" stands for (B, S, S, 3) uint8; a text model's graphs take "tokens", (B, N) int64, in their place.

The files lie side by side because ONNX refuses external data outside a model's own folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.errors import BundleError
from fedfmsl.protocol.layout import Layout, Slot
from fedfmsl.protocol.messages import Count, Number, Positive

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
TOKENIZER = "tokenizer.json"
Precision = Literal["fp32", "int8"]  # of the frozen projections


FileName = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]{0,127}$")]  # of a file beside the manifest


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ImagePreprocessing(_Frozen):
    """Resize the shorter side to `size` (bicubic), crop the centre, scale to 0…1, normalise per channel."""

    kind: Literal["image"] = "image"
    size: Positive
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class TextPreprocessing(_Frozen):
    """Tokenize as the bundle's `tokenizer.json` says, cut off after `max_tokens`, fill up to it with `pad_id`."""

    kind: Literal["text"] = "text"
    max_tokens: Positive
    pad_id: Number


Preprocessing = Annotated[ImagePreprocessing | TextPreprocessing, Field(discriminator="kind")]


class Dims(_Frozen):
    """`tokens` N, `hidden` D, `feature` F (what head and gate read), `blocks` L, `classes` C."""

    tokens: Positive
    hidden: Positive
    feature: Positive
    blocks: Positive
    classes: Positive


class LoraSpec(_Frozen):
    rank: int = 4
    alpha: int = 8
    targets: tuple[str, ...]


class PeftSpec(_Frozen):
    """How the global expert becomes a PEFT adapter: `base` for `from_pretrained`, the backbone's key `prefix`, PEFT's
    name of its list of blocks, and the input widths of our head and of transformers' classifier (one that also reads
    mean-pooled patches gets zeros there).
    """

    base: str
    revision: str | None
    prefix: str
    layers_pattern: str
    head_width: int
    classifier_width: int


class FileEntry(_Frozen):
    size: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Frozen):
    schema_version: Literal[2] = 2
    model: str
    family: str
    precision: Precision
    preprocessing: Preprocessing
    dims: Dims
    lora: LoraSpec
    levels: int = Field(ge=1, le=1024)
    classes: tuple[str, ...]
    expert_layout: tuple[Slot, ...]
    gate_layout: tuple[Slot, ...]
    peft: PeftSpec
    backbone_parameters: int = Field(ge=1)
    tuned_parameters: int = Field(ge=0)
    files: dict[FileName, FileEntry]

    @property
    def tuned_share(self) -> float:
        """Trainables of the highest level as a share of the backbone's parameters."""
        return self.tuned_parameters / self.backbone_parameters


@dataclass(frozen=True)
class ZeroShot:
    """Each class's direction in the feature's space, `rows` (C, F) of length one, and the `scale` that the model gives
    the cosines of images with them."""

    rows: Vector
    scale: float


class Bundle:
    """A bundle on disk whose manifest has been read; `verify` checks every byte."""

    def __init__(self, root: Path) -> None:
        """Raises BundleError if there is no readable manifest of a known schema at `root`."""
        self.root = root
        path = root / MANIFEST
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_MANIFEST_BYTES + 1)
        except OSError as error:
            raise BundleError(
                f"no bundle at {root}: {path.name} is not readable; make one with python -m export.build"
            ) from error
        try:
            self.manifest = Manifest.model_validate_json(raw)
            self.expert = Layout(self.manifest.expert_layout)
            self.gate = Layout(self.manifest.gate_layout)
            if len(self.expert.parts) != self.manifest.levels + 1 or not self.gate.slots:
                raise ValueError("the layouts are not those of these levels")
        except (ValidationError, ValueError) as error:
            raise BundleError(
                f"{path} is not a bundle manifest of schema 2; build the bundle again with python -m export.build"
            ) from error
        self.sha256 = hashlib.sha256(raw).hexdigest()

    def verify(self) -> None:
        """Raises BundleError naming the first file that is missing or whose bytes have changed."""
        for name, entry in self.manifest.files.items():
            path = self.path(name)
            if not path.is_file():
                raise BundleError(f"bundle {self.root}: {name} is missing; copy or build the bundle again")
            if path.stat().st_size != entry.size or file_sha256(path) != entry.sha256:
                raise BundleError(f"bundle {self.root}: {name} has been altered (SHA-256); copy or build it again")

    def path(self, name: str) -> Path:
        """Raises BundleError if `name` leads out of the bundle."""
        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise BundleError(f"bundle {self.root}: the manifest names {name!r}, outside the bundle")
        return path

    def initial(self) -> tuple[Vector, Vector]:
        """The trainables every run starts from: expert at the highest level (P,), gate adapter (G,)."""
        tensors = self._init()
        return np.asarray(tensors["expert"], np.float32), np.asarray(tensors["gate"], np.float32)

    def zero_shot(self) -> ZeroShot | None:
        """The head made of class names alone, where the bundle has one."""
        tensors = self._init()
        if "zero_shot" not in tensors:
            return None
        return ZeroShot(np.asarray(tensors["zero_shot"], np.float32), float(tensors["zero_shot_scale"][0]))

    def _init(self) -> dict[str, Vector]:
        try:
            return load_file(self.path("init.safetensors"))
        except (OSError, SafetensorError) as error:
            raise BundleError(f"bundle {self.root}: init.safetensors is not readable; build it again") from error

    def tokenizer(self) -> str:
        """The JSON of a text model's tokenizer; empty for another model."""
        if TOKENIZER not in self.manifest.files:
            return ""
        try:
            return self.path(TOKENIZER).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"bundle {self.root}: {TOKENIZER} is not readable; build it again") from error

    @property
    def features_key(self) -> str:
        """Changes whenever the frozen features of a sample could: weights, graph, preprocessing."""
        files = self.manifest.files
        parts = (
            *(files[name].sha256 for name in ("backbone.weights", "features.onnx", TOKENIZER) if name in files),
            self.manifest.preprocessing.model_dump_json(),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
