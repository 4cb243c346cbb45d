"""The pixels that graphs read from users' image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime.data.images import REDUCING_GAP, pixel_count
from edge_runtime.data.inputs import reader_for
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
    assert pixel_count(tmp_path / "photo.jpg", SIZE) == 225 * 300
    assert pixel_count(tmp_path / "photo.jpg", 600 // REDUCING_GAP) == 900 * 1200
    assert pixel_count(tmp_path / "progressive.jpg", SIZE) == pixel_count(tmp_path / "photo.png", SIZE) == 1800 * 2400
    whole = READER.load(tmp_path / "photo.png").astype(int)
    for name in ("photo.jpg", "progressive.jpg"):
        assert np.abs(READER.load(tmp_path / name).astype(int) - whole).max() < 6


def test_a_file_that_is_not_an_image_has_no_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    assert pixel_count(tmp_path / "a.jpg", SIZE) == pixel_count(tmp_path / "missing.jpg", SIZE) == 0
