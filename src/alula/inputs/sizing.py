"""Budgets of pixels for single images, as data for Qwen-VL and its like give them beside an image.

A processor that gives every image as many tokens as its size deserves (it reports ``image_grid_thw``) takes one budget
for a whole call. So where an image of a batch has its own, all are resized beforehand, each to the size the processor
itself finds for it under its budget, and the processor is told to leave sizes alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image

from alula.errors import HostError
from alula.sizing import Sizing

GRID = "image_grid_thw"
_KEPT = 4096  # sizes that are remembered


class Sizes:
    """Images resized for one image processor under budgets of their own.

    Args:
        image_processor: of any kind; None where there is none.
    """

    def __init__(self, image_processor: Any) -> None:
        self._processor = image_processor
        self._target = lru_cache(maxsize=_KEPT)(self._find_target)

    def __getstate__(self) -> Any:
        return self._processor

    def __setstate__(self, state: Any) -> None:
        self.__init__(state)  # type: ignore[misc]

    @property
    def are_obeyed(self) -> bool:
        """Whether the processor gives an image as many tokens as its size deserves."""
        try:
            return self._target((64, 64), Sizing()) is not None
        except (TypeError, ValueError, KeyError, AttributeError):
            return False

    def shrunk(self, chat: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
        """A conversation whose images are to have at most this share of the pixels that they would have."""
        return [{**each, "content": [self._shrunk(part, share) for part in each["content"]]} for each in chat]

    def _shrunk(self, part: dict[str, Any], share: float) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        width, height = self._target(part["image"].size, part.get("sizing") or Sizing())
        return {**part, "sizing": Sizing(max_pixels=max(1, int(share * width * height)))}

    def applied(self, chats: Sequence[Any]) -> list[Any] | None:
        """Conversations whose images all have their final size, to be processed with ``do_resize=False``; None where
        no image has a budget of its own.

        Raises:
            HostError: the processor has one size for all.
        """
        sized = [part for chat in chats for message in chat for part in message["content"] if part.get("sizing")]
        if not sized:
            return None
        self._check(next(iter(sized[0]["sizing"].given())))
        return [
            [{**message, "content": [self._resized(part) for part in message["content"]]} for message in chat]
            for chat in chats
        ]

    def check(self, rows: Mapping[str, Any], chats: Sequence[Any]) -> None:
        """Hold the grids that the processor reports to the sizes the images were given.

        Raises:
            HostError: it changed them after all.
        """
        images = [p["image"] for chat in chats for m in chat for p in m["content"] if p["type"] == "image"]
        patch = self._processor.patch_size
        expected = [[image.height // patch, image.width // patch] for image in images]
        if (found := [list(map(int, row[1:])) for row in rows[GRID]]) != expected:
            raise HostError(
                f"{type(self._processor).__name__} resized images that it was told to leave alone: grids {found[:3]}, "
                f"not {expected[:3]}",
                where="image_processor",
            )

    def _check(self, name: str) -> None:
        if not self.are_obeyed:
            raise HostError(
                f"an image comes with {name}, and {type(self._processor).__name__} has one size for all images",
                where="image_processor",
                remedy=f"leave {name} out of the data, or take a model whose images have as many tokens as their sizes "
                "deserve (Qwen-VL)",
            )

    def _resized(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        image = part["image"]
        target = self._target(image.size, part.get("sizing") or Sizing())
        return part if target == image.size else {**part, "image": image.resize(target, self._processor.resample)}

    def _find_target(self, size: tuple[int, int], sizing: Sizing) -> tuple[int, int]:
        """(width, height) that the processor gives an image of such a size under such a budget."""
        own = dict(self._processor.size)
        bounds = {"shortest_edge": own["shortest_edge"], "longest_edge": own["longest_edge"]}
        if sizing.resized_width and sizing.resized_height:
            size = (sizing.resized_width, sizing.resized_height)
            bounds = {"shortest_edge": 1, "longest_edge": 4 * size[0] * size[1] + 10**6}
        if sizing.min_pixels:
            bounds |= {"shortest_edge": sizing.min_pixels}
            bounds["longest_edge"] = max(bounds["longest_edge"], sizing.min_pixels)
        if sizing.max_pixels:
            bounds |= {"longest_edge": sizing.max_pixels}
            bounds["shortest_edge"] = min(bounds["shortest_edge"], sizing.max_pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self._processor(images=[Image.new("RGB", size)], size=bounds, return_tensors="np")
        _, height, width = (int(value) for value in found[GRID][0])
        patch = int(self._processor.patch_size)
        return width * patch, height * patch
