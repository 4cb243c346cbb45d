"""Which files are asked about, and where the answers go, with real files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.web import ask, csrf_of

from edge_runtime.data.inputs import IMAGES
from edge_runtime.data.labels import read_labels, walk_labelled
from edge_runtime.data.proposals import proposed_classes
from edge_runtime.labelling import answers as answers_module
from edge_runtime.labelling.answers import Answers, Kind
from edge_runtime.labelling.asking import Asking
from edge_runtime.labelling.destination import Destination
from edge_runtime.labelling.order import GROUP, margins, near_duplicates, questions
from edge_runtime.labelling.queue import Queue, version_of
from edge_runtime.page import service
from edge_runtime.page.views import routes
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.common.class_folders import walk_classes
from fedfmsl.common.settings import read_settings
from fedfmsl.errors import ConfigError, InputError
from fedfmsl.protocol.messages import Prediction
from fedfmsl.transport.listening import listen
from fedfmsl.web.access import Access
from fedfmsl.web.application import application
from fedfmsl.web.serve import WebServer

CLASSES = ("apple", "pear", "it's <b>a</b> plum")
LONG = "ü" * 120 + ".jpg"  # 244 bytes


def scenes(count: int, each: int, seed: int = 0) -> np.ndarray:
    """Features (count · each, 64): `each` photos of every scene, one scene after the other."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(count, 1, 64))
    return (centres + 0.02 * random.normal(size=(count, each, 64))).reshape(-1, 64).astype(np.float16)


def test_the_margin_is_between_the_two_best_classes() -> None:
    assert margins(np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]], np.float32)).tolist() == pytest.approx([0.2, 1.0])


def test_the_least_certain_come_first_and_a_scene_fills_one_question() -> None:
    features = scenes(20, 30)
    margin = np.linspace(0, 1, len(features)).astype(np.float32)  # the first scene is the least certain one
    asked = questions(margin, features, 5)
    assert asked[0].first == 0 and len(asked[0].members) == GROUP
    assert all(len({member // 30 for member in question.members}) == 1 for question in asked)
    assert len({question.first // 30 for question in asked}) == 5


def test_files_that_differ_are_asked_about_one_by_one() -> None:
    features = np.eye(6, dtype=np.float16)
    groups = near_duplicates(np.arange(6)[::-1], features, limit=4)
    assert [group.members for group in groups] == [(5,), (4,), (3,), (2,)]
    assert questions(np.empty(0, np.float32), np.empty((0, 6), np.float16), 3) == []


class Desk:
    """A device's sample folder, its watched folder, and everything that answers use."""

    def __init__(self, root: Path, labels: str | None = None, watched: str = "inbox") -> None:
        self.root = root
        self.images, self.inbox = root / "images", root / watched
        for name in ("apple", "pear"):
            (self.images / name).mkdir(parents=True)
        self.inbox.mkdir(exist_ok=True)
        self.labels = root / "labels.csv" if labels is not None else None
        if self.labels is not None and labels is not None:
            self.labels.write_bytes(labels.encode())
        self.queue = Queue(root / "questions.sqlite")
        self.queue.describe(CLASSES, "image")
        self.destination = Destination(self.images, self.labels, self.queue)
        self.open()

    def open(self) -> None:
        self.answers = Answers(self.queue, self.destination, self.root / "trash")

    def photo(self, name: str | bytes, margin: float = 0.5, feature: int = 0) -> int:
        """A photo in the watched folder, classified."""
        path = self.inbox / os.fsdecode(name)
        path.write_bytes(os.fsencode(name))
        version = version_of(path)
        assert version is not None
        share = {"apple": (1 + margin) / 2, "pear": (1 - margin) / 2, CLASSES[2]: 0.0}
        said = Prediction(device="d", file="f", time=1, label="apple", confidence=0.5, probabilities=share, round=1)
        self.queue.put(path, version, said, np.eye(16, dtype=np.float32)[feature])
        return self.queue.recent(1)[0].id

    def files(self) -> dict[str, bytes]:
        """Every file below images and the watched folder, by its path, and its bytes."""
        found = [path for folder in (self.images, self.inbox) for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in found}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


HOSTILE = (b"<script>alert(1)<.jpg", b"\xff\xfe not utf-8.jpg", LONG.encode(), "אבג ‮gpj.jpg".encode(), b"a\nb.jpg")


@pytest.mark.parametrize("name", HOSTILE, ids=("script", "not-utf8", "long", "right-to-left", "line-break"))
@pytest.mark.parametrize("labels", [None, "class,file,note\r\npear,old.jpg,x"], ids=("folders", "csv"))
def test_a_label_goes_where_the_daemon_reads_it_and_undo_takes_it_back(
    tmp_path: Path, name: bytes, labels: str | None
) -> None:
    desk = Desk(tmp_path, labels)
    number, before = desk.photo(name), desk.files()
    desk.answers.answer([number], Kind.LABEL, "pear")
    if desk.labels is None:
        found = walk_classes(desk.images, IMAGES.suffixes, "image", CLASSES)
    else:
        found = walk_labelled(desk.images, IMAGES, desk.labels, CLASSES)
        assert desk.labels.read_bytes().startswith(f"{labels}\r\n".encode())
    (file,) = found.files
    assert (file.label, file.path.read_bytes()) == ("pear", name)
    assert not list(desk.inbox.iterdir())
    assert desk.answers.where(desk.queue.get([number])[0]) == file.path
    assert desk.answers.undo().label == "pear"
    assert desk.files() == before
    if desk.labels is not None:
        assert labels is not None and desk.labels.read_bytes() == f"{labels}\r\n".encode()
    assert [asked.files[0].id for asked in Asking(desk.queue, desk.destination).next(5)] == [number]


def test_a_photo_in_the_sample_folder_gets_only_a_line(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "file,class\npear/one.jpg,pear\n", watched="images")
    (desk.images / "pear" / "one.jpg").write_bytes(b"1")
    asking = Asking(desk.queue, desk.destination)
    number, again = desk.photo("two.jpg"), desk.photo("pear/one.jpg", margin=0.1)
    assert [asked.files[0].id for asked in asking.next(5)] == [number]  # the other one has a class
    desk.answers.answer([number], Kind.LABEL, CLASSES[2])
    assert desk.labels is not None
    assert {"two.jpg", "pear/one.jpg"} == {*read_labels(desk.labels)[0]} and again != number
    assert (desk.images / "two.jpg").is_file()


def test_near_duplicates_get_one_answer_and_one_undo(desk: Desk) -> None:
    same = [desk.photo(f"{index}.jpg", margin=0.1 * index) for index in range(3)]
    other = desk.photo("other.jpg", margin=0.9, feature=1)
    asking = Asking(desk.queue, desk.destination)
    assert [[file.id for file in asked.files] for asked in asking.next(5)] == [same, [other]]
    assert desk.answers.answer(same, Kind.LABEL, "apple").files == 3
    assert sorted(path.name for path in (desk.images / "apple").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]
    assert [[file.id for file in asked.files] for asked in asking.next(5)] == [[other]]
    assert desk.answers.undo().files == 3
    asking.again()
    assert [asked.files[0].id for asked in asking.next(5)] == [same[0], other]


def test_a_name_that_is_taken_is_not_overwritten(desk: Desk) -> None:
    (desk.images / "apple" / "x.jpg").write_bytes(b"older")
    desk.answers.answer([desk.photo("x.jpg")], Kind.LABEL, "apple")
    assert sorted(path.read_bytes() for path in (desk.images / "apple").iterdir()) == [b"older", b"x.jpg"]
    (desk.inbox / "x.jpg").write_bytes(b"newer")  # a camera that uses a name again
    desk.answers.undo()
    assert sorted(path.read_bytes() for path in desk.inbox.iterdir()) == [b"newer", b"x.jpg"]


def test_a_file_that_is_not_in_the_list_stays_and_is_not_asked_about_again(desk: Desk) -> None:
    number, before = desk.photo("cat.jpg"), desk.files()
    desk.answers.answer([number], Kind.UNLISTED)
    assert desk.files() == before and not Asking(desk.queue, desk.destination).next(5)
    desk.answers.undo()
    assert Asking(desk.queue, desk.destination).next(5)


def test_the_trash_is_bounded_and_undo_restores(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "TRASH_FILES", 2)
    for index in range(4):
        desk.answers.answer([desk.photo(f"{index}.jpg")], Kind.DELETE)
    assert len(list((desk.root / "trash").iterdir())) == 2 and not list(desk.inbox.iterdir())
    desk.answers.undo()
    desk.answers.undo()
    assert sorted(path.name for path in desk.inbox.iterdir()) == ["2.jpg", "3.jpg"]
    with pytest.raises(InputError, match="gone"):
        desk.answers.undo()


def test_only_the_last_answers_can_be_undone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "UNDOABLE", 2)
    for index in range(4):
        desk.answers.answer([desk.photo(f"{index}.jpg")], Kind.LABEL, "apple")
    desk.answers.undo()
    desk.answers.undo()
    with pytest.raises(InputError, match="no answer"):
        desk.answers.undo()


@pytest.mark.parametrize("labels", [None, "file,class\n"], ids=("folders", "csv"))
@pytest.mark.parametrize("stop_at", range(3))
def test_an_answer_that_a_crash_interrupts_is_completed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str | None, stop_at: int
) -> None:
    """The process ends before the first move, between two, or before the answer is marked as done."""
    desk = Desk(tmp_path, labels)
    numbers = [desk.photo(f"{index}.jpg") for index in range(2)]

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    calls = iter(range(10))

    def stop_in(real: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: crash() if next(calls) >= stop_at else real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "_move", stop_in(answers_module._move))
        patch.setattr(answers_module.Answers, "_set_state", crash)
        patch.setattr(answers_module.Answers, "_take_back", crash)
        with pytest.raises(KeyboardInterrupt):
            desk.answers.answer(numbers, Kind.LABEL, "pear")
    desk.open()
    assert not list(desk.inbox.iterdir())
    listing = (
        walk_labelled(desk.images, IMAGES, desk.labels, CLASSES)
        if desk.labels
        else walk_classes(desk.images, IMAGES.suffixes, "image", CLASSES)
    )
    assert sorted(file.path.read_bytes() for file in listing.files) == [b"0.jpg", b"1.jpg"]
    desk.answers.undo()
    assert sorted(path.name for path in desk.inbox.iterdir()) == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize("labels", [None, "file,class\n"], ids=("folders", "csv"))
def test_a_file_that_is_gone_when_its_answer_is_completed_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str | None
) -> None:
    desk = Desk(tmp_path, labels)
    number = desk.photo("x.jpg")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "_move", crash)
        patch.setattr(answers_module.Answers, "_take_back", crash)
        with pytest.raises(KeyboardInterrupt):
            desk.answers.answer([number], Kind.LABEL, "pear")
    (desk.inbox / "x.jpg").unlink()
    desk.open()
    assert desk.files() == {}
    assert desk.labels is None or desk.labels.read_text() == labels


def test_an_answer_that_fails_changes_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [desk.photo(f"{index}.jpg") for index in range(2)]
    before, real = desk.files(), answers_module._move

    def full(source: Path, target: Path, *more: object) -> None:
        if source.name == "1.jpg" and source.parent == desk.inbox:
            raise OSError(28, "No space left on device")
        real(source, target, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(answers_module, "_move", full)
    with pytest.raises(InputError, match="No space left"):
        desk.answers.answer(numbers, Kind.LABEL, "apple")
    assert desk.files() == before and not [*(desk.images / "apple").iterdir()]
    assert desk.answers.undoable() is None


def test_an_answer_that_cannot_be_taken_back_either_says_so(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    number = desk.photo("x.jpg")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "_move", fail)
        patch.setattr(answers_module, "_move_back", fail)
        with pytest.raises(InputError, match="not be moved back either, which the next start tries again"):
            desk.answers.answer([number], Kind.LABEL, "apple")
    desk.open()
    assert desk.files() == {"inbox/x.jpg": b"x.jpg"}


def test_an_answer_on_a_disk_with_coarse_times_can_be_undone(desk: Desk) -> None:
    number = desk.photo("x.jpg")
    desk.answers.answer([number], Kind.LABEL, "pear")
    (moved,) = (desk.images / "pear").iterdir()
    os.utime(moved, ns=(0, moved.stat().st_mtime_ns // 2_000_000_000 * 2_000_000_000))  # as FAT stores it
    assert desk.answers.undo().files == 1
    assert desk.files() == {"inbox/x.jpg": b"x.jpg"}


def test_questions_about_a_disk_that_is_away_come_back_with_it(desk: Desk) -> None:
    asking = Asking(desk.queue, desk.destination)
    number = desk.photo("x.jpg")
    away = desk.inbox.rename(desk.root / "away")
    asking.again()
    assert asking.next(1) == []
    away.rename(desk.inbox)
    asking.again()
    assert [file.id for asked in asking.next(1) for file in asked.files] == [number]


def test_an_answer_about_a_changed_file_or_another_class_is_refused(desk: Desk) -> None:
    number = desk.photo("x.jpg")
    with pytest.raises(InputError, match="not a class"):
        desk.answers.answer([number], Kind.LABEL, "../../etc")
    (desk.inbox / "x.jpg").write_bytes(b"another photo")
    with pytest.raises(InputError, match="reload"):
        desk.answers.answer([number], Kind.LABEL, "apple")
    assert not Asking(desk.queue, desk.destination).next(5)  # until it is classified again
    assert desk.photo("x.jpg") != number


@pytest.mark.parametrize("labels", [None, "file,class\n"], ids=("folders", "csv"))
def test_a_new_class_is_one_that_the_device_proposes(tmp_path: Path, labels: str | None) -> None:
    desk = Desk(tmp_path, labels)
    for number, name in enumerate(("x.jpg", "y.jpg")):
        desk.answers.answer([desk.photo(name)], Kind.LABEL, "fig", is_new=number == 0)
        assert desk.destination.new_classes == ("fig",)  # and an answer of the list from now on
    for name, fault in (
        ("Apple", "did you mean 'apple'"),
        ("Fig", "did you mean 'fig'"),
        ("a\nb", "control"),
        ("dev", "split"),
        ("", "no letters"),
    ):
        with pytest.raises(InputError, match=fault):
            desk.answers.answer([desk.photo("z.jpg")], Kind.LABEL, name, is_new=True)
    if desk.labels is None:
        with pytest.raises(InputError, match="no folder can have the name"):
            desk.answers.answer([desk.photo("z.jpg")], Kind.LABEL, "a/b", is_new=True)
        found = walk_classes(desk.images, IMAGES.suffixes, "image", CLASSES)
    else:
        found = walk_labelled(desk.images, IMAGES, desk.labels, CLASSES)
    assert proposed_classes(found.unknown, CLASSES) == {"fig": 2}
    assert desk.answers.undo().label == "fig"


def test_a_labels_file_keeps_its_mode_and_stays_a_link(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "file,class\n")
    assert desk.labels is not None
    list_ = desk.labels.rename(tmp_path / "list.csv")
    list_.chmod(0o640)
    desk.labels.symlink_to(list_)
    desk.answers.answer([desk.photo("x.jpg")], Kind.LABEL, "pear")
    assert desk.labels.is_symlink() and list_.read_text() == 'file,class\n"x.jpg","pear"\n'
    assert list_.stat().st_mode & 0o777 == 0o640


def test_the_page_takes_classes_by_name_and_names_the_fault_of_a_labels_file(tmp_path: Path) -> None:
    desk = Desk(tmp_path, "file,class\n")
    number, labels = desk.photo("x.jpg"), desk.labels
    assert labels is not None
    listeners = listen("--page", "127.0.0.1", 0)
    access = Access("127.0.0.1", listeners[0].getsockname()[1], None, encrypted=False)
    views = routes(service.open_desk(DeviceStore(tmp_path), desk.images, labels, watched=True))
    with WebServer(application("d", views, access, Path(service.__file__).parent / "templates"), listeners) as site:
        status, text, _ = ask(site, "/ask")
        desk.queue.describe(("pear", "apple"), "image")  # of a new run
        form = {"csrf": csrf_of(text), f"file-{number}": "on", "class": "pear"}
        assert ask(site, f"/file/{10**30}/small.jpg")[0] == 404
        assert ask(site, "/ask", {"csrf": csrf_of(text), f"file-{10**30}": "on", "class": "pear"})[0] == 409
        new = {"csrf": csrf_of(text), f"file-{number}": "on", "answer": "new", "new": " Apple"}
        status_of_new, said, _ = ask(site, "/ask", new)
        assert status_of_new == 409 and "did you mean &#39;apple&#39;?" in said
        assert ask(site, "/ask", {**new, "new": " Fi\u0301g "})[0] == 303 and read_labels(labels)[0]["x.jpg"] == {
            "Fíg": 2
        }
        assert ask(site, "/undo", {"csrf": csrf_of(text)})[0] == 303
        assert status == 200 and ask(site, "/ask", form)[0] == 303
        assert read_labels(labels)[0] == {"x.jpg": {"pear": 2}}
        labels.rename(tmp_path / "gone")
        assert ask(site, "/undo", {"csrf": csrf_of(text)})[0] == 303 and (desk.inbox / "x.jpg").is_file()
        status, text, _ = ask(site, "/ask")
        assert status == 500 and f"labels {labels}: it does not exist" in text


def test_labels_go_into_the_training_folder_of_a_split(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for name in ("train", "test"):
        (desk.images / name / "pear").mkdir(parents=True)
    for name in ("apple", "pear"):
        (desk.images / name).rmdir()
    desk.answers.answer([desk.photo("x.jpg")], Kind.LABEL, "apple")
    assert (desk.images / "train" / "apple" / "x.jpg").is_file()


def test_a_page_whose_questions_cannot_be_stored_says_so(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    store.questions.mkdir()
    flags = {"run": "orchard", "images": tmp_path, "state": tmp_path, "page": "127.0.0.1:9"}
    with pytest.raises(ConfigError, match=f"{store.questions} cannot be written or read .*; run the command as"):
        service.serve(read_settings(Settings, flags=flags))
