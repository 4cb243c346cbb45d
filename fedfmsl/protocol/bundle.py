"""The bundle: a frozen backbone, exported once, immutable, named by the SHA-256 of its manifest.

    manifest.json           this module's `Manifest`
    backbone.weights        the frozen weights, once, as ONNX external data of every graph
    backbone.onnx           pixels → last hidden state: the backbone's own ONNX, for any tool
    features.onnx           pixels → hidden state below each level's suffix, pooled feature
    lift-{j}.onnx           hidden state, LoRA of block j → hidden state above block j
    step-{k}.onnx           level k: hidden state, labels, weights, trainables → loss, gradient
    predict-{k}.onnx        level k: hidden state, trainables → class logits, class-token feature
    personal-{k}.onnx       level k: pixels, both experts, gate, temperature → class probabilities (a template)
    gate-step.onnx, gate-predict.onnx
    fp16-features.onnx, fp16-lift-{j}.onnx, fp16-step-{k}.onnx, fp16-predict-{k}.onnx
                            the same graphs with products in float16, for GPUs (optional)
    init.safetensors        the LoRA and the gate adapter that every run starts from
    tokenizer.json          of a text model: the tokenizer, in the format of Hugging Face's `tokenizers`
    ort-training-{k}.onnx, ort-training-{k}.checkpoint, ort-training-optimizer.onnx
                            level k: the step for onnxruntime-training (optional)

"pixels" is (B, S, S, 3) uint8. The graphs of a text model take "tokens" instead, (B, N) int64.

The number of classes C is not a bundle's: a run's task names them (`fedfmsl.protocol.task`).
All files are in one folder because ONNX refuses external data outside the folder of the model.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.numpy import load

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.errors import BundleError, no_permission
from fedfmsl.protocol.layout import Layout, Slot
from fedfmsl.protocol.messages import Count, Number, Positive
from fedfmsl.protocol.setting_types import Precision

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
TOKENIZER = "tokenizer.json"
FP16 = "fp16-"  # begins the names of the graphs with products in float16
RGB = tuple[float, float, float]
Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
FILTERS: tuple[Filter, ...] = get_args(Filter)  # by Pillow's number
FileName = Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]{0,127}$")]  # of a file beside the manifest


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Resize(_Frozen):
    """How transformers' image processors resize with Pillow: the shorter side to `edge` pixels, or both sides to `edge`
    pixels without `keep_ratio`. The longer side is cut to whole pixels."""

    edge: Positive
    keep_ratio: bool
    filter: Filter


class ImagePreprocessing(_Frozen):
    """Resize, crop the centre of `size` pixels per side, scale to 0…1, normalize per channel.

    `resize`: None for weights without an image processor. The shorter side is then resized to `size` (bicubic), and the
    longer one is rounded to whole pixels (ours).
    """

    kind: Literal["image"] = "image"
    size: Positive
    mean: RGB
    std: RGB
    resize: Resize | None = None

    @property
    def edge(self) -> int:
        """Pixels of the shorter side before the crop."""
        return self.resize.edge if self.resize else self.size


class TextPreprocessing(_Frozen):
    """Tokenize with the bundle's `tokenizer.json`, truncate to `max_tokens`, pad with `pad_id`."""

    kind: Literal["text"] = "text"
    max_tokens: Positive
    pad_id: Number


Preprocessing = Annotated[ImagePreprocessing | TextPreprocessing, Field(discriminator="kind")]


class Dims(_Frozen):
    """`tokens` N, `hidden` D, `feature` F (input of head and gate), `blocks` L."""

    tokens: Positive
    hidden: Positive
    feature: Positive
    blocks: Positive


class LoraSpec(_Frozen):
    rank: int = 4
    alpha: int = 8
    targets: tuple[str, ...]


class PeftSpec(_Frozen):
    """How to write the global expert as a PEFT adapter: `base`, a name on the hub or of a folder, the key `prefix` of
    the backbone, PEFT's name for its list of blocks, and the input widths of our head and of the classifier in
    transformers. A wider classifier, which also reads mean-pooled patches, gets zeros there.
    """

    base: str
    revision: str | None
    prefix: str
    layers_pattern: str
    head_width: int
    classifier_width: int
    base_class: str | None = None  # module and name of the base model's class


class FileEntry(_Frozen):
    size: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Frozen):
    """`lora_layout`: the LoRA of the highest level. The head comes before it, as a task has it."""

    schema_version: Literal[4] = 4
    model: str
    family: str
    precision: Precision
    preprocessing: Preprocessing
    dims: Dims
    lora: LoraSpec
    levels: int = Field(ge=1, le=1024)
    lora_layout: tuple[Slot, ...]
    gate_layout: tuple[Slot, ...]
    peft: PeftSpec
    backbone_parameters: int = Field(ge=1)
    files: dict[FileName, FileEntry]


class Bundle:
    """A bundle on disk. `lora` and `gate` are the layouts of their trainables; `sha256` is the manifest's."""

    def __init__(self, root: Path, manifest: Manifest, sha256: str) -> None:
        """Raises ValueError if the layouts do not fit the levels."""
        self.root = root
        self.manifest = manifest
        self.sha256 = sha256
        self.lora = Layout(manifest.lora_layout)
        self.gate = Layout(manifest.gate_layout)
        if len(self.lora.parts) != manifest.levels or not self.gate.slots:
            raise ValueError("the layouts do not fit the levels")

    @classmethod
    def load(cls, root: str | Path) -> Bundle:
        """Reads the manifest. `verify` also checks the files.

        Raises BundleError if there is no readable manifest of schema 4 in the folder.
        """
        root = Path(root)
        path = root / MANIFEST
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_MANIFEST_BYTES + 1)
        except PermissionError as error:
            raise BundleError(no_permission(path)) from error
        except OSError as error:
            raise BundleError(
                f"no bundle at {root}: {path.name} is not readable; make one with python -m export.build"
            ) from error
        try:
            return cls(root, Manifest.model_validate_json(raw), hashlib.sha256(raw).hexdigest())
        except ValueError as error:  # pydantic's ValidationError is one
            raise BundleError(
                f"{path} is not a bundle manifest of schema 4; export the bundle again with python -m export.build"
            ) from error

    def verify(self) -> None:
        """Checks sizes and checksums. Raises BundleError with the first file that is missing, altered or unreadable."""
        for name, entry in self.manifest.files.items():
            path = self.path(name)
            if not path.is_file():
                raise BundleError(f"bundle {self.root}: {name} is missing; copy or build the bundle again")
            try:
                altered = path.stat().st_size != entry.size or file_sha256(path) != entry.sha256
            except PermissionError as error:
                raise BundleError(no_permission(path)) from error
            if altered:
                raise BundleError(f"bundle {self.root}: {name} has been altered (SHA-256); copy or build it again")

    def path(self, name: str) -> Path:
        """The path of a file of the bundle. Raises BundleError if it is outside the folder."""
        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise BundleError(f"bundle {self.root}: the manifest names {name!r}, outside the bundle; build it again")
        return path

    def initial_lora_and_gate(self) -> tuple[Vector, Vector]:
        """The trainables that every run starts from: LoRA at the highest level, gate adapter (G,)."""
        path = self.path("init.safetensors")
        try:
            tensors = load(path.read_bytes())
        except PermissionError as error:
            raise BundleError(no_permission(path)) from error
        except (OSError, SafetensorError) as error:
            raise BundleError(f"bundle {self.root}: init.safetensors is not readable; build it again") from error
        return np.asarray(tensors["lora"], np.float32), np.asarray(tensors["gate"], np.float32)

    def tokenizer(self) -> str:
        """The JSON of a text model's tokenizer; empty for an image model."""
        if TOKENIZER not in self.manifest.files:
            return ""
        try:
            return self.path(TOKENIZER).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"bundle {self.root}: {TOKENIZER} is not readable; build it again") from error

    @property
    def has_fp16(self) -> bool:
        """Whether it has graphs with products in float16."""
        return f"{FP16}features.onnx" in self.manifest.files

    @cached_property
    def features_key(self) -> str:
        """Key of cached features. Changes if weights, features graph or preprocessing change."""
        files = self.manifest.files
        names = "backbone.weights", "features.onnx", f"{FP16}features.onnx", TOKENIZER
        parts = (
            *(files[name].sha256 for name in names if name in files),
            self.manifest.preprocessing.model_dump_json(),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
