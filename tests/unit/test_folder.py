"""A folder of samples that is scanned repeatedly, and what a device remembers of it on its disk."""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.bundles import Built
from support.opened_files import on_open, opened_below
from support.samples import CLASSES, LONG_AGO, set_dates, write_texts

from edge_runtime.data.folder import SampleFolder, largest, scan_once
from edge_runtime.data.inputs import IMAGES
from edge_runtime.data.ledger import open_ledger
from edge_runtime.data.proposals import NothingToTrainError
from edge_runtime.data.samples import Sample, Splits, assign_new_samples
from edge_runtime.data.unreadable import MAX_FILE_BYTES
from edge_runtime.store import DeviceStore
from fedfmsl.errors import ConfigError, InputError

NO_IMAGE = (
    "not a readable image: it is damaged, or none of JPEG, PNG, WEBP, BMP, GIF, TIFF, AVIF, HEIF; "
    "convert it to JPEG or PNG"
)


@pytest.fixture
def photos(photos: Path, tmp_path: Path) -> Path:
    return set_dates(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def store(tmp_path: Path) -> DeviceStore:
    (tmp_path / "state").mkdir()
    return DeviceStore(tmp_path / "state")


@pytest.fixture
def reads(photos: Path) -> Iterator[list[str]]:
    """The names of all photos that are opened from now on."""
    with opened_below(photos) as names:
        yield names


def put(path: Path, data: bytes, at: int = LONG_AGO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (at, at))
    return path


def photo(seed: int, size: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "jpeg")
    return buffer.getvalue()


def assigned(folder: SampleFolder, store: DeviceStore) -> Splits:
    """A scan, assigned as a device does it, with random features."""
    splits = folder.scan()
    features = np.random.default_rng(0).normal(size=(len(splits.unassigned_samples), 8)).astype(np.float32)
    splits = assign_new_samples(splits, features)
    with open_ledger(store.samples) as ledger:
        ledger.keep_splits(splits)
    return splits


def names(samples: tuple[Sample, ...]) -> set[str]:
    return {f"{sample.path.parent.name}/{sample.path.name}" for sample in samples}


def skipped(splits: Splits, folder: Path) -> dict[str, str]:
    return {os.path.relpath(each.path, folder): each.reason for each in splits.skipped}


def test_a_first_scan_is_a_scan_once(vit: Built, photos: Path, store: DeviceStore) -> None:
    first, scanned = SampleFolder(photos, vit.bundle, store).scan(), scan_once(photos, CLASSES, IMAGES)
    for one, other in (
        (first.train, scanned.train),
        (first.held_out, scanned.held_out),
        (first.test, scanned.test),
    ):
        assert [each.sha256 for each in one] == [each.sha256 for each in other]
    assert first.unassigned == {each.sha256 for each in first.train + first.held_out}


def test_an_unchanged_folder_is_not_read_again_even_after_a_restart(
    vit: Built, photos: Path, store: DeviceStore, reads: list[str]
) -> None:
    put(photos / "kiwi" / "bad.jpg", b"no image")
    first = assigned(SampleFolder(photos, vit.bundle, store), store)
    assert len(reads) == 41
    reads.clear()
    again = SampleFolder(photos, vit.bundle, store).scan()
    assert reads == []
    assert again == first
    assert skipped(again, photos) == {"kiwi/bad.jpg": NO_IMAGE}


def test_new_and_changed_files_are_read_and_deleted_ones_leave(
    vit: Built, photos: Path, store: DeviceStore, reads: list[str]
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    first = assigned(folder, store)
    reads.clear()
    put(photos / "plum" / "new.jpg", photo(1))
    put(photos / "plum" / "00.jpg", photo(2), LONG_AGO + 1)
    (photos / "kiwi" / "03.jpg").unlink()
    second = assigned(folder, store)
    assert sorted(reads) == ["00.jpg", "new.jpg"]
    assert names(second.samples) == names(first.samples) - {"kiwi/03.jpg"} | {"plum/new.jpg"}
    assert second.class_counts(4)[CLASSES.index("kiwi")] + sum(s.label == 1 for s in second.test) == 9
    with sqlite3.connect(store.samples) as db:
        assert db.execute("SELECT count(*) FROM file_versions").fetchone() == (40,)


def test_a_sample_keeps_its_split_under_another_name_and_after_an_absence(
    vit: Built, photos: Path, store: DeviceStore, tmp_path: Path
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    first = assigned(folder, store)
    away = [first.test[0].path, first.train[0].path, first.held_out[0].path]
    for index, path in enumerate(away):
        path.rename(tmp_path / f"{index}.jpg")
    assert len(assigned(folder, store).samples) == 37
    for index, path in enumerate(away):
        (tmp_path / f"{index}.jpg").rename(path.with_name(f"back-{index}.jpg"))
    last = assigned(SampleFolder(photos, vit.bundle, store), store)
    for before, after in ((first.train, last.train), (first.held_out, last.held_out), (first.test, last.test)):
        assert [each.sha256 for each in after] == [each.sha256 for each in before]


def test_a_file_that_is_being_written_is_left_for_the_next_scan(vit: Built, photos: Path, store: DeviceStore) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    assigned(folder, store)
    whole = photo(3)
    path = put(photos / "plum" / "new.jpg", whole[:-300], int(time.time()))
    now = folder.scan()
    assert skipped(now, photos) == {}
    assert "plum/new.jpg" not in names(now.samples)
    put(path, whole[:-200], LONG_AGO)  # the writer is slow
    assert "not a readable image: it is damaged (" in skipped(folder.scan(), photos)["plum/new.jpg"]
    put(path, whole, LONG_AGO + 1)
    last = folder.scan()
    assert skipped(last, photos) == {}
    assert "plum/new.jpg" in names(last.samples)


def test_a_file_that_is_written_to_while_it_is_read_is_left_for_the_next_scan(
    vit: Built, photos: Path, store: DeviceStore
) -> None:
    path = put(photos / "plum" / "new.jpg", photo(4))

    def write_meanwhile(activity: str, done: int, total: int) -> None:
        if done == total - 1:  # all but the last are read
            put(path, photo(5), LONG_AGO + 1)

    folder = SampleFolder(photos, vit.bundle, store)
    assert "plum/new.jpg" not in names(folder.scan(report=write_meanwhile).samples)
    assert "plum/new.jpg" in names(folder.scan().samples)


def test_a_start_waits_for_a_file_that_is_being_written(vit: Built, photos: Path, store: DeviceStore) -> None:
    path = put(photos / "plum" / "new.jpg", photo(6), int(time.time()))
    writer = threading.Timer(0.1, put, [path, photo(7), LONG_AGO])
    writer.start()
    folder = SampleFolder(photos, vit.bundle, store)
    assert "plum/new.jpg" in names(folder.scan(wait=0.5).samples)
    writer.join()
    started = time.monotonic()
    folder.scan(wait=60)  # nothing is being written any more
    assert time.monotonic() - started < 30


def test_a_file_with_a_date_in_the_future_is_read_at_once(vit: Built, photos: Path, store: DeviceStore) -> None:
    set_dates(photos, at=4_000_000_000)
    assert len(SampleFolder(photos, vit.bundle, store).scan().samples) == 40


def test_a_forgotten_file_is_read_again_though_its_size_and_date_are_the_same(
    vit: Built, photos: Path, store: DeviceStore
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    first = assigned(folder, store)
    changed = first.train[0]
    data = bytearray(changed.path.read_bytes())
    data[-1] ^= 1
    put(changed.path, bytes(data))
    assert folder.scan() == first
    folder.forget(changed.path)
    assert changed.sha256 not in {each.sha256 for each in folder.scan().samples}


def test_a_folder_that_vanishes_or_is_empty_is_an_error_and_nothing_is_forgotten(
    vit: Built, photos: Path, store: DeviceStore, tmp_path: Path, reads: list[str]
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    first = assigned(folder, store)
    photos.rename(tmp_path / "unplugged")
    with pytest.raises(InputError, match=f"image folder {photos} does not exist"):
        folder.scan()
    photos.mkdir()
    with pytest.raises(InputError, match="holds no images"):
        folder.scan()
    photos.rmdir()
    (tmp_path / "unplugged").rename(photos)
    reads.clear()
    assert folder.scan() == first
    assert reads == []


def test_an_image_larger_than_any_at_the_start_is_skipped_if_it_takes_much_memory(
    vit: Built, photos: Path, store: DeviceStore, reads: list[str]
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    first = assigned(folder, store)
    assert max(sample.extent for sample in first.samples) < 60 * 60 * 8
    Image.new("RGB", (1000, 1000)).save(photos / "plum" / "larger.png")
    Image.new("RGB", (3000, 3000)).save(photos / "plum" / "large.png")
    Image.new("RGB", (3000, 3000)).save(photos / "plum" / "large.jpg")  # is decoded smaller
    set_dates(photos)
    reads.clear()
    second = folder.scan()
    assert names(second.samples) - names(first.samples) == {"plum/larger.png", "plum/large.jpg"}
    reason = skipped(second, photos)["plum/large.png"]
    assert reason.startswith("needs 72 MB of memory to read, more than the device has planned")
    assert max(map(reads.count, reads)) == 1
    assert "plum/large.png" in names(SampleFolder(photos, vit.bundle, store).scan().samples)  # part of its memory plan
    assert skipped(folder.scan(), photos) == {"plum/large.png": reason}
    limited = SampleFolder(photos, vit.bundle, DeviceStore(photos.parent), most=71_000_000).scan()
    assert "half of the device's memory limit" in skipped(limited, photos)["plum/large.png"]


def test_ordinary_images_share_one_memory_plan() -> None:
    small, ordinary, huge = (Sample(Path(f"{extent}.png"), "", 0, extent) for extent in (1, 2**22, 2**26))
    assert largest([small], IMAGES)[0] == largest([ordinary, small], IMAGES)[0]
    assert largest([small, huge, ordinary], IMAGES) == (2**26, huge.path)


def test_a_file_without_read_permission_is_skipped_until_it_has_it(
    vit: Built, photos: Path, store: DeviceStore
) -> None:
    def refuse(path: Path) -> None:
        if path.name == "00.jpg":
            raise PermissionError(13, "Permission denied")

    folder = SampleFolder(photos, vit.bundle, store)
    with on_open(refuse):  # tests may run as root, who may read every file
        assert set(skipped(folder.scan(), photos).values()) == {"cannot be read (Permission denied)"}
    assert skipped(folder.scan(), photos) == {}


@pytest.mark.parametrize(
    ("preprocessing", "decoders", "read_again"),
    [("another", "", 41), ("", "another", 1)],
    ids=["another preprocessing", "another version of a decoder"],
)
def test_what_may_be_read_otherwise_is_read_again_and_changes_no_split(
    vit: Built,
    photos: Path,
    store: DeviceStore,
    reads: list[str],
    preprocessing: str,
    decoders: str,
    read_again: int,
) -> None:
    put(photos / "plum" / "damaged.jpg", b"not a photo")
    first = assigned(SampleFolder(photos, vit.bundle, store), store)
    with closing(sqlite3.connect(store.samples)) as db, db:
        if preprocessing:
            db.execute("UPDATE read_with SET preprocessing = ?", [preprocessing])
        if decoders:
            db.execute("UPDATE read_with SET decoders = ?", [decoders])
    reads.clear()
    assert SampleFolder(photos, vit.bundle, store).scan() == first
    assert len(reads) == read_again
    reads.clear()
    assert SampleFolder(photos, vit.bundle, store).scan() == first
    assert reads == []


def test_new_class_folders_are_proposed_with_the_number_of_their_files(
    vit: Built, photos: Path, store: DeviceStore
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    assert folder.scan().proposed == {}
    for name, count in {"fig": 3, "li\u0301me": 2, "date": 1, "Apple ": 4, "dev": 4, "two\nlines": 4}.items():
        for number in range(count):
            put(photos / name / f"{number}.jpg", photo(number))
    put(photos / "fig" / "notes.txt", b"no image")
    scanned = folder.scan()
    assert scanned.proposed == {"fig": 3, "l\u00edme": 2}
    reasons = {each.path.name: each.reason.partition("; ")[2] for each in scanned.skipped}
    assert reasons["fig"] == "add it to the run, rename or remove the folder"
    assert reasons["date"].startswith("a new class needs 2 files to train on, and to be proposed; add files")
    assert reasons["dev"] == "its name is that of a folder of a split or of thumbnails; choose another one"
    assert reasons["two\nlines"] == "its name has a control character; rename it"
    for name in CLASSES:
        shutil.rmtree(photos / name)
    with pytest.raises(NothingToTrainError, match=r"class not in the task.*add it to the run") as caught:
        folder.scan()
    assert caught.value.proposed == {"fig": 3, "l\u00edme": 2}
    for number in range(20):
        for each in range(2 + number):
            put(photos / f"new {number:02}" / f"{each}.jpg", photo(each))
    with pytest.raises(NothingToTrainError) as caught:
        folder.scan()
    assert list(caught.value.proposed.values()) == list(range(6, 22))  # the sixteen with most files


def test_a_sample_is_new_until_a_round_of_its_run_has_used_it_also_after_a_restart(
    vit: Built, photos: Path, store: DeviceStore
) -> None:
    def scanned(run: str = "r") -> Splits:
        return SampleFolder(photos, vit.bundle, store, run=run).scan()

    first = assigned(SampleFolder(photos, vit.bundle, store, run="r"), store)
    assert first.new == len(first.train) > 0
    with open_ledger(store.samples) as ledger:
        ledger.mark_trained((sample.sha256 for sample in first.train), "r")
    assert scanned().new == 0
    for number in range(20):
        put(photos / "kiwi" / f"new-{number}.jpg", photo(number))
    again = scanned()
    assert again.new == len(again.train) - len(first.train) > 0
    assert scanned("another").new == len(again.train)
    with open_ledger(store.samples) as ledger:
        ledger.mark_trained((sample.sha256 for sample in again.train), "another")
        assert (len(ledger.trained("another")), len(ledger.trained("r"))) == (len(again.train), 0)


def test_texts_come_and_go_like_images(bert: Built, store: DeviceStore, tmp_path: Path) -> None:
    texts = set_dates(write_texts(tmp_path / "texts"))
    folder = SampleFolder(texts, bert.bundle, store)
    first = assigned(folder, store)
    put(texts / "plum" / "new.txt", b"a ripe plum")
    put(texts / "plum" / "large.txt", b"plum " * 1_000_000)
    second = folder.scan()
    assert names(second.samples) - names(first.samples) == {"plum/new.txt"}
    assert skipped(second, texts).keys() == {"plum/large.txt"}


def test_a_damaged_ledger_is_one_line_that_names_it(vit: Built, photos: Path, store: DeviceStore) -> None:
    assigned(SampleFolder(photos, vit.bundle, store), store)
    store.samples.write_bytes(b"not a database" * 1000)
    with pytest.raises(ConfigError, match=r"samples\.sqlite is damaged .*delete it"):
        SampleFolder(photos, vit.bundle, store).scan()


def test_names_need_not_be_utf_8(vit: Built, photos: Path, store: DeviceStore, reads: list[str]) -> None:
    put(Path(os.fsdecode(os.fsencode(photos / "plum") + b"/caf\xe9.jpg")), photo(8))
    folder = SampleFolder(photos, vit.bundle, store)
    assert len(folder.scan().samples) == 41
    reads.clear()
    assert len(folder.scan().samples) == 41
    assert reads == []


def test_a_link_to_a_parent_folder_is_not_followed(vit: Built, photos: Path, store: DeviceStore) -> None:
    (photos / "plum" / "loop").symlink_to(photos)
    (photos / "plum" / "nowhere.jpg").symlink_to(photos / "gone.jpg")
    assert len(SampleFolder(photos, vit.bundle, store).scan().samples) == 40


def test_a_file_of_more_than_256_mb_is_skipped_unread(vit: Built, photos: Path, store: DeviceStore) -> None:
    path = put(photos / "plum" / "video.jpg", b"")
    os.truncate(path, MAX_FILE_BYTES + 1)  # sparse
    os.utime(path, (LONG_AGO, LONG_AGO))
    assert skipped(SampleFolder(photos, vit.bundle, store).scan(), photos) == {
        "plum/video.jpg": "not a readable image: it has more than 268 MB"
    }


# --- a CSV file of labels


@pytest.fixture
def unsorted(photos: Path, tmp_path: Path) -> tuple[Path, list[tuple[str, str]]]:
    """The photos in folders without class names, and the rows of a CSV file of their labels."""
    root, rows = tmp_path / "camera", []
    for index, path in enumerate(sorted(photos.rglob("*.jpg"))):
        name = f"day-{index % 3}/{index:02}.jpg"
        put(root / name, path.read_bytes())
        rows.append((name, path.parent.name))
    return root, rows


def write_csv(path: Path, rows: list[tuple[str, str]], header: str = "file,class") -> Path:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return path


def test_labels_may_come_from_a_csv_file(
    vit: Built, photos: Path, unsorted: tuple[Path, list[tuple[str, str]]], store: DeviceStore, tmp_path: Path
) -> None:
    root, rows = unsorted
    labels = write_csv(tmp_path / "labels.csv", rows)
    splits = SampleFolder(root, vit.bundle, store, labels).scan()
    expected = scan_once(photos, CLASSES, IMAGES)
    assert {(s.sha256, s.label) for s in splits.samples} == {(s.sha256, s.label) for s in expected.samples}
    assert {s.sha256 for s in splits.test} == {s.sha256 for s in expected.test}
    assert splits.skipped == ()
    write_csv(labels, [*((name, "fig") for name, _ in rows[:3]), *rows[3:]])
    assert SampleFolder(root, vit.bundle, store, labels).scan().proposed == {"fig": 3}


def test_a_wrong_row_of_a_csv_file_is_named_with_its_line(
    vit: Built, unsorted: tuple[Path, list[tuple[str, str]]], store: DeviceStore, tmp_path: Path
) -> None:
    root, rows = unsorted
    put(root / "movie.mp4", b"")
    wrong = [("gone.jpg", "kiwi"), ("day-0/00.jpg", "durian"), ("day-1/01.jpg", "plum"), ("movie.mp4", "kiwi")]
    rows = [
        *rows[2:],
        *wrong[:2],
        rows[1],
        *wrong[2:],
        ("", "kiwi"),
        ("./day-2//02.jpg", rows[2][1]),
        ("../x.jpg", "kiwi"),
    ]
    labels = write_csv(tmp_path / "labels.csv", rows)
    put(root / "new.jpg", photo(9))
    put(root / "newer.jpg", photo(10))
    splits = SampleFolder(root, vit.bundle, store, labels).scan()
    assert len(splits.samples) == 38
    reasons = [str(each) for each in splits.skipped]
    few = "a new class needs 2 files to train on, and to be proposed; add files"
    for words in (
        f"labels.csv: names a file that is not below {root} (line 40: gone.jpg)",
        f"classes are apple, kiwi, lemon, plum; {few}, or correct the line (line 41: 'durian')",
        "day-1/01.jpg: several classes in labels.csv ('apple' in line 42 and 'plum' in line 43)",
        "movie.mp4: .mp4 is not a suffix of images",
        "labels.csv: without a file or a class (line 45)",
        f"labels.csv: names a file that is not below {root} (line 47: ../x.jpg)",
        "no label in labels.csv",
    ):
        assert sum(words in each for each in reasons) == 1, (words, reasons)
    assert len(reasons) == 7


def test_a_csv_file_may_change_while_it_is_in_use(
    vit: Built, unsorted: tuple[Path, list[tuple[str, str]]], store: DeviceStore, tmp_path: Path
) -> None:
    root, rows = unsorted
    labels = write_csv(tmp_path / "labels.csv", rows[:20])
    folder = SampleFolder(root, vit.bundle, store, labels)
    assert len(assigned(folder, store).samples) == 20
    write_csv(labels, [(name, label, "by hand") for name, label in rows], "\ufefffile,class,note")  # as Excel writes it
    with opened_below(root) as reads:
        splits = assigned(folder, store)
    assert len(splits.samples) == 40
    assert len(reads) == 20
    labels.write_text("half a fi")
    with pytest.raises(InputError, match="lack the columns file and class"):
        folder.scan()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "does not exist"),
        (b"", "lack the columns"),
        (b"file;class\na.jpg;kiwi\n", "lack the columns"),
        (b"file,class\n\xff\xfe.jpg,kiwi\n", "must be a CSV file in UTF-8"),
        (b'file,class\n"a.jpg,kiwi\n', "must be a CSV file in UTF-8"),
        (b"file,class\n", "40 files: no label in labels.csv"),
    ],
)
def test_an_unusable_csv_file_is_one_clear_line(
    vit: Built, photos: Path, store: DeviceStore, tmp_path: Path, data: bytes | None, says: str
) -> None:
    labels = tmp_path / "labels.csv"
    if data is not None:
        labels.write_bytes(data)
    with pytest.raises(InputError, match=says) as raised:
        SampleFolder(photos, vit.bundle, store, labels).scan()
    assert "\n" not in str(raised.value)
