"""The preprocessing of images as `preprocessor_config.json`, which AutoImageProcessor and transformers.js read."""

from __future__ import annotations

from fedfmsl.protocol.bundle import FILTERS, ImagePreprocessing, Resize

PREPROCESSOR = "preprocessor_config.json"


def image_processor(preprocessing: ImagePreprocessing) -> dict[str, object]:
    """The preprocessing as transformers' CLIPImageProcessor, which knows all of its steps."""
    size = preprocessing.size
    resize = preprocessing.resize or Resize(edge=size, keep_ratio=True, filter="bicubic")
    edge = resize.edge
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": edge} if resize.keep_ratio else {"height": edge, "width": edge},
        "resample": FILTERS.index(resize.filter),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocessing.mean,
        "image_std": preprocessing.std,
    }
