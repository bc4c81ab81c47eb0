"""Inputs where a model computes: on its device, in its precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alula.media import MEDIA
from alula.tokens import TokenMap

_PRECISE = {keyword for medium in MEDIA.values() if medium.tower == "universal" for keyword in medium.inputs}
"""Inputs that models round themselves, behind what goes by their values (which points are neighbors)"""


def placed(inputs: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A model's inputs by keyword, on the device of one of its parameters.

    Floating-point tensors (pixels) take its dtype as well, but for the media of universal hosts; integers and what is
    no tensor stay what they are.
    """
    return {key: _moved(key, value, parameter) for key, value in inputs.items()}


def _moved(key: str, value: Any, parameter: Tensor) -> Any:
    if isinstance(value, TokenMap):
        return value.to(parameter.device)
    if not torch.is_tensor(value):
        return value
    if value.is_floating_point() and key not in _PRECISE:
        return value.to(parameter.device, parameter.dtype)
    return value.to(parameter.device)
