"""Returns a device by hand to the model that its predictions used before (ours).

It needs neither the server nor a run. The daemon adopts no other model until the rollback is undone. Both models change
places. The chosen one is written first: a power failure in between loses the other one at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edge_runtime.store import DeviceStore
from edge_runtime.training.personal_model import ModelHeader, PersonalModel
from edge_runtime.training.stored_model import (
    model_chosen_by_hand,
    read_former_model,
    stored_model,
    write_model_file,
)
from fedfmsl.common.lock_file import held
from fedfmsl.errors import BundleError, ConfigError, InputError


def roll_back(store: DeviceStore) -> ModelHeader:
    """Uses the earlier model for predictions, also if the present one is damaged. Returns its header.

    Raises InputError if there is none, or a rollback has taken place already, BundleError if its bundle is gone,
    ConfigError if the files may not be read or written.
    """
    with _writing(store):
        if (chosen := model_chosen_by_hand(store)) is not None:
            raise InputError(
                f"this device was returned to the model of round {chosen.header.round} already; python -m edge_runtime "
                "rollback --undo uses the newer one again"
            )
        former, used = read_former_model(store), stored_model(store)
        bundle = store.bundles / former.header.bundle
        if used is not None and used.header.bundle != former.header.bundle and not bundle.is_dir():
            raise BundleError(f"the bundle of the earlier model is not at {bundle}, so it cannot be used")
        if store.tasks.task(former.header.task) is None:
            raise BundleError(f"the task of the earlier model in {store.root} is missing, so it cannot be used")
        return _exchange(store, former.changed(by_hand=True), used)


def undo(store: DeviceStore) -> ModelHeader:
    """Uses the model from before the rollback again, and adopts new ones. Returns its header.

    Raises InputError if no rollback has taken place, ConfigError if the files may not be read or written.
    """
    with _writing(store):
        used = model_chosen_by_hand(store)
        if used is None:
            raise InputError("there is nothing to undo: this device uses the newest model that it has adopted")
        used = used.changed(by_hand=False)
        try:
            return _exchange(store, read_former_model(store), used)
        except InputError:
            return _exchange(store, used, None)


@contextmanager
def _writing(store: DeviceStore) -> Iterator[None]:
    if not store.root.is_dir():
        raise ConfigError(f"--state {store.root} does not exist; give the state directory of a device")
    if not store.mixture_lock.is_file():  # it is the daemon's, which could not open one of another user
        read_former_model(store)  # raises InputError
    try:
        with held(store.mixture_lock, wait=True):
            yield
    except OSError as error:
        about = f"{store.root} cannot be written ({error.strerror}); run the command as the daemon's user"
        raise ConfigError(about) from error


def _exchange(store: DeviceStore, chosen: PersonalModel, other: PersonalModel | None) -> ModelHeader:
    write_model_file(store.mixture, chosen)
    if other is not None:
        write_model_file(store.former, other)
    return chosen.header
