"""A device's newest model on a stream of files: real photos, real ONNX Runtime, models that change meanwhile."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from support.bundles import Built
from support.in_process_daemon import make_daemon
from support.personal_models import another_model, globals_of, keep, round_of
from support.samples import CLASSES, write_photos

from edge_runtime.daemon.lock import is_locked, locked
from edge_runtime.inference.classifier import FileClassifier, StateClassifier
from edge_runtime.inference.export_onnx import write_model
from edge_runtime.inference.predict import predict_files
from edge_runtime.inference.stream import PATIENCE_SECONDS, Inbox, wait_for_a_model, watched
from edge_runtime.store import DeviceStore
from edge_runtime.training.model import keep_personal_model, read_personal_model
from fedfmsl.algorithms.calibration import UNKNOWN
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import BundleError, ConfigError, InputError
from fedfmsl.protocol.messages import Prediction, Stage

OLD = time.time() - 3600


@pytest.fixture
def store(vit: Built, photos: Path, tmp_path: Path) -> DeviceStore:
    """Of a device that has done one round."""
    device = make_daemon(vit, photos, tmp_path / "state").device
    keep_personal_model(device, round_of(Stage.GLOBAL), globals_of(vit))
    return device.store


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Forty photos that lie there for an hour."""
    return settled(sorted(write_photos(tmp_path / "inbox", seed=7).rglob("*.jpg")))


def settled(paths: list[Path]) -> list[Path]:
    for path in paths:
        os.utime(path, (OLD, OLD))
    return paths


def taken(stream: Iterator[Prediction | None], count: int) -> list[Prediction]:
    """The next predictions, pauses left out."""
    return list(islice((prediction for prediction in stream if prediction is not None), count))


def until_pause(stream: Iterator[Prediction | None]) -> list[Prediction]:
    found = []
    while (prediction := next(stream)) is not None:
        found.append(prediction)
    return found


def test_the_state_and_the_file_give_the_same(
    vit: Built, store: DeviceStore, files: list[Path], tmp_path: Path
) -> None:
    write_model(store, tmp_path / "model.onnx", vit.bundle.root)
    by_file = list(predict_files(FileClassifier(tmp_path / "model.onnx"), files))
    by_state = list(predict_files(StateClassifier(store, vit.bundle.root), files))
    assert [p.model_dump(exclude={"time", "probabilities", "confidence"}) for p in by_file] == [
        p.model_dump(exclude={"time", "probabilities", "confidence"}) for p in by_state
    ]
    for one, other in zip(by_file, by_state, strict=True):
        assert tuple(one.probabilities) == CLASSES
        assert np.allclose(list(one.probabilities.values()), list(other.probabilities.values()), atol=1e-5)
        assert one.confidence == max(one.probabilities.values())
    assert (by_file[0].device, by_file[0].round) == ("d", 3)


def test_below_the_threshold_a_file_is_unknown(
    vit: Built, store: DeviceStore, files: list[Path], tmp_path: Path
) -> None:
    model = read_personal_model(store)
    keep(store, replace(model, header=model.header.model_copy(update={"threshold": 1.0})))
    write_model(store, tmp_path / "model.onnx", vit.bundle.root)
    for threshold, wanted in ((None, True), (1.0, True), (0.0, False)):
        for classifier in (
            StateClassifier(store, vit.bundle.root, threshold),
            FileClassifier(tmp_path / "model.onnx", threshold),
        ):
            assert (classifier.classify(files[0]).label == UNKNOWN) == wanted


def test_every_file_is_classified_once_in_the_order_they_came(
    vit: Built, store: DeviceStore, files: list[Path]
) -> None:
    for age, path in enumerate(reversed(files)):
        os.utime(path, (OLD - age, OLD - age))
    folder = files[0].parents[1]
    stream = watched(StateClassifier(store, vit.bundle.root), Inbox(folder), 0.0)
    assert [p.file for p in until_pause(stream)] == [str(path) for path in files]
    assert until_pause(stream) == []
    shutil.copy(files[0], folder / "late.jpg")
    assert [p.file for p in taken(stream, 1)] == [str(folder / "late.jpg")]
    files[3].unlink()
    shutil.copy(files[4], files[5])  # another photo under its name
    assert [p.file for p in taken(stream, 1)] == [str(files[5])]
    assert until_pause(stream) == []


def test_only_what_arrives_from_now_on(vit: Built, store: DeviceStore, files: list[Path]) -> None:
    folder = files[0].parents[1]
    stream = watched(StateClassifier(store, vit.bundle.root), Inbox(folder, only_new=True), 0.0)
    assert until_pause(stream) == []
    shutil.copy(files[0], folder / "late.jpg")
    assert [p.file for p in taken(stream, 1)] == [str(folder / "late.jpg")]


def test_a_photo_that_still_grows_is_waited_for(vit: Built, store: DeviceStore, tmp_path: Path) -> None:
    """However slowly it comes: what has come of it is never said to be unreadable, nor classified."""
    folder = tmp_path / "inbox"
    data = next(write_photos(tmp_path / "photos", per_class=1).rglob("*.jpg")).read_bytes()
    folder.mkdir()
    stream = watched(StateClassifier(store, vit.bundle.root), Inbox(folder), 0.0)
    body, end = data[:-40], data[-40:]
    with (folder / "slow.jpg").open("wb", buffering=0) as file:
        for start in range(0, len(body), 200):
            file.write(body[start : start + 200])
            for _ in range(3):  # it rests between two looks, too
                assert until_pause(stream) == []
        file.write(end)
    assert [p.file for p in taken(stream, 1)] == [str(folder / "slow.jpg")]


def test_a_corrupt_file_is_named_once_and_ends_nothing(
    vit: Built, store: DeviceStore, files: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    files[1].write_bytes(files[1].read_bytes()[:300])
    (files[0].parent / "notes.txt").write_text("no photo at all")
    (files[0].parent / ".hidden.jpg").write_text("what another program keeps here for itself")
    settled([files[1]])
    stream = watched(StateClassifier(store, vit.bundle.root), Inbox(files[0].parents[1]), 0.0)
    assert {p.file for p in until_pause(stream)} == {str(path) for path in files} - {str(files[1])}
    for _ in range(3):
        assert until_pause(stream) == []
    assert capfd.readouterr().err.splitlines() == [f"skipped: {files[1]} is not a readable image"]


def test_a_corrupt_file_is_named_once_it_has_rested(
    vit: Built, store: DeviceStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "inbox"
    folder.mkdir()
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    stream = watched(StateClassifier(store, vit.bundle.root), Inbox(folder), 0.0)
    for _ in range(5):
        assert until_pause(stream) == []
    assert capfd.readouterr().err == ""
    rested = time.time() - PATIENCE_SECONDS - 1
    os.utime(folder / "torn.jpg", (rested, rested))
    for _ in range(5):
        assert until_pause(stream) == []
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_folder_that_goes_and_comes_back_is_not_classified_anew(
    vit: Built, store: DeviceStore, files: list[Path]
) -> None:
    folder = files[0].parents[1]
    stream = watched(StateClassifier(store, vit.bundle.root), Inbox(folder), 0.0)
    assert len(until_pause(stream)) == len(files)
    folder.rename(folder.with_name("taken-out"))
    assert until_pause(stream) == []
    folder.with_name("taken-out").rename(folder)
    assert until_pause(stream) == []


def test_models_that_change_under_it_leave_no_gap(vit: Built, store: DeviceStore, files: list[Path]) -> None:
    """Another thread, as a daemon would, puts one model after the other in its place, of every level; each file gets
    exactly one result, of the model that was the newest when its turn came."""
    bundle, first = vit.bundle, read_personal_model(store)
    rounds = {round_: another_model(bundle, first, round_, level=1 + round_ % 3) for round_ in range(10, 40)}
    stop, begun = threading.Event(), threading.Event()

    def replace_again_and_again() -> None:
        while not stop.is_set():
            for model in rounds.values():
                keep(store, model)
                begun.set()

    classifier = StateClassifier(store, bundle.root)
    daemon = threading.Thread(target=replace_again_and_again)
    daemon.start()
    try:
        begun.wait()
        seen = [until_pause(watched(classifier, Inbox(files[0].parents[1]), 0.0)) for _ in range(5)]
    finally:
        stop.set()
        daemon.join()
    for predictions in seen:
        assert Counter(p.file for p in predictions) == Counter(map(str, files))
    used = {p.round for predictions in seen for p in predictions}
    assert {rounds[round_].header.level for round_ in used} == {1, 2, 3}
    # what each said is what its round's model says when nothing changes
    for prediction in seen[-1][:6]:
        keep(store, rounds[prediction.round])
        again = StateClassifier(store, bundle.root).classify(Path(prediction.file))
        assert again.model_dump(exclude={"time"}) == prediction.model_dump(exclude={"time"})


def test_a_model_that_cannot_be_used_leaves_the_older_one_in_its_place(
    vit: Built, store: DeviceStore, files: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    classifier, good = StateClassifier(store, vit.bundle.root), read_personal_model(store)
    write_atomically(store.mixture, b"torn")
    assert [classifier.classify(path).round for path in files[:3]] == [3, 3, 3]
    assert len(capfd.readouterr().err.splitlines()) == 1
    keep(store, another_model(vit.bundle, good, 4, level=1))
    assert classifier.classify(files[0]).round == 4
    store.mixture.unlink()
    assert classifier.classify(files[0]).round == 4


def test_the_bundle_is_the_one_that_the_device_has_fetched(vit: Built, dinov2: Built, store: DeviceStore) -> None:
    with pytest.raises(BundleError, match="give its folder with --bundle"):
        StateClassifier(store)
    with pytest.raises(BundleError, match="is not that of the model"):
        StateClassifier(store, dinov2.bundle.root)
    shutil.copytree(vit.bundle.root, store.bundles / vit.bundle.sha256)
    assert StateClassifier(store).classes == CLASSES


def test_it_waits_for_the_first_model(store: DeviceStore, capfd: pytest.CaptureFixture[str]) -> None:
    model = read_personal_model(store)
    store.mixture.unlink()
    waiting = threading.Thread(target=wait_for_a_model, args=(store, 0.01))
    waiting.start()
    said = ""
    while "no personalized model yet" not in said:
        said += capfd.readouterr().err
        assert waiting.is_alive()
    keep(store, model)
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"watched folder .* does not exist"):
        Inbox(tmp_path / "nowhere")


def test_one_process_at_a_time_holds_a_state_folder(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with locked(tmp_path, "do this"):
        assert is_locked(tmp_path)
        with pytest.raises(ConfigError, match="in use by another process; do this"), locked(tmp_path, "do this"):
            pass
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    with locked(tmp_path, "do this"):
        pass
