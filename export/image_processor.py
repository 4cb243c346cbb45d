"""Reads the image processor of transformers beside the weights: how photos become pixels.

What a device can do is reproduced as transformers' processors with Pillow do it. Everything else is refused, with the
key and its value.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file

from fedfmsl.errors import WeightsError, one_line
from fedfmsl.protocol.bundle import FILTERS, RGB, ImagePreprocessing, Resize

FILES = ("preprocessor_config.json", "processor_config.json")  # the second, of transformers 5, has it nested
PROCESSORS = ("ViTImageProcessor", "DeiTImageProcessor", "CLIPImageProcessor", "BitImageProcessor")
MAX_PIXELS = 4096  # per side, before the crop
LARGEST = 1e4  # of mean and standard deviation, and of what one is divided by
# Keys that change no pixel. The conversion to RGB is always done.
WITHOUT_EFFECT = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "do_convert_rgb"),
    *("_valid_processor_keys", "model_input_names", "return_tensors", "data_format", "input_data_format", "device"),
    *("disable_grouping", "default_to_square", "_name_or_path", "transformers_version", "name_or_path"),
}


def read_processor(source: str, options: dict[str, Any], model_type: str) -> Processor | None:
    """The image processor of a folder or hub repository. None if there is none.

    `options`: keyword arguments for transformers. `model_type`: of the model, for a processor without a type. Raises
    WeightsError if the file is damaged, or if a device cannot do what it says. Raises OSError or ValueError if it
    cannot be fetched.
    """
    found = [
        Processor.read(values, model_type, f"{source}: {name}")
        for name in FILES
        if (values := _load(source, name, options)) is not None
    ]
    if any(processor != found[0] for processor in found):
        raise WeightsError(f"{source}: {' and '.join(FILES)} say different things; remove the wrong one")
    return found[0] if found else None


def _load(source: str, name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    optional = {"_raise_exceptions_for_missing_entries": False}
    if options.get("local_files_only"):
        optional["_raise_exceptions_for_connection_errors"] = False
    path = cached_file(source, name, **optional, **options)
    if path is None:
        return None
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{source}: {name} is not JSON: {error}; download it again") from error
    if name == FILES[1] and isinstance(values, dict):
        values = values.get("image_processor")
        if values is None:
            return None
    if not isinstance(values, dict):
        raise WeightsError(f"{source}: {name} has no JSON object; download it again")
    return values


@dataclass(frozen=True)
class Processor:
    """`size`: pixels per side of the result. `sized`: the file says so; otherwise it is the default of its class.
    `place`: the file, for messages."""

    place: str = field(compare=False)
    resize: Resize
    size: int
    sized: bool
    mean: RGB
    std: RGB

    @classmethod
    def read(cls, given: dict[str, Any], model_type: str, place: str) -> Processor:
        """From the values of the file, with the defaults of transformers' class for the others."""
        values = _Values(_with_defaults(given, model_type, place), place)
        if not values["do_resize"]:
            raise values.refused("do_resize", "a device resizes every photo")
        edge, keep_ratio = values.edge()
        size = edge
        if values.get("do_center_crop"):
            size = values.square("crop_size")
            if size > edge:
                raise values.refused("crop_size", f"it is larger than the image, which has {edge} px")
        elif keep_ratio:
            raise values.refused("size", "without do_center_crop the images are not square")
        resample = values["resample"]
        if not isinstance(resample, int) or resample not in range(len(FILTERS)):
            raise values.refused("resample", "it is a number from 0 to 5")
        return cls(
            place=place,
            resize=Resize(edge=edge, keep_ratio=keep_ratio, filter=FILTERS[resample]),
            size=size,
            sized=any(given.get(key) is not None for key in ("size", "crop_size")),
            **values.normalization(),
        )

    def preprocessing(self, size: int) -> ImagePreprocessing:
        """For images of `size` px, with the image scaled in proportion. Raises WeightsError if it gets too large."""
        edge = max(size, round(self.resize.edge * size / self.size))
        if edge > MAX_PIXELS:
            raise WeightsError(
                f"{self.place} resizes images to {self.resize.edge} px and crops {self.size} px, which makes {edge} px "
                f"for {size} px; devices resize to at most {MAX_PIXELS} px"
            )
        resize = self.resize.model_copy(update={"edge": edge})
        return ImagePreprocessing(size=size, mean=self.mean, std=self.std, resize=resize)


def _with_defaults(given: dict[str, Any], model_type: str, place: str) -> dict[str, Any]:
    """All values of transformers' processor. Raises WeightsError for another class, and for keys it does not know."""
    key = "image_processor_type" if given.get("image_processor_type") else "feature_extractor_type"
    named = given.get(key) or IMAGE_PROCESSOR_MAPPING_NAMES[model_type][0]
    name = str(named).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in PROCESSORS:
        raise WeightsError(
            f"{place} has {key} {one_line(repr(named))}; devices can only do what {', '.join(PROCESSORS)} do"
        )
    kind = getattr(transformers, name)
    settings = {*inspect.signature(kind.__init__).parameters} - WITHOUT_EFFECT
    for key, value in given.items():
        # null means no, or the default: it depends on the class
        if key in settings and key.startswith("do_") and not isinstance(value, bool):
            raise WeightsError(f"{place} has {key} {one_line(json.dumps(value))}; write true or false")
        if key not in {*settings, *WITHOUT_EFFECT} and value not in (None, False):
            raise WeightsError(
                f"{place} has {key} {one_line(repr(value))}, which is not a setting of {name}; remove it"
            )
    chosen = {key: value for key, value in given.items() if key in settings and value is not None}
    try:
        values: dict[str, Any] = kind(**chosen).to_dict()
    except Exception as error:  # of any kind: the values may be of any type
        raise WeightsError(f"{place} is not valid: {one_line(error)}") from error
    return values


class _Values(dict[str, Any]):
    """The values of a processor. Methods raise WeightsError with the key and the value."""

    def __init__(self, values: dict[str, Any], place: str) -> None:
        super().__init__(values)
        self._place = place

    def refused(self, key: str, reason: str) -> WeightsError:
        return WeightsError(f"{self._place} has {key} {one_line(repr(self[key]))}, which a device cannot do: {reason}")

    def edge(self) -> tuple[int, bool]:
        """The pixels of `size`, and whether only the shorter side gets them."""
        size = self["size"]
        if set(size) == {"shortest_edge"} and _is_count(size["shortest_edge"]):
            return size["shortest_edge"], True
        return self.square("size"), False

    def square(self, key: str) -> int:
        size = self[key]
        if set(size) != {"height", "width"} or size["height"] != size["width"] or not _is_count(size["height"]):
            raise self.refused(
                key, f"images are square: a shortest_edge, or an equal height and width, of at most {MAX_PIXELS} px"
            )
        return int(size["height"])

    def normalization(self) -> dict[str, RGB]:
        """`mean` and `std` for pixels from 0 to 1."""
        scale = 255 * self._number("rescale_factor") if self["do_rescale"] else 255.0
        if not 255 / LARGEST <= scale <= 255 * LARGEST:
            raise self.refused("rescale_factor", f"it is more than {LARGEST:g} times 1/255, or less")
        if not self["do_normalize"]:
            return {"mean": (0.0, 0.0, 0.0), "std": (1 / scale,) * 3}
        mean, std = self._rgb("image_mean"), self._rgb("image_std")
        if min(std) <= 0:
            raise self.refused("image_std", "it must be positive")
        mean, std = _divided(mean, scale), _divided(std, scale)
        for key, highest in (("image_mean", max(map(abs, mean))), ("image_std", max(*std, *(1 / s for s in std)))):
            if highest > LARGEST:
                raise self.refused(key, f"for pixels from 0 to 1 it is above {LARGEST:g} or below {1 / LARGEST:g}")
        return {"mean": mean, "std": std}

    def _rgb(self, key: str) -> RGB:
        """One number for each channel, or one for all."""
        value = self[key]
        values = value if isinstance(value, list | tuple) else [value] * 3
        if len(values) != 3 or not all(_is_number(each) for each in values):
            raise self.refused(key, "it must be a number, or three")
        red, green, blue = map(float, values)
        return red, green, blue

    def _number(self, key: str) -> float:
        if not _is_number(self[key]) or self[key] <= 0:
            raise self.refused(key, "it must be a positive number")
        return float(self[key])


def _divided(values: RGB, by: float) -> RGB:
    red, green, blue = (value / by for value in values)
    return red, green, blue


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_PIXELS
