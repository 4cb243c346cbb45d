"""The files of the global expert as a PEFT adapter for `PeftModel.from_pretrained`, made without torch.

The base model needs a linear `classifier` with one output for each of the C names in `labels.json`:

    vit, dinov2    AutoModelForImageClassification.from_pretrained(BASE, num_labels=C, ignore_mismatched_sizes=True)
    deit           DeiTForImageClassification, with the same arguments
    clip           export.families.clip.CLIPVisionClassifier, with the same arguments; without this package,
                   CLIPVisionModelWithProjection and `classifier = torch.nn.Linear(F, C)`, applied to `image_embeds`
    bert           AutoModelForSequenceClassification, with the same arguments

BASE is the name in adapter_config.json: of a model on the hub, at the revision given there, or of a local folder.
ignore_mismatched_sizes is for a base with a head of other classes. AutoPeftModel finds the class of a base on the hub:

    AutoPeftModel.from_pretrained(FOLDER, num_labels=C, ignore_mismatched_sizes=True)

`preprocessor_config.json` is the preprocessing of the devices, for AutoImageProcessor.
"""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.bundle import ImagePreprocessing
from fedfmsl.protocol.image_processor import PREPROCESSOR, image_processor
from fedfmsl.protocol.peft_names import to_peft
from fedfmsl.protocol.task_bundle import TaskBundle

ADAPTER_CONFIG, ADAPTER_TENSORS, LABELS = "adapter_config.json", "adapter_model.safetensors", "labels.json"
BACKBONE = "backbone"  # metadata of the tensors: the SHA-256 of the frozen weights


def adapter_files(bundle: TaskBundle, expert: Vector, level: int) -> dict[str, bytes]:
    """Content by name. `expert` (P,) or (P_level,): of it, the trainable parameters of `level` are used."""
    manifest = bundle.manifest
    blocks = manifest.dims.blocks
    library, _, base_class = (manifest.peft.base_class or "").rpartition(".")
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": base_class, "parent_library": library} if base_class else None,
        "base_model_name_or_path": manifest.peft.base,
        "revision": manifest.peft.revision,
        "r": manifest.lora.rank,
        "lora_alpha": manifest.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(manifest.lora.targets),
        "layers_to_transform": list(range(blocks - level, blocks)),
        "layers_pattern": manifest.peft.layers_pattern,
        "modules_to_save": ["classifier"],
        "inference_mode": True,
    }
    tensors = to_peft(manifest.peft, bundle.expert.split(expert[: bundle.expert.size(level)]))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    files: dict[str, object] = {
        ADAPTER_CONFIG: config,
        LABELS: {str(index): name for index, name in enumerate(bundle.classes)},
    }
    if isinstance(manifest.preprocessing, ImagePreprocessing):
        files[PREPROCESSOR] = image_processor(manifest.preprocessing)
    texts = {name: json.dumps(value, indent=1).encode() for name, value in files.items()}
    blob = _with_ordered_header(save(contiguous, {"format": "pt", BACKBONE: backbone_of(bundle)}))
    return {**texts, ADAPTER_TENSORS: blob}


def _with_ordered_header(blob: bytes) -> bytes:
    """The safetensors file with the keys of its header in order: safetensors writes those of the metadata in another
    order in each process, and the same expert has to give the same bytes."""
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.dumps(json.loads(blob[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + blob[end:]


def backbone_of(bundle: TaskBundle) -> str:
    """The SHA-256 of the bundle's frozen weights; of a layout without weights, as load tests use it, the bundle's."""
    weights = bundle.manifest.files.get("backbone.weights")
    return weights.sha256 if weights else bundle.sha256
