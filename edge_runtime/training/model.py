"""The personalized model, MoFM(global expert, own local expert, gate) with its calibration, as the device keeps it.

It is made anew after every round, so that there is something to use from the first one on. What is kept is small: its
tensors are the inputs of the bundle's template `personal-{level}.onnx`, which holds the frozen weights. Nothing of it
leaves the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from edge_runtime.data.samples import labels_of
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import Device
from edge_runtime.training.local_expert import LocalExpert, mixture
from edge_runtime.training.stages import Globals, class_mean_expert
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.algorithms.calibration import calibrate, fit_temperature, unknown_threshold
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import BundleError, ConfigError, InputError, MessageError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Level, Name, Number, Round, Session, Sha256
from fedfmsl.protocol.tensors import pack, unpack


class ModelHeader(BaseModel):
    """What a personalized model is made of, beside its tensors: the SHA-256 of the bundle, of the global expert and of
    the gate ("" where the server had none yet). Ends up in the ONNX file's metadata."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    run: Name
    session: Session
    round: Number
    device: Name
    level: Level
    bundle: Sha256
    expert: Sha256
    gate: Sha256
    temperature: float = Field(gt=0)
    threshold: float = Field(ge=0, le=1)  # of confidence, below which an image is unknown


@dataclass(frozen=True)
class PersonalModel:
    header: ModelHeader
    tensors: Mapping[str, Floats]

    @property
    def inputs(self) -> dict[str, Floats]:
        """Of the bundle's template, all but the samples."""
        return {**self.tensors, "temperature": np.array([self.header.temperature], np.float32)}

    def calibrated(self, log_p: Floats) -> Floats:
        """What it makes of its mixture's log-probabilities (n, C)."""
        return calibrate(log_p, self.header.temperature)


def personal_model(device: Device, task: Round, given: Globals) -> PersonalModel:
    """The device's model as of this round, with the newest globals it has been given.

    Before stage 2 the local expert is the global one with the device's own prior; before there is a global one, both
    are the device's own class means (ours). Costs a pass of both experts over the held-out states.
    """
    expert, gate = given.expert, given.gate
    if not expert.size:
        expert = class_mean_expert(device)[: device.bundle.expert.size(1)]
    if not gate.size:
        gate = device.bundle.initial()[1]
    known = Globals(expert, expert, gate)
    local = LocalExpert.load(device, task.session) or LocalExpert.from_global(device, expert, task.sal)
    level = max(device.level_of(expert), local.best_level)
    images = device.slices.held_out
    log_p = mixture(device, images, known, local.best, level).log_p
    temperature = fit_temperature(log_p, labels_of(images))
    size = device.bundle.expert.size(level)
    header = ModelHeader(
        run=task.run,
        session=task.session,
        round=task.round,
        device=device.name,
        level=level,
        bundle=device.bundle.sha256,
        expert=task.expert,
        gate=task.gate,
        temperature=temperature,
        threshold=unknown_threshold(np.exp(calibrate(log_p, temperature).max(axis=1))),
    )
    tensors = {
        "global_theta": device.completed(expert)[:size],
        "local_theta": local.best[:size],
        "gate_theta": gate,
        "global_bias": device.prior,
        "local_bias": device.mask,
    }
    return PersonalModel(header, tensors)


def keep_personal_model(device: Device, task: Round, given: Globals) -> None:
    """Raises OSError if there is no room for it."""
    model = personal_model(device, task, given)
    write_atomically(device.store.mixture, pack(model.header, model.tensors), durable=True)


def read_personal_model(store: DeviceStore) -> PersonalModel:
    """Raises InputError if this device has none yet, or none that can be read."""
    try:
        header, tensors = unpack(store.mixture.read_bytes(), ModelHeader)
    except PermissionError as error:
        raise ConfigError(
            f"{store.root} may not be read by this user; ask as its daemon's (sudo -u fedfmsl)"
        ) from error
    except OSError as error:
        raise InputError(
            f"{store.root} holds no personalized model yet; a device has one once its first round is done"
        ) from error
    except MessageError as error:
        raise InputError(f"{store.mixture} cannot be read ({error}); this device's next round makes it anew") from error
    return PersonalModel(header, {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()})


def bundle_of(store: DeviceStore, header: ModelHeader, path: Path | None = None) -> Bundle:
    """The bundle that a model is of: the one at `path`, by default the one that the device has fetched.

    Raises BundleError if it is another, or is not there.
    """
    root = path or store.bundles / header.bundle
    if not root.is_dir():
        raise BundleError(f"the bundle of the model in {store.root} is not at {root}; give its folder with --bundle")
    bundle = Bundle.load(root)
    if bundle.sha256 != header.bundle:
        raise BundleError(f"bundle {root} is not that of the model in {store.root}; give another --bundle")
    return bundle
