"""The global expert as a PEFT adapter folder, which `PeftModel.from_pretrained` loads. Written without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from protocol.bundle import Bundle
from protocol.layout import Vector
from protocol.peft_names import to_peft
from shell.files import write_atomically


def write_adapter(bundle: Bundle, expert: Vector, level: int, folder: Path) -> None:
    """`expert` (P,) holds the trainables of `level`."""
    manifest = bundle.manifest
    blocks = manifest.dims.blocks
    config = {
        "peft_type": "LORA",
        "task_type": None,
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
    tensors = to_peft(manifest.peft, bundle.expert.split(expert))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=1).encode())
    write_atomically(folder / "adapter_model.safetensors", save(contiguous, {"format": "pt"}))
    labels = {str(index): name for index, name in enumerate(manifest.classes)}
    write_atomically(folder / "labels.json", json.dumps(labels, indent=1).encode())
