"""A device returns by hand to the model that its predictions used before, without the server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from support.bundles import Built
from support.in_process_daemon import make_daemon
from support.personal_models import globals_of, keep, round_of
from typer.testing import CliRunner

from edge_runtime.__main__ import app
from edge_runtime.daemon.status import describe_model
from edge_runtime.inference.classifier import FileClassifier, StateClassifier
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.model import save_personal_model
from edge_runtime.training.stored_model import read_former_model, read_personal_model
from fedfmsl.errors import ConfigError, InputError
from fedfmsl.protocol.messages import Stage


@pytest.fixture
def device(vit: Built, photos: Path, tmp_path: Path) -> TrainingContext:
    return make_daemon(vit, photos, tmp_path).device


def save(vit: Built, device: TrainingContext, number: int, factor: float = 1.0) -> str:
    published = globals_of(vit)
    other = replace(published, expert=(factor * published.expert).astype(np.float32))
    return save_personal_model(device, round_of(Stage.GLOBAL).model_copy(update={"round": number}), other)


def command(store: DeviceStore, *options: str) -> Result:
    return CliRunner().invoke(app, ["rollback", "--state", str(store.root), *options])


def test_predictions_use_the_earlier_model_at_once_until_the_rollback_is_undone(
    vit: Built, device: TrainingContext, photos: Path
) -> None:
    store, photo = device.store, sorted(photos.rglob("*.jpg"))[0]
    save(vit, device, 1)
    save(vit, device, 2, factor=1.01)
    before = store.mixture.read_bytes()
    classifier = StateClassifier(store, vit.bundle.root)
    assert classifier.classify(photo).round == 2
    assert "predictions use the model of run r, round 1 now" in command(store).stdout
    assert classifier.classify(photo).round == 1
    assert "chosen by hand" in describe_model(store)
    assert "keep the model of run r, round 1: the device was returned to it by hand" in save(vit, device, 3)
    assert classifier.classify(photo).round == 1
    again = command(store).exception
    assert isinstance(again, InputError) and "returned to the model of round 1 already" in str(again)
    store.personalized.write_bytes(b"another model")
    failed = command(store, "--undo").exception  # the bundle is not the device's own
    assert isinstance(failed, ConfigError) and "personalized.onnx is still another one" in str(failed)
    assert classifier.classify(photo).round == 2
    store.bundles.mkdir()
    (store.bundles / vit.bundle.sha256).symlink_to(vit.bundle.root)
    for options, expected in (([], 1), (["--undo"], 2)):
        assert "wrote" in command(store, *options).stdout
        assert FileClassifier(store.personalized).classify(photo).round == expected
    assert store.mixture.read_bytes() == before
    assert not read_former_model(store).header.by_hand
    assert isinstance(command(store, "--undo").exception, InputError)
    assert save(vit, device, 3) == "" and classifier.classify(photo).round == 3


def test_the_earlier_model_is_the_last_other_one_that_predictions_used(vit: Built, device: TrainingContext) -> None:
    store = device.store
    assert isinstance(command(store).exception, InputError)  # there is no model at all
    assert not store.mixture_lock.exists()  # the daemon could not open one that root has made
    save(vit, device, 1)
    assert "no earlier personalized model" in str(command(store).exception)
    save(vit, device, 2)
    save(vit, device, 2)  # the round is computed again after a crash
    save(vit, device, 3, factor=-300.0)  # is not adopted
    rounds = [read(store).header.round for read in (read_former_model, read_personal_model)]
    assert rounds == [1, 2]


def test_a_damaged_model_is_replaced_by_the_earlier_one(vit: Built, device: TrainingContext) -> None:
    store = device.store
    save(vit, device, 1)
    save(vit, device, 2)
    store.mixture.write_bytes(b"torn")
    assert "of run r, round 1 now" in command(store).stdout
    store.former.unlink()
    assert "of run r, round 1 now" in command(store, "--undo").stdout
    assert read_personal_model(store).header.by_hand is False


def test_a_model_of_another_bundle_needs_that_bundle(vit: Built, device: TrainingContext) -> None:
    store = device.store
    save(vit, device, 1)
    save(vit, device, 2)
    former = read_former_model(store).changed(bundle="ab" * 32)
    current = store.mixture.read_bytes()
    keep(store, former)
    store.mixture.rename(store.former)
    store.mixture.write_bytes(current)
    assert "bundle of the earlier model is not at" in str(command(store).exception)
    assert store.mixture.read_bytes() == current


def test_a_state_directory_that_may_not_be_written_is_one_line(
    vit: Built, device: TrainingContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(vit, device, 1)
    save(vit, device, 2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge_runtime.training.stored_model.write_atomically", full)
    found = command(device.store).exception
    assert isinstance(found, ConfigError) and "cannot be written (No space left on device)" in str(found)
    assert read_personal_model(device.store).header.round == 2
