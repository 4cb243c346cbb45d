"""A file that cannot be read, whatever it holds, is skipped with a reason."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from devices.trial.dataset import find_files
from edge_runtime.data.inputs import IMAGES, reader_for
from edge_runtime.data.unreadable import UnreadableError, decoding
from fedfmsl.common.sample_formats import IMAGE_SUFFIXES, READ_IMAGES, UNREAD_IMAGES
from fedfmsl.errors import InputError, shown
from fedfmsl.protocol.bundle import ImagePreprocessing
from fedfmsl.protocol.messages import Prediction, encode, parse

READER = reader_for(ImagePreprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"
NO_FORMAT = "none of JPEG, PNG, WEBP, BMP, GIF, TIFF, AVIF, HEIF"


def image(form: str, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer := io.BytesIO(), form)
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG with a header only."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


class PanicException(BaseException):
    """Stands for that of the tokenizers package, which cannot be imported."""


@pytest.mark.parametrize(
    "error",
    [
        *(RuntimeError("a decoder's"), OverflowError(), MemoryError(), NotImplementedError("DDS"), RecursionError()),
        *(subprocess.CalledProcessError(1, ["gs"]), struct.error("unpack"), TypeError(), OSError(5, "I/O"), EOFError()),
        *(Image.DecompressionBombError("bomb"), PanicException("Rust\nlines")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_is_one_reason(error: BaseException) -> None:
    with pytest.raises(UnreadableError) as raised, decoding():
        raise error
    assert raised.value.reason and "\n" not in raised.value.reason
    assert raised.value.lasting is not isinstance(error, MemoryError)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_the_end_of_a_process_is_no_reason(end: type[BaseException]) -> None:
    with pytest.raises(end), decoding():
        raise end


@pytest.mark.parametrize("form", [name for name in READ_IMAGES if name != "HEIF"])
def test_a_damaged_image_is_read_or_has_a_reason(form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    whole, rng = image(form), np.random.default_rng(1)
    assert READER.decode(whole).shape == (32, 32, 3)
    for attempt in range(60):
        data = bytearray(whole)
        if attempt % 3 == 0:
            del data[int(rng.integers(len(data))) :]
        elif attempt % 3 == 1:
            data[int(rng.integers(len(data))) :] = bytes(len(data) // 2)
        else:
            for place in rng.integers(min(len(data), 400), size=4):
                data[place] = rng.integers(256)
        try:
            READER.extent(io.BytesIO(data), len(data))
            assert READER.decode(bytes(data)).shape == (32, 32, 3)
        except UnreadableError as error:
            assert error.reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"no image", NO_FORMAT),
        (EPS, NO_FORMAT),
        (image("DDS"), NO_FORMAT),
        (image("PPM"), NO_FORMAT),
        (image("ICO"), NO_FORMAT),
        (image("JPEG2000"), NO_FORMAT),
        (png(60_000, 60_000), "it has too many pixels"),
        (png(12_000, 12_000), "its 144 megapixels need 2880 MB of memory, more than the limit of"),
        (image("TIFF", "F"), "no defined white"),
        (image("JPEG")[:300], "it is damaged"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(100), NO_FORMAT),
    ],
)
def test_the_reason_says_what_is_wrong(data: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no program is started, such as Ghostscript
    for read in (READER.decode, READER.kind.check):
        with pytest.raises(UnreadableError) as raised:
            read(data)
        assert reason in raised.value.reason


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_each_suffix_of_an_image_is_read_or_has_a_remedy(tmp_path: Path, suffix: str) -> None:
    """A camera's RAW file is not opened, because it may hold a thumbnail as its first image."""
    (tmp_path / f"a{suffix.upper()}").write_bytes(image("TIFF"))
    if any(suffix in suffixes for suffixes in UNREAD_IMAGES.values()):
        with pytest.raises(InputError, match=r"not a readable image: .+ is not read; convert it to JPEG or PNG"):
            READER.load(tmp_path / f"a{suffix.upper()}")
    else:
        assert READER.load(tmp_path / f"a{suffix.upper()}").shape == (32, 32, 3)


def test_heif_is_read_with_its_package_and_named_without(monkeypatch: pytest.MonkeyPatch) -> None:
    start = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(UnreadableError, match="HEIF needs the package pillow-heif: pip install pillow-heif"):
        READER.decode(start)
    monkeypatch.undo()
    pillow_heif = pytest.importorskip("pillow_heif")
    grey = Image.new("RGB", (64, 48), (90, 90, 90))
    pillow_heif.from_pillow(grey).save(buffer := io.BytesIO())
    assert np.abs(READER.decode(buffer.getvalue()).astype(int) - 90).max() < 4
    with pytest.raises(UnreadableError):
        READER.decode(buffer.getvalue()[:200])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"notiz\xfc.txt", "notiz\\xfc.txt"),
        ("Bär 9.41\u202fAM.jpg".encode(), "Bär 9.41\u202fAM.jpg"),
        (b"a\nb\x1b[1m", "a\\nb\\x1b[1m"),
    ],
)
def test_any_file_name_can_be_shown_and_sent(name: bytes, text: str) -> None:
    path = shown(Path(os.fsdecode(name)))
    assert path == text
    sent = Prediction(device="a", file=path, time=0, label="b", confidence=1, probabilities={"b": 1}, round=1)
    assert parse(Prediction, encode(sent)) == sent


def test_a_trial_skips_unreadable_files_whatever_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [b"a.jpg", b"b.png", b"c\xfc.jpg", b"d\xfc.heic", b"e.cr2", b"f.gif"]
    data = [image("JPEG"), image("PNG"), image("JPEG", "L"), EPS, image("TIFF"), image("GIF")]
    (tmp_path / "kiwi").mkdir()
    for name, content in zip(names, data, strict=True):
        Path(os.fsdecode(os.fsencode(tmp_path / "kiwi") + b"/" + name)).write_bytes(content)
    train, test = find_files(tmp_path, IMAGES)
    assert {os.fsencode(path.name) for part in (train, test) for path in part["kiwi"]} == {
        b"a.jpg",
        b"b.png",
        b"c\xfc.jpg",
        b"f.gif",
    }
    said = capsys.readouterr().out
    assert "e.cr2: not a readable image: camera RAW is not read; convert it to JPEG or PNG" in said
    assert f"d\\xfc.heic: not a readable image: it is damaged, or {NO_FORMAT}" in said
