"""Configuration of vision towers of one's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from alula.errors import HostError

_REMEDY = "restore the config.json it was saved with"


class CustomTowerConfig(PreTrainedConfig):
    """Which module a tower is, and what it emits.

    It has one hidden state, its output; `patch_size` is the side in pixels of the part of the picture behind one token
    where the tokens are a square grid, else None.

    Args:
        source: importable path of the module's class, ``package.module:Class``.
        arguments: of its constructor, plain JSON values.
        image_size: side in pixels of the square pictures it takes.
        num_channels: of a picture.
        tokens: that it emits for a picture.
        hidden_size: width of a token.
        is_grid: whether the tokens are the places of a square grid over the picture, line by line.

    Raises:
        HostError: a value that no tower has.
    """

    model_type = "alula_tower"

    def __init__(
        self,
        source: str = "",
        arguments: Mapping[str, Any] | None = None,
        image_size: int = 224,
        num_channels: int = 3,
        tokens: int = 1,
        hidden_size: int = 1,
        is_grid: bool = False,
        **kwargs: Any,
    ) -> None:
        sizes = {
            "image_size": image_size,
            "num_channels": num_channels,
            "tokens": tokens,
            "hidden_size": hidden_size,
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise HostError(f"{name} is {value!r}, no whole number of at least 1", where="vision", remedy=_REMEDY)
        if not isinstance(is_grid, bool):
            raise HostError(f"is_grid is {is_grid!r}, neither true nor false", where="vision", remedy=_REMEDY)
        line = math.isqrt(tokens)
        if is_grid and (line * line != tokens or image_size % line):
            raise HostError(
                f"{tokens} tokens are no square grid over pictures of {image_size} pixels",
                where="vision",
                remedy=_REMEDY,
            )
        if arguments is not None and not isinstance(arguments, Mapping):
            raise HostError(f"arguments is {arguments!r}, no mapping", where="vision", remedy=_REMEDY)
        self.source = source
        self.arguments = dict(arguments or {})
        self.image_size = image_size
        self.num_channels = num_channels
        self.tokens = tokens
        self.hidden_size = hidden_size
        self.num_hidden_layers = 0
        self.is_grid = is_grid
        self.patch_size = image_size // line if is_grid else None
        # both follow from the sizes; a saved configuration repeats them
        kwargs = {key: value for key, value in kwargs.items() if key not in ("num_hidden_layers", "patch_size")}
        super().__init__(**kwargs)
