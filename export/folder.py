"""Checks of a transformers folder and its config before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedfmsl.errors import WeightsError, one_line

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
CHANNELS = 3  # devices read RGB
# The numbers of a config that an export reads, and their highest values. They are far above those of real models; more
# would fill the memory before anything could be checked.
COUNTS = {
    **{"hidden_size": 2**14, "num_hidden_layers": 1024, "num_attention_heads": 2**10, "intermediate_size": 2**16},
    **{"projection_dim": 2**14, "vocab_size": 2**20, "type_vocab_size": 2**10, "max_position_embeddings": 2**16},
    **{"image_size": 2**12, "patch_size": 2**12, "mlp_ratio": 64},
}
NUMBERS = ("layer_norm_eps", "initializer_range")


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


def check_config(config: Any, source: str) -> None:
    """Raises WeightsError for a number that is of another type, or outside of what any model has.

    transformers keeps whatever JSON says, and fails later or not at all.
    """
    for key, most in COUNTS.items():
        value = getattr(config, key, 1)
        if type(value) is not int or not 0 < value <= most:
            raise WeightsError(f"{source}: config.json has {key} {shortened(value)}, not a number from 1 to {most}")
    for key in NUMBERS:
        value = getattr(config, key, 1.0)
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise WeightsError(f"{source}: config.json has {key} {shortened(value)}, not a number above 0, at most 1")


def check_padding(config: Any, source: str) -> None:
    """Raises WeightsError if the token that fills texts is not one of the vocabulary."""
    value = config.pad_token_id
    if type(value) is not int or not 0 <= value < config.vocab_size:
        raise WeightsError(
            f"{source}: config.json has pad_token_id {shortened(value)}, not a token from 0 to {config.vocab_size - 1}"
        )


def shortened(value: Any) -> str:
    """A value of a JSON file for an error of one line."""
    return one_line(repr(value) if not isinstance(value, int) or abs(value) < 10**12 else f"{str(value)[:12]}…")[:60]


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
