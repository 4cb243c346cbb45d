"""The pixels that graphs read from users' image files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from edge_runtime.data.images import REDUCING_GAP, RGB_BYTES, extent
from edge_runtime.data.inputs import reader_for
from edge_runtime.engines.memory import peak_rss
from fedfmsl.protocol.bundle import ImagePreprocessing

SIZE = 32
PREPROCESSING = ImagePreprocessing(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
READER = reader_for(PREPROCESSING)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
@pytest.mark.parametrize("size", [(32, 32), (33, 57), (500, 3), (1, 1), (7, 640)])
def test_every_mode_and_shape_becomes_square_rgb(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    suffix = ".jpg" if mode == "CMYK" else ".png"
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    grey16 = noise[:, :, 0].astype(np.uint16) * 257
    image = Image.fromarray(grey16) if mode == "I;16" else Image.fromarray(noise).convert(mode)
    image.save(tmp_path / f"image{suffix}")
    pixels = READER.load(tmp_path / f"image{suffix}")
    assert pixels.shape == (SIZE, SIZE, 3)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 0 or size == (1, 1)


def test_the_centre_of_the_shorter_side_is_kept(tmp_path: Path) -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = (255, 0, 0)  # the middle third
    for name, array in (("wide.png", wide), ("tall.png", wide.transpose(1, 0, 2))):
        Image.fromarray(array).save(tmp_path / name)
        pixels = READER.load(tmp_path / name)
        assert np.median(pixels.reshape(-1, 3), axis=0).tolist() == [255, 0, 0]
        assert pixels[8:-8, 8:-8, 0].min() > 250


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.random.default_rng(2).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    eight, sixteen = (READER.load(tmp_path / name) for name in ("8.png", "16.png"))
    assert np.array_equal(eight, sixteen)


def test_an_image_is_rotated_by_its_orientation_tag(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    image.rotate(-90, expand=True).save(tmp_path / "upright.png")
    image.save(tmp_path / "tagged.png", exif=turned)
    upright, tagged = (READER.load(tmp_path / name) for name in ("upright.png", "tagged.png"))
    assert np.array_equal(upright, tagged)


@pytest.mark.parametrize("quality", [{"lossless": True}, {}])
def test_webp_is_read(tmp_path: Path, quality: dict[str, bool]) -> None:
    grey = np.full((50, 40, 3), 200, np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.webp", **quality)
    assert np.abs(READER.load(tmp_path / "a.webp").astype(int) - 200).max() < 4


def test_a_large_photo_is_decoded_smaller_and_looks_the_same(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:1800, :2400]
    waves = 128 + 100 * np.sin(rows / 90)[..., None] * np.cos(columns[..., None] / np.array([70, 110, 150]))
    photo = Image.fromarray(waves.astype(np.uint8))
    photo.save(tmp_path / "photo.jpg", quality=95)
    photo.save(tmp_path / "progressive.jpg", quality=95, progressive=True)
    photo.save(tmp_path / "photo.png")
    assert memory(tmp_path / "photo.jpg", SIZE) == 225 * 300 * RGB_BYTES
    assert memory(tmp_path / "photo.jpg", 600 // REDUCING_GAP) == 900 * 1200 * RGB_BYTES
    assert memory(tmp_path / "progressive.jpg", SIZE) == 225 * 300 * RGB_BYTES + 1800 * 2400 * 3  # 4:2:0, 16 bits
    assert memory(tmp_path / "photo.png", SIZE) == 1800 * 2400 * RGB_BYTES
    whole = READER.load(tmp_path / "photo.png").astype(int)
    for name in ("photo.jpg", "progressive.jpg"):
        assert np.abs(READER.load(tmp_path / name).astype(int) - whole).max() < 6


def memory(path: Path, size: int) -> int:
    """What reading takes beside the file's bytes."""
    with path.open("rb") as file:
        return extent(file, 0, size)


def plain(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels as they are defined: everything is decoded, turned, scaled, then cropped."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    scale = SIZE / min(upright.size)
    width, height = (max(SIZE, round(side * scale)) for side in upright.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    scaled = upright.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(scaled.crop((left, top, left + SIZE, top + SIZE)))


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("save", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_ordinary_images_have_the_pixels_of_the_plain_way(save: str, orientation: int) -> None:
    noise = np.random.default_rng(orientation).integers(0, 256, (60, 80 + 100 * orientation, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(noise).save(buffer := io.BytesIO(), save, **({} if save in ("BMP", "GIF") else {"exif": tags}))
    expected = Image.open(buffer)
    expected.draft(None, (REDUCING_GAP * SIZE, REDUCING_GAP * SIZE))
    assert np.array_equal(READER.decode(buffer.getvalue()), plain(expected))


def test_a_damaged_orientation_tag_costs_no_photo(tmp_path: Path) -> None:
    image = Image.new("RGB", (50, 40), (1, 2, 3))
    for index, tag in enumerate(
        (b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\7", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff")
    ):
        image.save(tmp_path / f"{index}.jpg", exif=tag)
        assert READER.load(tmp_path / f"{index}.jpg").shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (20_000_000, 1)])
def test_of_a_strip_only_the_middle_is_scaled(size: tuple[int, int]) -> None:
    image = Image.new("1", size)
    image.paste(1, (size[0] // 2 - 8, 0, size[0] // 2 + 8, size[1]))
    image.save(buffer := io.BytesIO(), "PNG")
    before = peak_rss()
    assert READER.decode(buffer.getvalue()).shape == (SIZE, SIZE, 3)
    assert peak_rss() - before < 200 * 2**20


def test_the_size_of_a_jpeg_is_limited_after_its_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # instead of a file of 200 megapixels
    Image.new("RGB", (800, 600), (200, 0, 0)).save(buffer := io.BytesIO(), "JPEG")
    assert np.abs(READER.decode(buffer.getvalue()).astype(int) - (200, 0, 0)).max() < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    """A black logo on a transparent ground. Without an alpha channel one colour is transparent."""
    logo = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
    logo.paste((0, 0, 0, 255), (12, 12, 36, 36))
    key = {}
    if mode in ("L", "RGB"):
        ground = 9 if mode == "L" else (9, 9, 9)
        drawn = Image.new(mode, (48, 48), ground)
        drawn.paste(0 if mode == "L" else (0, 0, 0), (12, 12, 36, 36))
        key = {"transparency": ground}
    elif mode == "P":
        drawn = Image.new("P", (48, 48), 1)
        drawn.putpalette([0, 0, 0, 0, 0, 0])
        drawn.paste(0, (12, 12, 36, 36))
        key = {"transparency": 1}
    else:
        drawn = logo.convert(mode)
    drawn.save(buffer := io.BytesIO(), "PNG", **key)
    pixels = READER.decode(buffer.getvalue())
    assert pixels[:4].min() == 255
    assert pixels[12:20, 12:20].max() == 0


def test_an_alpha_channel_that_hides_everything_is_not_used() -> None:
    Image.new("RGBA", (40, 40), (10, 200, 30, 0)).save(buffer := io.BytesIO(), "PNG")
    assert READER.decode(buffer.getvalue())[0, 0].tolist() == [10, 200, 30]
