"""Folders of classes: the export, the trial and the daemon find the same classes and files."""

from __future__ import annotations

import errno
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.samples import CLASSES, write_photos

from devices.trial.dataset import find_files
from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import IMAGES
from export.class_options import class_names
from fedfmsl.common.class_folders import folder_classes, walk_classes
from fedfmsl.common.folder_walk import SkippedFile, count_files, summarize
from fedfmsl.errors import ConfigError, InputError


def walk(folder: Path) -> list[tuple[str, str, bool]]:
    listing = walk_classes(folder, IMAGES.suffixes, IMAGES.noun)
    return [(file.name, file.label, file.is_test) for file in listing.files]


def classes_in(folder: Path) -> list[str]:
    return folder_classes(folder, "class", [])


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_files_come_in_the_order_of_names_at_every_depth(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.jpg", "b/10.png", "b/deep/1.JPEG", "a/z.bmp", "a.b/c.webp", "b/d.jpg")
    assert [name for name, _, _ in walk(tmp_path)] == [
        *("a/z.bmp", "a.b/c.webp", "b/10.png", "b/2.jpg", "b/d.jpg", "b/deep/1.JPEG")
    ]
    assert classes_in(tmp_path) == ["a", "a.b", "b"]


def test_class_folders_are_utf8_in_every_locale(tmp_path: Path) -> None:
    touch(tmp_path, "A\u0308pfel/1.jpg", "plum/2.jpg")
    code = (
        "import sys; from pathlib import Path; from fedfmsl.common.class_folders import walk_classes; "
        "listing = walk_classes(Path(sys.argv[1]), ['.jpg'], 'image', ['plum', '\\xc4pfel']); "
        "print(ascii([file.label for file in listing.files]))"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    printed = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, text=True, check=True).stdout
    assert printed == "['\\xc4pfel', 'plum']\n"


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("train", "test"), ("Train", "Test"), ("TRAIN", "val"), ("training", "validation"), ("train", "valid")),
        *(("training_set", "test_set"), ("train", "eval"), ("train", None)),
    ],
)
def test_the_usual_names_of_splits_are_no_classes(tmp_path: Path, train: str, test: str | None) -> None:
    touch(tmp_path, f"{train}/kiwi/1.jpg", f"{train}/plum/2.jpg", *([f"{test}/kiwi/3.jpg"] if test else []))
    assert walk(tmp_path) == [
        (f"{train}/kiwi/1.jpg", "kiwi", False),
        (f"{train}/plum/2.jpg", "plum", False),
        *([(f"{test}/kiwi/3.jpg", "kiwi", True)] if test else []),
    ]
    assert classes_in(tmp_path) == ["kiwi", "plum"]


def test_of_two_other_splits_the_test_split_is_used_and_the_validation_split_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "train/kiwi/1.jpg", "valid/kiwi/2.jpg", "valid/kiwi/3.jpg", "test/kiwi/4.jpg", "more/kiwi/5.jpg")
    listing = walk_classes(tmp_path, IMAGES.suffixes, IMAGES.noun)
    assert [file.name for file in listing.files] == ["train/kiwi/1.jpg", "test/kiwi/4.jpg"]
    assert summarize(listing.skipped, tmp_path) == [
        "2 files: validation split beside a test split; move its files to the training folder to use them (valid)",
        f"{tmp_path / 'more'}: beside the training folder; move it there if it is a class",
    ]


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.jpg", "bus/2.jpg", "test/3.jpg")
    assert classes_in(tmp_path) == ["bus", "test", "train"]
    shutil.rmtree(tmp_path / "test")
    assert classes_in(tmp_path) == ["bus", "train"]


@pytest.mark.parametrize(
    ("names", "classes", "found"),
    [
        (("train/old/1.jpg", "bus/2.jpg"), ["bus", "train"], {"bus", "train"}),
        (("train/old/1.jpg", "bus/2.jpg"), ["bus", "car"], {"bus"}),
        (("train/old/1.jpg",), ["bus", "train"], {"train"}),
        (("train/bus/1.jpg", "test/bus/2.jpg", "train/train/3.jpg"), ["bus", "train"], {"bus", "train"}),
        (("train/bus/1.jpg", "masks/2.jpg"), ["bus", "car"], {"bus"}),
        (("train/bus/1.jpg", "masks/2.jpg", "test/bus/3.jpg"), None, {"bus"}),
    ],
)
def test_the_names_of_the_classes_or_a_test_folder_decide_what_train_is(
    tmp_path: Path, names: tuple[str, ...], classes: list[str] | None, found: set[str]
) -> None:
    touch(tmp_path, *names)
    listing = walk_classes(tmp_path, IMAGES.suffixes, IMAGES.noun, classes)
    assert {file.label for file in listing.files} == found
    assert len(listing.files) + count_files(listing.skipped) == len(names)


@pytest.mark.parametrize(
    ("names", "classes", "beside"),
    [
        (("train/kiwi/1.jpg", "masks/2.jpg"), None, "masks/"),
        (("train/kiwi/1.jpg", *(f"{each}/2.jpg" for each in "abcde")), None, "a/ and b/ and c/ and 2 more"),
        (("train/kiwi/1.jpg", "plum/2.jpg"), CLASSES, "plum/"),
    ],
)
def test_a_training_folder_that_may_be_a_class_is_refused(
    tmp_path: Path, names: tuple[str, ...], classes: tuple[str, ...] | None, beside: str
) -> None:
    touch(tmp_path, *names)
    message = f"has train/ with folders in it beside {beside}, so .*; pass {tmp_path}/train, or rename it"
    with pytest.raises(InputError, match=message):
        walk_classes(tmp_path, IMAGES.suffixes, IMAGES.noun, classes)


def test_empty_class_folders_are_counted_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "kiwi/1.jpg", "plum/notes.txt")
    for name in ("apple", "lemon", "other"):
        (tmp_path / name).mkdir()
    of_a_device, of_a_trial = (
        summarize(walk_classes(tmp_path, IMAGES.suffixes, IMAGES.noun, classes).skipped, tmp_path)
        for classes in (CLASSES, None)
    )
    assert of_a_device[0] == "3 folders: class folder without a file that can be used (apple, lemon, plum)"
    assert of_a_trial[0] == "4 folders: class folder without a file that can be used (apple, lemon, other, …)"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("test", "val"), r"has test/ and no training folder; add .*/train, or pass a folder with one subfolder per"),
        (("train", "Train", "test"), r"has Train/ and train/, which mean the same; keep one of them"),
    ],
)
def test_unclear_splits_are_refused_with_what_to_pass(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    touch(tmp_path, *(f"{name}/kiwi/1.jpg" for name in names))
    for read in (walk, classes_in):
        with pytest.raises(InputError, match=message):
            read(tmp_path)


def test_skipped_files_have_a_reason_and_are_counted_by_it(tmp_path: Path) -> None:
    touch(tmp_path, "kiwi/1.jpg", "kiwi/movie.mp4", "Plum /2.jpg", "notes/a.txt", "lost.jpg", "README.md")
    touch(tmp_path, *(f"lime/{index}.jpg" for index in range(5)), *(f"kiwi/{index}.mov" for index in range(4)), "x")
    listing = walk_classes(tmp_path, IMAGES.suffixes, IMAGES.noun, CLASSES)
    remedy = "add it to the run, rename or remove the folder"
    other = f"class not in the task, whose classes are apple, kiwi, lemon, plum; {remedy}"
    assert sorted(summarize(listing.skipped, tmp_path)) == sorted(
        [
            f"6 files: {other} (Plum  (did you mean 'plum'?), lime)",
            "4 files: .mov is not a suffix of images (kiwi/0.mov, kiwi/1.mov, kiwi/2.mov, …)",
            f"{tmp_path}/kiwi/movie.mp4: .mp4 is not a suffix of images",
            f"{tmp_path}/notes/a.txt: .txt is not a suffix of images",
            f"{tmp_path}/README.md: .md is not a suffix of images",
            f"{tmp_path}/x: name without a suffix",
            f"{tmp_path}/lost.jpg: not in a class folder",
        ]
    )
    assert count_files(listing.skipped) == 15


LEFTOVERS = (
    *("kiwi/._1.jpg", "kiwi/.hidden/4.jpg", ".trash/2.jpg", ".ipynb_checkpoints/1.jpg", "kiwi/Thumbs.db"),
    *("kiwi/DESKTOP.INI", "@eaDir/3.jpg", "kiwi/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/kiwi/._1.jpg"),
    *("#recycle/1.jpg", "kiwi/thumbnails/1.jpg", "kiwi/deep/Thumbs/1.jpg", "thumbs/1.jpg", "kiwi/.thumbnails/1.jpg"),
)


def test_leftovers_are_used_nowhere_and_counted_everywhere(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 3)
    plain = photos / "kiwi" / "00.jpg"
    for name in LEFTOVERS:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plain, photos / name)
    assert [label for _, label, _ in walk(photos)] == [name for name in CLASSES for _ in range(3)]
    assert class_names(None, photos, None) == CLASSES
    for skipped in (
        walk_classes(photos, IMAGES.suffixes, "image", CLASSES).skipped,
        scan_once(photos, CLASSES, IMAGES).skipped,
    ):
        assert len(skipped) == len(LEFTOVERS)
        assert count_files(skipped) == 0
        assert [line.split(":")[0] for line in summarize(skipped, photos)] == [
            f"{n} files or folders" for n in (6, 5, 3)
        ]
    flat: list[SkippedFile] = []
    assert len(IMAGES.files(photos, flat)) == 3 * len(CLASSES)
    assert len(flat) == len(LEFTOVERS)


def test_links_and_folders_that_cannot_be_read_are_named_and_never_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = write_photos(tmp_path / "elsewhere", 2, ["plum"])
    photos = touch(tmp_path / "photos", "kiwi/1.jpg", "kiwi/2.jpg", "kiwi/a/gone/1.jpg", "kiwi/a/locked/1.jpg")
    for name, target in {
        "plum": elsewhere / "plum",  # a class may lie on another disk
        **{"all": photos, "up": tmp_path, "same": photos / "kiwi", "kiwi/back": photos, "kiwi/out": elsewhere},
        **{"circle.jpg": photos / "circle.jpg", "kiwi/nowhere.jpg": photos / "nowhere"},
        "kiwi/linked.jpg": photos / "kiwi" / "1.jpg",
    }.items():
        (photos / name).symlink_to(target)
    os.mkfifo(photos / "kiwi" / "pipe.jpg")
    scandir = os.scandir

    def failing(path: Path) -> Iterator[os.DirEntry[str]]:
        if path == photos / "kiwi/a/locked":
            raise PermissionError(errno.EACCES, "Permission denied")
        if path == photos / "kiwi/a/gone":
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    listing = walk_classes(photos, IMAGES.suffixes, IMAGES.noun)
    assert [file.name for file in listing.files] == [
        *("kiwi/1.jpg", "kiwi/2.jpg", "kiwi/linked.jpg", "plum/00.jpg", "plum/01.jpg")
    ]
    assert {each.path.relative_to(photos).as_posix(): each.reason for each in listing.skipped} == {
        **dict.fromkeys(("all", "up", "same"), "link into the same folder"),
        **dict.fromkeys(("kiwi/back", "kiwi/out"), "link to a folder, which is not followed"),
        "kiwi/a/locked": "cannot be read (Permission denied)",
        "kiwi/a/gone": "removed while the folder was read",
        "kiwi/pipe.jpg": "neither a file nor a folder",
        "kiwi/nowhere.jpg": "link to nothing",
        "circle.jpg": "not in a class folder",
    }


def test_a_tree_that_is_deeper_than_python_recurses_is_walked(tmp_path: Path) -> None:
    deep = "/".join(["a"] * 100)
    touch(tmp_path, f"{deep}/1.jpg")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 60)
    try:
        assert [name for name, _, _ in walk(tmp_path)] == [f"{deep}/1.jpg"]
    finally:
        sys.setrecursionlimit(before)


def test_class_names_are_compared_in_one_normal_form(tmp_path: Path) -> None:
    composed, decomposed = "Gr\u00fcne \u00c4pfel", "Gru\u0308ne A\u0308pfel"
    for name in (composed, decomposed):
        write_photos(tmp_path, 2, [name], seed=len(name))
    assert classes_in(tmp_path) == [composed]
    for spelling in (composed, decomposed):
        splits = scan_once(tmp_path, ["plum", spelling], IMAGES)
        assert {sample.label for sample in splits.samples} == {1}
        assert len(splits.samples) == 4


def test_names_that_are_not_text_are_escaped(tmp_path: Path) -> None:
    write_photos(tmp_path, 2, [os.fsdecode(b"\xc4pfel"), "two\nlines"])
    listing = walk_classes(tmp_path, IMAGES.suffixes, IMAGES.noun, ["kiwi", "plum"])
    (line,) = summarize(listing.skipped, tmp_path)
    assert line.endswith(r"rename or remove the folder (two\nlines, \xc4pfel)")
    with pytest.raises(ConfigError, match=r"class 'two\\nlines' has a control character") as caught:
        find_files(tmp_path, IMAGES)
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize(
    ("name", "what"), [("nowhere", "does not exist; create"), ("a file", "is a file; pass its folder")]
)
def test_a_folder_that_cannot_be_read_is_one_clear_error(tmp_path: Path, name: str, what: str) -> None:
    touch(tmp_path, "a file")
    for read in (walk, classes_in):
        with pytest.raises(InputError, match=f"{name} {what}"):
            read(tmp_path / name)


def test_the_export_the_trial_and_the_daemon_find_the_same(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 6)
    touch(photos, "kiwi/._00.jpg", "kiwi/notes.txt", ".cache/00.jpg", "lost+found/00.jpg", "README.md")
    (photos / "plum" / "torn.jpg").write_bytes(b"no image")
    for name in ("loop", "plum/loop"):
        (photos / name).symlink_to(tmp_path / "nowhere")
    shutil.copytree(write_photos(photos / "plum" / "deep", 2, ["by hand"], seed=5), photos / "plum" / "more")
    shutil.rmtree(photos / "plum" / "deep")
    split = tmp_path / "split"
    shutil.copytree(photos, split / "train", symlinks=True)
    shutil.copytree(write_photos(tmp_path / "test", 3, seed=7), split / "test")
    for root in (photos, split):
        names = class_names(None, root, None)
        assert names == CLASSES
        train, test = find_files(root, IMAGES)
        assert tuple(train) == CLASSES
        found = {(path, label) for part in (train, test) for label, paths in part.items() for path in paths}
        assert found == {(sample.path, names[sample.label]) for sample in scan_once(root, names, IMAGES).samples}
