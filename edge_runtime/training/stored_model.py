"""The personalized model in the state directory: read, and compared with what was exported. Needs no ONNX Runtime."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from edge_runtime.store import DeviceStore
from edge_runtime.training.personal_model import ModelHeader, PersonalModel
from fedfmsl.common.files import write_atomically
from fedfmsl.common.lock_file import held
from fedfmsl.errors import BundleError, FedFMSLError, InputError, MessageError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack, unpack


def read_personal_model(store: DeviceStore) -> PersonalModel:
    """Raises InputError if there is no personalized model or it is damaged, ConfigError if it may not be read."""
    return _read(store, store.mixture, f"{store.root} has no personalized model yet; the first round creates it")


def read_former_model(store: DeviceStore) -> PersonalModel:
    """The model that predictions used before. Raises errors as `read_personal_model` does."""
    return _read(store, store.former, f"{store.root} has no earlier personalized model; the second round keeps one")


def _read(store: DeviceStore, path: Path, missing: str) -> PersonalModel:
    try:
        header, tensors = unpack(path.read_bytes(), ModelHeader)
    except PermissionError as error:
        raise store.permission_error() from error
    except OSError as error:
        raise InputError(missing) from error
    except MessageError as error:
        raise InputError(f"{path} is damaged ({error}); the device's next round replaces it") from error
    return PersonalModel(header, {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()})


def tasks_of_models(store: DeviceStore) -> list[str]:
    """The SHA-256 of the tasks of the personalized model and of the earlier one, as far as they can be read."""
    found = []
    for read in (read_personal_model, read_former_model):
        with contextlib.suppress(FedFMSLError):
            found.append(read(store).header.task)
    return found


def stored_model(store: DeviceStore) -> PersonalModel | None:
    """The personalized model; None if there is none or it is damaged. Raises ConfigError if it may not be read."""
    with contextlib.suppress(InputError):
        return read_personal_model(store)
    return None


def model_chosen_by_hand(store: DeviceStore) -> PersonalModel | None:
    """The personalized model if the device was returned to it (`edge_runtime.training.rollback`)."""
    model = stored_model(store)
    return model if model and model.header.by_hand else None


def write_personal_model(store: DeviceStore, model: PersonalModel, former: PersonalModel | None = None) -> None:
    """Replaces the personalized model, unless it was chosen by hand meanwhile. `former`: the one that it replaces, for
    a rollback. Raises OSError."""
    with held(store.mixture_lock, wait=True):
        if model_chosen_by_hand(store) is not None:
            return
        if former is not None:
            write_model_file(store.former, former)
        write_model_file(store.mixture, model)


def write_model_file(path: Path, model: PersonalModel) -> None:
    """Raises OSError."""
    write_atomically(path, pack(model.header, model.tensors), durable=True)


class Served(BaseModel):
    """Accuracy on the device's test samples of the model that predictions use, named by its session and round."""

    session: str
    round: int
    samples: int
    accuracy: float


def served_accuracy(store: DeviceStore) -> Served | None:
    """None if the model that predictions use now was not measured."""
    try:
        header = read_personal_model(store).header
        served = Served.model_validate(json.loads(store.results.read_text("utf-8"))["served"])
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return None
    return served if (served.session, served.round) == (header.session, header.round) else None


def mark_exported(store: DeviceStore, header: ModelHeader) -> None:
    """Records that personalized.onnx is the model with this header."""
    write_atomically(store.exported, _version(header).encode())


def is_exported(store: DeviceStore) -> bool:
    """Whether personalized.onnx is the personalized model, if there is one. Compares sessions and rounds: the times of
    files are wrong after the clock was set."""
    try:
        header = read_personal_model(store).header
    except InputError:
        return True
    written = store.exported.read_bytes() if store.exported.is_file() and store.personalized.is_file() else b""
    return written == _version(header).encode()


def _version(header: ModelHeader) -> str:
    return f"{header.session} {header.round}\n"


def open_model_bundle(store: DeviceStore, header: ModelHeader, path: Path | None = None) -> TaskBundle:
    """The bundle and the task that a model belongs to. `path`: the bundle's folder, if the device did not download it.
    A model that was not replaced yet may be of an earlier bundle than a daemon's present one.

    Raises BundleError if the bundle does not exist or is another one, or if the task is missing.
    """
    downloaded = store.bundles / header.bundle
    root = path if path and not downloaded.is_dir() else downloaded
    if not root.is_dir():
        own = "" if path else "the device did not download it, so it was started with --bundle; "
        alone = f"; {store.personalized} needs no bundle (predict --model)" if store.personalized.is_file() else ""
        raise BundleError(
            f"the bundle of the model in {store.root} is not at {root}; {own}pass that folder with --bundle{alone}"
        )
    bundle = Bundle.load(root)
    if bundle.sha256 != header.bundle:
        raise BundleError(f"bundle {root} is not the bundle of the model in {store.root}; pass another --bundle")
    task = store.tasks.task(header.task)
    if task is None:
        raise BundleError(
            f"the task of the model in {store.root} is missing; the device's next round replaces the model"
        )
    return TaskBundle(bundle, task)
