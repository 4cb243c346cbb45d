"""Reads the adapter in a PEFT folder, as `trainer_server.storage.peft_adapter` or PEFT itself writes it. Nothing is
unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.errors import ConfigError, MessageError, no_permission
from fedfmsl.protocol.class_names import check_names
from fedfmsl.protocol.layout import expert_layout
from fedfmsl.protocol.messages import first_error
from fedfmsl.protocol.peft_names import from_peft
from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.storage.peft_adapter import ADAPTER_CONFIG, ADAPTER_TENSORS, BACKBONE, LABELS, backbone_of

MAX_BYTES = 2**30
RANDOM = "random"  # base of a bundle without weights of its own, which says nothing of them


@dataclass(frozen=True)
class Adapter:
    """A global expert: a head of `classes`, then the LoRA of `level` blocks, flat in `expert`."""

    classes: tuple[str, ...]
    expert: Vector
    level: int


class _Config(BaseModel):
    """The part of adapter_config.json that decides whether an adapter fits."""

    model_config = ConfigDict(extra="ignore")

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int
    lora_alpha: float
    target_modules: set[str]
    layers_to_transform: list[int] = Field(default=[])
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, Any] = {}
    alpha_pattern: dict[str, Any] = {}


def read_adapter(folder: Path, bundle: TaskBundle) -> Adapter:
    """The adapter in `folder`, for the backbone of `bundle`.

    Raises ConfigError if a file is missing or damaged, if the adapter is of another backbone, or if it is not LoRA as
    the bundle has it.
    """
    where = f"--from {folder}"
    try:
        config = _Config.model_validate_json((folder / ADAPTER_CONFIG).read_bytes())
        labels = json.loads((folder / LABELS).read_bytes())
        metadata, tensors = _tensors(folder / ADAPTER_TENSORS)
    except PermissionError as error:
        raise ConfigError(no_permission(Path(error.filename))) from error
    except OSError as error:
        raise ConfigError(
            f"{where} has no readable {Path(error.filename).name} ({error.strerror}); an adapter needs "
            f"{ADAPTER_CONFIG}, {ADAPTER_TENSORS} and {LABELS}"
        ) from error
    except ValidationError as error:
        raise ConfigError(f"{where}: {ADAPTER_CONFIG} is not that of LoRA: {first_error(error)}") from None
    except (TypeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{where} is damaged ({error}); copy the adapter again") from error
    _check_backbone(where, config, metadata, bundle)
    level = _level(where, config, bundle)
    classes = _classes(where, labels)
    named = from_peft(bundle.manifest.peft, {name: np.asarray(value, np.float32) for name, value in tensors.items()})
    _check_width(where, tensors, bundle)
    layout = expert_layout(len(classes), bundle.manifest.dims.feature, bundle.lora)
    try:
        expert = layout.join(named)
        if expert.size != layout.size(level):
            raise MessageError(f"it has {expert.size} values, not the {layout.size(level)} of level {level}")
    except MessageError as error:
        raise ConfigError(f"{where} does not fit the bundle at {bundle.root}: {error}") from error
    return Adapter(classes, expert, level)


def _tensors(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and tensors of a safetensors file. Raises OSError, SafetensorError or ValueError."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_BYTES} bytes")
    with safe_open(path, "numpy") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def _check_backbone(where: str, config: _Config, metadata: dict[str, str], bundle: TaskBundle) -> None:
    """The weights decide if both are known, else the name and revision of the base."""
    ours, peft = backbone_of(bundle), bundle.manifest.peft
    same_base = (config.base_model_name_or_path, config.revision) == (peft.base, peft.revision) and peft.base != RANDOM
    if metadata.get(BACKBONE) != ours and not same_base:
        theirs, revision = config.base_model_name_or_path, config.revision
        raise ConfigError(
            f"{where} is for another backbone ({theirs}{f' at {revision}' if revision else ''}) than the bundle at "
            f"{bundle.root} ({peft.base}{f' at {peft.revision}' if peft.revision else ''}); pass a bundle of its base"
        )


def _level(where: str, config: _Config, bundle: TaskBundle) -> int:
    """The number of blocks nearest the head that have LoRA."""
    manifest, level = bundle.manifest, len(config.layers_to_transform)
    lora, blocks = manifest.lora, manifest.dims.blocks
    wanted: dict[str, tuple[Any, Any]] = {
        "peft_type": (config.peft_type, "LORA"),
        "r": (config.r, lora.rank),
        "lora_alpha": (config.lora_alpha, lora.alpha),
        "target_modules": (sorted(config.target_modules), sorted(lora.targets)),
        "layers_to_transform": (sorted(config.layers_to_transform), list(range(blocks - level, blocks))),
        "modules_to_save": (config.modules_to_save, ["classifier"]),
        "use_dora": (config.use_dora, False),
        "use_rslora": (config.use_rslora, False),
        "rank_pattern": (config.rank_pattern, {}),
        "alpha_pattern": (config.alpha_pattern, {}),
    }
    for name, (found, expected) in wanted.items():
        if found != expected:
            raise ConfigError(f"{where} has {name} = {found}, and the bundle at {bundle.root} needs {expected}")
    if not 1 <= level <= manifest.levels:
        raise ConfigError(
            f"{where} has LoRA in {level} blocks, and the bundle at {bundle.root} has levels 1 to {manifest.levels}; "
            "export more levels"
        )
    return level


def _classes(where: str, labels: Any) -> tuple[str, ...]:
    """The names in labels.json, a table of them by the number of the output."""
    if not isinstance(labels, dict) or set(labels) != {str(index) for index in range(len(labels))}:
        raise ConfigError(f'{where}: {LABELS} must have names by number, like {{"0": "apple", "1": "kiwi"}}')
    return check_names([str(labels[str(index)]) for index in range(len(labels))], f"{where}: {LABELS}")


def _check_width(where: str, tensors: dict[str, Any], bundle: TaskBundle) -> None:
    """The columns of a wider classifier, which also reads mean-pooled patches, must be zeros."""
    spec = bundle.manifest.peft
    for name, tensor in tensors.items():
        if name.endswith("classifier.weight") and tensor.ndim == 2 and np.any(tensor[:, spec.head_width :]):
            raise ConfigError(
                f"{where} has a head that reads {tensor.shape[1]} features, and only the first {spec.head_width} are "
                "in the bundle's graphs; train the adapter without the others"
            )
