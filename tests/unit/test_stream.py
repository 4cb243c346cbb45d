"""Classifying a watched folder with a device's newest model: real photos, real ONNX Runtime, changing models."""

from __future__ import annotations

import errno
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
from support.opened_files import on_open
from support.personal_models import another_model, globals_of, keep, round_of
from support.samples import CLASSES, write_photos

from edge_runtime.daemon.lock import is_locked, locked
from edge_runtime.inference.adaptation import PriorAdapter
from edge_runtime.inference.classifier import FileClassifier, StateClassifier
from edge_runtime.inference.export_onnx import write_model
from edge_runtime.inference.predict import predict_files
from edge_runtime.inference.recorder import Recorder
from edge_runtime.inference.stream import UNREADABLE_SECONDS, WatchedFolder, classify_new_files, wait_for_model
from edge_runtime.labelling.queue import Queue, version_of
from edge_runtime.store import DeviceStore
from edge_runtime.training.model import save_personal_model
from edge_runtime.training.stored_model import read_personal_model
from fedfmsl.common.backoff import Backoff
from fedfmsl.common.files import write_atomically
from fedfmsl.common.folder_walk import FileVersion
from fedfmsl.errors import BundleError, ConfigError, InputError
from fedfmsl.protocol.class_names import UNKNOWN
from fedfmsl.protocol.messages import Prediction, Stage

OLD = time.time() - 3600


@pytest.fixture
def store(vit: Built, photos: Path, tmp_path: Path) -> DeviceStore:
    """The store of a device after its first round."""
    device = make_daemon(vit, photos, tmp_path / "state").device
    save_personal_model(device, round_of(Stage.GLOBAL), globals_of(vit))
    return device.store


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Forty photos, last modified an hour ago."""
    return aged(sorted(write_photos(tmp_path / "inbox", seed=7).rglob("*.jpg")))


def aged(paths: list[Path]) -> list[Path]:
    for path in paths:
        os.utime(path, (OLD, OLD))
    return paths


def first(stream: Iterator[Prediction | None], count: int) -> list[Prediction]:
    """The next `count` predictions."""
    return list(islice((prediction for prediction in stream if prediction is not None), count))


def one_scan(stream: Iterator[Prediction | None]) -> list[Prediction]:
    """The predictions of one scan."""
    return list(iter(lambda: next(stream), None))


def test_state_and_onnx_file_give_the_same_predictions(
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


def test_state_and_onnx_file_adapt_alike(vit: Built, store: DeviceStore, files: list[Path], tmp_path: Path) -> None:
    write_model(store, tmp_path / "model.onnx", vit.bundle.root)
    by_state = StateClassifier(store, vit.bundle.root, adapter=PriorAdapter())
    by_file = FileClassifier(tmp_path / "model.onnx", adapter=PriorAdapter())
    fixed = FileClassifier(tmp_path / "model.onnx")
    changed = 0.0
    for path in files:
        one, other, before = (
            np.array(list(each.classify(path).probabilities.values())) for each in (by_state, by_file, fixed)
        )
        assert np.allclose(one, other, atol=1e-4)
        changed = max(changed, float(np.abs(other - before).max()))
    assert changed > 1e-4


def test_below_the_threshold_a_file_is_unknown(
    vit: Built, store: DeviceStore, files: list[Path], tmp_path: Path
) -> None:
    model = read_personal_model(store)
    keep(store, replace(model, header=model.header.model_copy(update={"threshold": 1.0})))
    write_model(store, tmp_path / "model.onnx", vit.bundle.root)
    for threshold, expected in ((None, True), (1.0, True), (0.0, False)):
        for classifier in (
            StateClassifier(store, vit.bundle.root, threshold),
            FileClassifier(tmp_path / "model.onnx", threshold),
        ):
            assert (classifier.classify(files[0]).label == UNKNOWN) == expected


def test_every_file_is_classified_once_oldest_first(vit: Built, store: DeviceStore, files: list[Path]) -> None:
    for age, path in enumerate(reversed(files)):
        os.utime(path, (OLD - age, OLD - age))
    folder = files[0].parents[1]
    stream = classify_new_files(StateClassifier(store, vit.bundle.root), WatchedFolder(folder), 0.0)
    assert [p.file for p in one_scan(stream)] == [str(path) for path in files]
    assert one_scan(stream) == []
    shutil.copy(files[0], folder / "late.jpg")
    assert [p.file for p in first(stream, 1)] == [str(folder / "late.jpg")]
    files[3].unlink()
    shutil.copy(files[4], files[5])  # another photo under its name
    assert [p.file for p in first(stream, 1)] == [str(files[5])]
    assert one_scan(stream) == []


def test_waiting_files_follow_the_newest_model_and_lost_ones_are_forgotten(
    vit: Built, store: DeviceStore, files: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    classifier, questions = StateClassifier(store, vit.bundle.root), tmp_path / "questions.sqlite"
    questions.write_bytes(b"no database, but long enough to be read as one" * 40)
    recorder = Recorder(questions, classifier)
    recorder.record(files[0], FileVersion(1, 1), classifier.classify(files[0]))  # the queue is damaged
    recorder.improve()
    assert "questions.sqlite is damaged" in capfd.readouterr().err
    questions.unlink()
    queue = Queue(questions)
    for path in files[:3]:
        version = version_of(path)
        assert version is not None
        recorder.record(path, version, classifier.classify(path))
    files[0].unlink()
    files[1].write_bytes(b"no photo")
    keep(store, another_model(vit.bundle, read_personal_model(store), round_=1, level=1))  # of a new run
    for _ in range(2):  # nothing new arrives
        recorder.improve()
    assert [(file.path, file.round) for file in queue.recent(9)] == [(files[2], 1)]


def test_only_new_skips_existing_files(vit: Built, store: DeviceStore, files: list[Path]) -> None:
    folder = files[0].parents[1]
    stream = classify_new_files(StateClassifier(store, vit.bundle.root), WatchedFolder(folder, only_new=True), 0.0)
    assert one_scan(stream) == []
    shutil.copy(files[0], folder / "late.jpg")
    assert [p.file for p in first(stream, 1)] == [str(folder / "late.jpg")]


def test_a_growing_photo_is_classified_when_it_is_complete(vit: Built, store: DeviceStore, tmp_path: Path) -> None:
    """A partial photo is neither classified nor reported as unreadable, however slowly it grows."""
    folder = tmp_path / "inbox"
    data = next(write_photos(tmp_path / "photos", per_class=1).rglob("*.jpg")).read_bytes()
    folder.mkdir()
    stream = classify_new_files(StateClassifier(store, vit.bundle.root), WatchedFolder(folder), 0.0)
    body, end = data[:-40], data[-40:]
    with (folder / "slow.jpg").open("wb", buffering=0) as file:
        for start in range(0, len(body), 200):
            file.write(body[start : start + 200])
            for _ in range(3):  # unchanged for some scans
                assert one_scan(stream) == []
        file.write(end)
    assert [p.file for p in first(stream, 1)] == [str(folder / "slow.jpg")]


def test_a_corrupt_file_is_reported_once_and_skipped(
    vit: Built, store: DeviceStore, files: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    files[1].write_bytes(files[1].read_bytes()[:300])
    (files[0].parent / "notes.txt").write_text("not a photo")
    (files[0].parent / ".hidden.jpg").write_text("a temporary file of another program")
    aged([files[1]])
    stream = classify_new_files(StateClassifier(store, vit.bundle.root), WatchedFolder(files[0].parents[1]), 0.0)
    assert {p.file for p in one_scan(stream)} == {str(path) for path in files} - {str(files[1])}
    for _ in range(3):
        assert one_scan(stream) == []
    hidden, note, corrupt = capfd.readouterr().err.splitlines()
    assert hidden == f"skipped: {files[0].parent / '.hidden.jpg'}: hidden"
    assert note == f"skipped: {files[0].parent / 'notes.txt'}: .txt is not a suffix of images"
    assert corrupt.startswith(f"skipped: {files[1]} is not a readable image: ")


def test_a_corrupt_file_is_reported_when_it_is_old_enough(
    vit: Built, store: DeviceStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "inbox"
    folder.mkdir()
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    stream = classify_new_files(StateClassifier(store, vit.bundle.root), WatchedFolder(folder), 0.0)
    for _ in range(5):
        assert one_scan(stream) == []
    assert capfd.readouterr().err == ""
    old = time.time() - UNREADABLE_SECONDS - 1
    os.utime(folder / "torn.jpg", (old, old))
    for _ in range(5):
        assert one_scan(stream) == []
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_file_that_may_be_read_later_is_tried_again(
    vit: Built, store: DeviceStore, files: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    allowed = False

    def refuse(path: Path) -> None:
        if path == files[1] and not allowed:
            raise PermissionError(errno.EACCES, "Permission denied")

    folder = WatchedFolder(files[0].parents[1], retry=Backoff(first=0.0, longest=0.0))
    stream = classify_new_files(StateClassifier(store, vit.bundle.root), folder, 0.0)
    with on_open(refuse):  # tests may run as root, who may read every file
        assert len(one_scan(stream)) == len(files) - 1
        assert one_scan(stream) == one_scan(stream) == []
        allowed = True
        assert [p.file for p in one_scan(stream)] == [str(files[1])]
    assert capfd.readouterr().err.splitlines() == [
        f"{files[1]} is not a readable image: it cannot be opened (Permission denied); trying again later"
    ]


def test_a_path_that_is_no_file_is_named_and_the_others_are_classified(
    vit: Built, store: DeviceStore, files: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty").mkdir()
    paths = [files[0], tmp_path / "pipe.jpg", tmp_path / "empty", tmp_path / ("x" * 300), tmp_path / "gone", files[1]]
    found = []
    with pytest.raises(InputError, match="4 of 6 files could not be classified; see the lines above"):
        for prediction in predict_files(StateClassifier(store, vit.bundle.root), paths):
            found.append(prediction.file)
    assert found == [str(files[0]), str(files[1])]
    for path in paths[1], paths[4]:
        with pytest.raises(InputError, match=f"^image {path} "):
            list(predict_files(StateClassifier(store, vit.bundle.root), [path]))
    assert capfd.readouterr().err.splitlines() == [
        f"image {paths[1]} is neither a file nor a folder; check the path",
        f"no images in {paths[2]}: no file name has one of their suffixes",
        f"image {paths[3]} cannot be read (File name too long); check the path",
        f"image {paths[4]} does not exist; check the path",
    ]


def test_a_model_that_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"model {tmp_path} is a folder; a device writes personalized.onnx"):
        FileClassifier(tmp_path)


def test_a_folder_that_is_unmounted_and_mounted_again_is_named_and_not_classified_again(
    vit: Built, store: DeviceStore, files: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = files[0].parents[1]
    stream = classify_new_files(StateClassifier(store, vit.bundle.root), WatchedFolder(folder), 0.0)
    assert len(one_scan(stream)) == len(files)
    folder.rename(folder.with_name("unmounted"))
    for _ in range(3):
        assert one_scan(stream) == []
    folder.with_name("unmounted").rename(folder)
    for _ in range(3):
        assert one_scan(stream) == []
    assert capfd.readouterr().err.splitlines() == [
        f"watched folder {folder} cannot be read (No such file or directory); waiting for it",
        f"watched folder {folder} can be read again",
    ]


def test_model_changes_during_a_scan_lose_no_file(vit: Built, store: DeviceStore, files: list[Path]) -> None:
    """A thread replaces the model all the time, as a daemon does, with models of every level. Each file gets exactly
    one prediction, of the newest model at that time."""
    bundle, first = vit.bundle, read_personal_model(store)
    rounds = {round_: another_model(bundle, first, round_, level=1 + round_ % 3) for round_ in range(10, 40)}
    stop, replaced = threading.Event(), threading.Event()

    def replace_repeatedly() -> None:
        while not stop.is_set():
            for model in rounds.values():
                keep(store, model)
                replaced.set()

    classifier = StateClassifier(store, bundle.root)
    daemon = threading.Thread(target=replace_repeatedly)
    daemon.start()
    try:
        replaced.wait()
        seen = [one_scan(classify_new_files(classifier, WatchedFolder(files[0].parents[1]), 0.0)) for _ in range(5)]
    finally:
        stop.set()
        daemon.join()
    for predictions in seen:
        assert Counter(p.file for p in predictions) == Counter(map(str, files))
    used = {p.round for predictions in seen for p in predictions}
    assert {rounds[round_].header.level for round_ in used} == {1, 2, 3}
    # each prediction equals that of its round's model when nothing changes
    for prediction in seen[-1][:6]:
        keep(store, rounds[prediction.round])
        again = StateClassifier(store, bundle.root).classify(Path(prediction.file))
        assert again.model_dump(exclude={"time"}) == prediction.model_dump(exclude={"time"})


def test_an_unusable_newer_model_is_reported_and_the_current_one_stays_in_use(
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


def test_the_default_bundle_is_the_downloaded_one(vit: Built, dinov2: Built, store: DeviceStore) -> None:
    with pytest.raises(BundleError, match=r"started with --bundle; pass that folder with --bundle"):
        StateClassifier(store)
    with pytest.raises(BundleError, match="is not the bundle of the model"):
        StateClassifier(store, dinov2.bundle.root)
    shutil.copytree(vit.bundle.root, store.bundles / vit.bundle.sha256)
    assert StateClassifier(store).classes == CLASSES
    assert StateClassifier(store, dinov2.bundle.root).classes == CLASSES  # as a daemon that has another one now


def test_a_file_that_is_no_onnx_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(BundleError, match=r"photo\.jpg is not a personalized model; pass the personalized\.onnx"):
        FileClassifier(tmp_path / "photo.jpg")


def test_waiting_for_the_first_model_is_reported(store: DeviceStore, capfd: pytest.CaptureFixture[str]) -> None:
    model = read_personal_model(store)
    store.mixture.unlink()
    waiting = threading.Thread(target=wait_for_model, args=(store, 0.01))
    waiting.start()
    output = ""
    while "no personalized model yet" not in output:
        output += capfd.readouterr().err
        assert waiting.is_alive()
    keep(store, model)
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"watched folder .* does not exist"):
        WatchedFolder(tmp_path / "nowhere")


def test_one_process_at_a_time_locks_a_state_directory(tmp_path: Path) -> None:
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
