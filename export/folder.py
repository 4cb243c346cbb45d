"""Checks of a transformers folder and its config before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedfmsl.errors import WeightsError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
CHANNELS = 3  # devices read RGB


def check_folder(folder: Path) -> None:
    """Raises WeightsError if the folder has an adapter, or pointers of Git LFS or folders in place of files."""
    if (folder / "adapter_config.json").is_file():
        raise WeightsError(
            f"{folder} has an adapter_config.json; merge the PEFT adapter into its base (merge_and_unload) and pass "
            "the folder of the whole model"
        )
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"))):
        if not path.is_file():
            raise WeightsError(f"{path} is not a file; download the folder again")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise WeightsError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in {folder}")


def check_image_config(config: Any, source: str) -> None:
    """Makes `image_size` and `patch_size` numbers. Raises WeightsError if images are not square or not RGB."""
    for key in ("image_size", "patch_size"):
        setattr(config, key, _side(getattr(config, key), f"{source}: config.json has {key}"))
    if config.num_channels != CHANNELS:
        raise WeightsError(
            f"{source}: config.json has num_channels {config.num_channels}, but devices read images of {CHANNELS} "
            "channels; choose another model"
        )


def _side(value: Any, place: str) -> int:
    """A number of pixels, also from [height, width] if both are equal."""
    sides = set(value) if isinstance(value, list | tuple) and len(value) == 2 else {value} if value else set()
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise WeightsError(f"{place} {value!r}; only square images and patches are supported; choose another model")
    return int(sides.pop())
