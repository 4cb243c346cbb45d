"""A folder of samples that is looked at again and again, with what a device remembers of it on its disk."""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.bundles import Built
from support.samples import CLASSES, write_texts

import edge_runtime.data.folder as folder_module
from edge_runtime.data import ledger
from edge_runtime.data.folder import SETTLE_SECONDS, TOO_LARGE, SampleFolder, largest, scan
from edge_runtime.data.inputs import IMAGES
from edge_runtime.data.samples import Sample, Splits, assign_new_samples
from edge_runtime.store import DeviceStore
from fedfmsl.errors import ConfigError, InputError

LONG_AGO = 1_600_000_000


@pytest.fixture
def photos(photos: Path, tmp_path: Path) -> Path:
    return settled(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def store(tmp_path: Path) -> DeviceStore:
    (tmp_path / "state").mkdir()
    return DeviceStore(tmp_path / "state")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files whose content is looked at from now on."""
    names: list[str] = []
    read = folder_module.file_sha256

    def noted(path: Path) -> str:
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(folder_module, "file_sha256", noted)
    return names


def settled(folder: Path, at: int = LONG_AGO) -> Path:
    """Nobody has been writing there for long."""
    for path in folder.rglob("*"):
        os.utime(path, (at, at))
    return folder


def put(path: Path, data: bytes, at: int = LONG_AGO) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (at, at))
    return path


def photo(seed: int, size: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "jpeg")
    return buffer.getvalue()


def dealt(folder: SampleFolder, store: DeviceStore) -> Splits:
    """A look, and what a device makes of it, with features that say nothing."""
    slices = folder.look()
    features = np.random.default_rng(0).normal(size=(len(slices.unassigned_samples), 8)).astype(np.float32)
    slices = assign_new_samples(slices, features)
    with ledger.opened(store.samples) as kept:
        kept.keep_splits(slices)
    return slices


def names(samples: tuple[Sample, ...]) -> set[str]:
    return {f"{sample.path.parent.name}/{sample.path.name}" for sample in samples}


def skipped(slices: Splits, folder: Path) -> dict[str, str]:
    return {os.path.relpath(each.path, folder): each.reason for each in slices.skipped}


def test_a_first_look_is_a_scan(vit: Built, photos: Path, store: DeviceStore) -> None:
    looked, scanned = SampleFolder(photos, vit.bundle, store).look(), scan(photos, CLASSES, IMAGES)
    for one, other in (
        (looked.train, scanned.train),
        (looked.held_out, scanned.held_out),
        (looked.test, scanned.test),
    ):
        assert [each.sha256 for each in one] == [each.sha256 for each in other]
    assert looked.unassigned == {each.sha256 for each in looked.train + looked.held_out}


def test_an_unchanged_folder_is_not_read_again_after_a_restart_neither(
    vit: Built, photos: Path, store: DeviceStore, reads: list[str]
) -> None:
    put(photos / "kiwi" / "bad.jpg", b"no image")
    first = dealt(SampleFolder(photos, vit.bundle, store), store)
    assert len(reads) == 41
    reads.clear()
    again = SampleFolder(photos, vit.bundle, store).look()
    assert reads == []
    assert again == first
    assert skipped(again, photos) == {"kiwi/bad.jpg": "not a readable image"}


def test_new_and_changed_files_are_read_and_gone_ones_leave(
    vit: Built, photos: Path, store: DeviceStore, reads: list[str]
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    first = dealt(folder, store)
    reads.clear()
    put(photos / "plum" / "new.jpg", photo(1))
    put(photos / "plum" / "00.jpg", photo(2), LONG_AGO + 1)
    (photos / "kiwi" / "03.jpg").unlink()
    second = dealt(folder, store)
    assert sorted(reads) == ["00.jpg", "new.jpg"]
    assert names(second.samples) == names(first.samples) - {"kiwi/03.jpg"} | {"plum/new.jpg"}
    assert second.class_counts(4)[CLASSES.index("kiwi")] + sum(s.label == 1 for s in second.test) == 9
    with sqlite3.connect(store.samples) as db:
        assert db.execute("SELECT count(*) FROM files").fetchone() == (40,)


def test_a_sample_keeps_its_slice_under_another_name_and_after_it_was_away(
    vit: Built, photos: Path, store: DeviceStore, tmp_path: Path
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    first = dealt(folder, store)
    away = [first.test[0].path, first.train[0].path, first.held_out[0].path]
    for index, path in enumerate(away):
        path.rename(tmp_path / f"{index}.jpg")
    assert len(dealt(folder, store).samples) == 37
    for index, path in enumerate(away):
        (tmp_path / f"{index}.jpg").rename(path.with_name(f"back-{index}.jpg"))
    last = dealt(SampleFolder(photos, vit.bundle, store), store)
    for before, after in ((first.train, last.train), (first.held_out, last.held_out), (first.test, last.test)):
        assert [each.sha256 for each in after] == [each.sha256 for each in before]


def test_what_is_being_written_is_left_for_the_next_look_and_not_called_corrupt(
    vit: Built, photos: Path, store: DeviceStore
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    dealt(folder, store)
    whole = photo(3)
    path = put(photos / "plum" / "new.jpg", whole[:-300], int(time.time()))
    now = folder.look()
    assert skipped(now, photos) == {}
    assert "plum/new.jpg" not in names(now.samples)
    put(path, whole[:-200], LONG_AGO)  # the writer is slow
    assert skipped(folder.look(), photos) == {"plum/new.jpg": "not a readable image"}
    put(path, whole, LONG_AGO + 1)
    last = folder.look()
    assert skipped(last, photos) == {}
    assert "plum/new.jpg" in names(last.samples)


def test_a_file_that_is_written_to_while_it_is_read_is_left_for_the_next_look(
    vit: Built, photos: Path, store: DeviceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(photos / "plum" / "new.jpg", photo(4))
    read = folder_module.file_sha256

    def disturbed(file: Path) -> str:
        found = read(file)
        if file == path:
            put(path, photo(5), LONG_AGO + 1)
        return found

    monkeypatch.setattr(folder_module, "file_sha256", disturbed)
    folder = SampleFolder(photos, vit.bundle, store)
    assert "plum/new.jpg" not in names(folder.look().samples)
    monkeypatch.undo()
    assert "plum/new.jpg" in names(folder.look().samples)


def test_at_a_start_what_is_being_written_is_waited_for(
    vit: Built, photos: Path, store: DeviceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(photos / "plum" / "new.jpg", photo(6), int(time.time()))
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        put(path, photo(7), LONG_AGO)

    monkeypatch.setattr(folder_module.time, "sleep", wait)
    folder = SampleFolder(photos, vit.bundle, store)
    assert "plum/new.jpg" in names(folder.look(SETTLE_SECONDS).samples)
    folder.look(SETTLE_SECONDS)
    assert waited == [SETTLE_SECONDS]


def test_a_date_in_the_far_future_is_no_reason_to_wait(vit: Built, photos: Path, store: DeviceStore) -> None:
    settled(photos, at=4_000_000_000)
    assert len(SampleFolder(photos, vit.bundle, store).look().samples) == 40


def test_a_file_that_changes_without_a_trace_is_read_again_once_it_is_known(
    vit: Built, photos: Path, store: DeviceStore
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    first = dealt(folder, store)
    changed = first.train[0]
    data = bytearray(changed.path.read_bytes())
    data[-1] ^= 1
    put(changed.path, bytes(data))
    assert folder.look() == first
    folder.forget(changed.path)
    assert changed.sha256 not in {each.sha256 for each in folder.look().samples}


def test_a_folder_that_vanishes_or_is_empty_is_an_error_that_costs_no_memory(
    vit: Built, photos: Path, store: DeviceStore, tmp_path: Path, reads: list[str]
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    first = dealt(folder, store)
    photos.rename(tmp_path / "unplugged")
    with pytest.raises(InputError, match=f"image folder {photos} does not exist"):
        folder.look()
    photos.mkdir()
    with pytest.raises(InputError, match="holds no images"):
        folder.look()
    photos.rmdir()
    (tmp_path / "unplugged").rename(photos)
    reads.clear()
    assert folder.look() == first
    assert reads == []


def test_an_image_larger_than_any_at_the_start_is_set_aside_if_it_takes_much_memory(
    vit: Built, photos: Path, store: DeviceStore, reads: list[str]
) -> None:
    folder = SampleFolder(photos, vit.bundle, store)
    first = dealt(folder, store)
    assert max(sample.extent for sample in first.samples) < 60 * 60
    Image.new("RGB", (1000, 1000)).save(photos / "plum" / "larger.png")
    Image.new("RGB", (3000, 3000)).save(photos / "plum" / "large.png")
    Image.new("RGB", (3000, 3000)).save(photos / "plum" / "large.jpg")  # which is decoded smaller
    settled(photos)
    reads.clear()
    second = folder.look()
    assert names(second.samples) - names(first.samples) == {"plum/larger.png", "plum/large.jpg"}
    assert skipped(second, photos) == {"plum/large.png": TOO_LARGE}
    assert "large.png" not in reads
    assert "plum/large.png" in names(SampleFolder(photos, vit.bundle, store).look().samples)  # measured with it
    assert skipped(folder.look(), photos) == {"plum/large.png": TOO_LARGE}


def test_a_memory_plan_is_not_made_anew_for_each_ordinary_image_that_comes() -> None:
    small, ordinary, huge = (Sample(Path(f"{extent}.png"), "", 0, extent) for extent in (1, 2**20, 2**24))
    assert largest([small], IMAGES)[0] == largest([ordinary, small], IMAGES)[0]
    assert largest([small, huge, ordinary], IMAGES) == (2**24, huge.path)


def test_a_file_that_may_not_be_read_is_set_aside_until_it_may(
    vit: Built, photos: Path, store: DeviceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = folder_module.file_sha256

    def refused(path: Path) -> str:
        if path.name == "00.jpg":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(folder_module, "file_sha256", refused)  # tests may run as root, whom nothing is refused
    folder = SampleFolder(photos, vit.bundle, store)
    assert set(skipped(folder.look(), photos).values()) == {"cannot be read (Permission denied)"}
    monkeypatch.undo()
    assert skipped(folder.look(), photos) == {}


def test_another_preprocessing_reads_everything_again_and_deals_nothing_again(
    vit: Built, photos: Path, store: DeviceStore, reads: list[str]
) -> None:
    first = dealt(SampleFolder(photos, vit.bundle, store), store)
    with ledger.opened(store.samples) as kept:
        kept.read_for("another")
    reads.clear()
    assert SampleFolder(photos, vit.bundle, store).look() == first
    assert len(reads) == 40


def test_texts_come_and_go_like_images(bert: Built, store: DeviceStore, tmp_path: Path) -> None:
    texts = settled(write_texts(tmp_path / "texts"))
    folder = SampleFolder(texts, bert.bundle, store)
    first = dealt(folder, store)
    put(texts / "plum" / "new.txt", b"a ripe plum")
    put(texts / "plum" / "large.txt", b"plum " * 100_000)
    second = folder.look()
    assert names(second.samples) - names(first.samples) == {"plum/new.txt"}
    assert skipped(second, texts) == {"plum/large.txt": TOO_LARGE}


def test_a_damaged_ledger_is_one_line_that_names_it(vit: Built, photos: Path, store: DeviceStore) -> None:
    dealt(SampleFolder(photos, vit.bundle, store), store)
    store.samples.write_bytes(b"not a database" * 1000)
    with pytest.raises(ConfigError, match=r"samples\.sqlite is damaged .*delete it"):
        SampleFolder(photos, vit.bundle, store).look()


def test_names_that_are_not_utf_8_are_names(vit: Built, photos: Path, store: DeviceStore, reads: list[str]) -> None:
    put(Path(os.fsdecode(os.fsencode(photos / "plum") + b"/caf\xe9.jpg")), photo(8))
    folder = SampleFolder(photos, vit.bundle, store)
    assert len(folder.look().samples) == 41
    reads.clear()
    assert len(folder.look().samples) == 41
    assert reads == []


def test_a_link_that_leads_back_is_not_followed(vit: Built, photos: Path, store: DeviceStore) -> None:
    (photos / "plum" / "loop").symlink_to(photos)
    (photos / "plum" / "nowhere.jpg").symlink_to(photos / "gone.jpg")
    assert len(SampleFolder(photos, vit.bundle, store).look().samples) == 40


# --- a CSV file of labels


@pytest.fixture
def unsorted(photos: Path, tmp_path: Path) -> tuple[Path, list[tuple[str, str]]]:
    """The photos in folders that say nothing, and what a CSV file has to say."""
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
    slices = SampleFolder(root, vit.bundle, store, labels).look()
    wanted = scan(photos, CLASSES, IMAGES)
    assert {(s.sha256, s.label) for s in slices.samples} == {(s.sha256, s.label) for s in wanted.samples}
    assert {s.sha256 for s in slices.test} == {s.sha256 for s in wanted.test}
    assert slices.skipped == ()


def test_what_a_csv_file_says_wrongly_is_named_with_its_line(
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
    slices = SampleFolder(root, vit.bundle, store, labels).look()
    assert len(slices.samples) == 38
    said = [str(each) for each in slices.skipped]
    for words in (
        "labels.csv: line 40 names gone.jpg, which is not below",
        "labels.csv: line 41: class 'durian' is not in the bundle, whose classes are apple",
        "day-1/01.jpg: labels.csv labels it 'apple' (line 42) and 'plum' (line 43)",
        "movie.mp4: its name does not end in .bmp",
        "labels.csv: line 45 lacks the file or the class",
        "labels.csv: line 47 names ../x.jpg",
        "2 images have no label in labels.csv",
    ):
        assert sum(words in each for each in said) == 1, (words, said)
    assert len(said) == 7


def test_a_csv_file_may_change_while_it_is_in_use(
    vit: Built, unsorted: tuple[Path, list[tuple[str, str]]], store: DeviceStore, tmp_path: Path, reads: list[str]
) -> None:
    root, rows = unsorted
    labels = write_csv(tmp_path / "labels.csv", rows[:20])
    folder = SampleFolder(root, vit.bundle, store, labels)
    assert len(dealt(folder, store).samples) == 20
    reads.clear()
    write_csv(labels, [(name, label, "by hand") for name, label in rows], "\ufefffile,class,note")  # as Excel saves it
    slices = dealt(folder, store)
    assert len(slices.samples) == 40
    assert len(reads) == 20
    labels.write_text("half a fi")
    with pytest.raises(InputError, match="lack the columns file and class"):
        folder.look()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "do not exist"),
        (b"", "lack the columns"),
        (b"file;class\na.jpg;kiwi\n", "lack the columns"),
        (b"file,class\n\xff\xfe.jpg,kiwi\n", "must be a CSV file in UTF-8"),
        (b'file,class\n"a.jpg,kiwi\n', "must be a CSV file in UTF-8"),
        (b"file,class\n", "40 images have no label"),
    ],
)
def test_a_csv_file_that_is_none_is_one_clear_line(
    vit: Built, photos: Path, store: DeviceStore, tmp_path: Path, data: bytes | None, says: str
) -> None:
    labels = tmp_path / "labels.csv"
    if data is not None:
        labels.write_bytes(data)
    with pytest.raises(InputError, match=says) as raised:
        SampleFolder(photos, vit.bundle, store, labels).look()
    assert "\n" not in str(raised.value)
