"""Photos that something can be learned from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from support.builds import CLASSES


def write_photos(folder: Path, counts: Mapping[str, int], seed: int) -> Path:
    """`counts` photos at `folder`/<class>/, with the same file names in every class. A class has a colour and a width
    of stripes; light and noise differ from photo to photo, so that there is something to learn."""
    for name, count in counts.items():
        label = CLASSES.index(name)
        stripes = 40.0 * (np.arange(48) // (3 + 2 * label) % 2)[np.newaxis, :, np.newaxis]
        colour = 128 + 40 * np.cos(2 * np.pi * label / len(CLASSES) + np.array([0.0, 2.1, 4.2]))
        for index in range(count):
            rng = np.random.default_rng([seed, label, index])
            pixels = colour + stripes + rng.normal(0, 35, 3) + rng.normal(0, 25, (40, 48, 3))
            path = folder / name / f"{index:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)
    return folder
