"""Pictures made ready for a processor's tower by the shortest way that gives the processor's own values.

`transformers`' image processors in PIL turn a picture into an array and back, and compute in double precision what
depends on one of 256 values. Where a processor does no more than resize, crop, rescale and normalize, its pictures are
resized here, its crop is left to it, and the rest is looked up in a table that the processor itself filled: the same
bits (``tests/inputs/test_pictures.py``) in about half of the time. Every other processor is left alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

_PLAIN = "transformers.image_processing_"
"""modules with the steps of a processor that does nothing of its own"""
_STEPS = ("preprocess", "process_image", "_preprocess", "resize", "center_crop", "rescale", "normalize")
_AS_THEY_ARE = {"do_resize": False, "do_rescale": False, "do_normalize": False}
_SIZES = 4096  # of pictures, whose resized sizes are remembered


class Pictures:
    """The short way for one image processor.

    Args:
        image_processor: of any kind; None where there is none.
    """

    def __init__(self, image_processor: Any) -> None:
        self._processor = image_processor
        self._table: np.ndarray | None = None
        if _is_plain(image_processor):
            # (3, 256) float32: what each value of each channel becomes
            ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
            table = self._values(Image.fromarray(ramp), do_resize=False, do_center_crop=False)
            self._table = table.reshape(3, 256) if table.shape == (3, 16, 16) and table.dtype == np.float32 else None
        self._resized_size = lru_cache(maxsize=_SIZES)(self._find_resized_size)

    def __getstate__(self) -> Any:
        return self._processor

    def __setstate__(self, state: Any) -> None:
        self.__init__(state)  # type: ignore[misc]

    def resized(self, chats: Sequence[Any]) -> tuple[list[Any], dict[str, Any]] | None:
        """Conversations whose pictures have the size that the processor gives them, and the options to process them
        with; None where this is no short way. What comes of them is to be `finished`.
        """
        parts = [part for chat in chats for message in chat for part in message["content"] if part["type"] != "text"]
        if self._table is None or not parts or not all(_is_rgb(part) for part in parts):
            return None
        told = [
            [{**message, "content": [self._resized(part) for part in message["content"]]} for message in chat]
            for chat in chats
        ]
        return told, dict(_AS_THEY_ARE)

    def finished(self, values: torch.Tensor) -> torch.Tensor:
        """Values (N, 3, height, width) uint8 of resized, cropped pictures -> float32, as the processor has them."""
        assert self._table is not None
        given = values.numpy()
        found = np.empty(given.shape, np.float32)
        for number in range(len(given)):
            for channel in range(3):  # "clip" has take write where it is told; no byte is outside of the table
                np.take(self._table[channel], given[number, channel], out=found[number, channel], mode="clip")
        return torch.from_numpy(found)

    def _resized(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        image, resample = part["image"], self._processor.resample
        width, height = self._resized_size(image.size)
        if (width, height) == image.size:
            return part
        kept = width
        if self._processor.do_center_crop and self._processor.crop_size["height"] <= height:
            kept = min(width, self._processor.crop_size["width"])
        if kept < width:
            # Pillow resizes lines, rounds to bytes, then resizes columns: those that will be cut off need not be
            left = (width - kept) // 2
            image = image.resize((width, image.height), resample).crop((left, 0, left + kept, image.height))
        return {**part, "image": image.resize((kept, height), resample)}

    def _find_resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        if not self._processor.do_resize:
            return size
        _, height, width = self._values(
            Image.new("RGB", size), do_center_crop=False, do_rescale=False, do_normalize=False
        ).shape
        return width, height

    def _values(self, image: Image.Image, **options: Any) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values: np.ndarray = self._processor(image, return_tensors="np", **options)["pixel_values"][0]
        return values


def _is_rgb(part: Mapping[str, Any]) -> bool:
    return part["type"] == "image" and isinstance(part["image"], Image.Image) and part["image"].mode == "RGB"


def _is_plain(processor: Any) -> bool:
    """Whether a processor resizes, crops, rescales and normalizes in PIL as `transformers` has it, and no more."""
    if getattr(processor, "backend", None) != "pil" or getattr(processor, "do_pad", None):
        return False
    steps = (getattr(type(processor), step, None) for step in _STEPS)
    does = processor.do_rescale and processor.do_normalize and processor.do_convert_rgb is not False
    return bool(does) and all(getattr(step, "__module__", "").startswith(_PLAIN) for step in steps)
