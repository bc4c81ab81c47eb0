"""Vision towers a stock LLaVA model can carry: what tokens they emit and how images reach them.

LLaVA reads ``hidden_states[feature_layer]`` of the tower, (images, positions, width), and either keeps all positions
(``full``) or drops the first (``default``). So a tower fits when it takes nothing but ``pixel_values``, keeps extra
positions (class token, registers) in front, and one square patch per remaining position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from alula.errors import HostError
from alula.hosts.custom import CustomTowerConfig


@dataclass(frozen=True)
class TowerFamily:
    """One ``model_type`` of tower.

    Args:
        extra_positions: configuration -> positions in front of the patches (class token and registers).
        image_processor: makes one for towers that come without; None: such a tower needs its own.
        any_size: interpolates its position embeddings (or has rotary ones), so the processor may pick the size.
        unused: prefixes of weights that no token of the output depends on; they are left behind.
        trims: configuration changes that go with leaving them.
    """

    extra_positions: Callable[[PreTrainedConfig], int]
    image_processor: Callable[[], BaseImageProcessor] | None
    any_size: bool = False
    unused: tuple[str, ...] = ()
    trims: tuple[tuple[str, Any], ...] = ()


# the DINO models are trained on ImageNet's colours; DINOv2 crops, DINOv3 resizes
_IMAGENET: dict[str, Any] = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
_DINOV2 = partial(BitImageProcessorPil, **_IMAGENET)
_DINOV3 = partial(ViTImageProcessorPil, **_IMAGENET)

FAMILIES: dict[str, TowerFamily] = {
    "clip_vision_model": TowerFamily(lambda config: 1, CLIPImageProcessorPil),
    # the attention-pooling head serves SigLIP's own contrastive loss
    "siglip_vision_model": TowerFamily(
        lambda config: 0, SiglipImageProcessorPil, unused=("head.",), trims=(("vision_use_head", False),)
    ),
    "dinov2": TowerFamily(lambda config: 1, _DINOV2, any_size=True),
    "dinov2_with_registers": TowerFamily(lambda config: 1 + config.num_register_tokens, _DINOV2, any_size=True),
    "dinov3_vit": TowerFamily(lambda config: 1 + config.num_register_tokens, _DINOV3, any_size=True),
    CustomTowerConfig.model_type: TowerFamily(lambda config: 0, None),
}


@dataclass(frozen=True)
class TowerShape:
    """The geometry of a tower as LLaVA sees it.

    Args:
        patch_size: side of a patch in pixels; None for a tower whose tokens are no square grid, which LLaVA cannot
            carry and alula's own class can.
        image_size: side of the square image in pixels that the processor hands over.
        extra_positions: positions in front of the patches.
        select: LLaVA's ``vision_feature_select_strategy``.
        tokens: decoder tokens per image.
    """

    patch_size: int | None
    image_size: int
    extra_positions: int
    select: Literal["default", "full"]
    tokens: int


def family(config: PreTrainedConfig) -> TowerFamily:
    """The family of a tower's configuration.

    Raises:
        HostError: a ``model_type`` that stock LLaVA cannot carry (or that nobody has tried here).
    """
    found = FAMILIES.get(config.model_type)
    if found is None:
        reason = (
            "needs patch shapes and masks beside the pixels (NaFlex), which stock LLaVA does not pass on"
            if config.model_type.startswith("siglip2")
            else "is not a vision tower that a LLaVA host can carry"
        )
        raise HostError(
            f"{config.model_type!r} {reason}",
            where="vision",
            remedy=f"use one of: {', '.join(FAMILIES)} (fixed-size SigLIP-2 checkpoints are siglip_vision_model)",
        )
    return found


def shape(config: PreTrainedConfig, image_processor: BaseImageProcessor) -> TowerShape:
    """Geometry of a tower fed by ``image_processor``; the class token is dropped, as in LLaVA, where there is one."""
    kind = family(config)
    extra = kind.extra_positions(config)
    size = processor_size(image_processor)
    if isinstance(config, CustomTowerConfig):
        return TowerShape(config.patch_size, size, extra, "full", config.tokens)
    patch = _side(config.patch_size, "patch_size")
    if size < patch:
        raise HostError(f"images of {size} px are smaller than one patch of {patch} px", where="vision")
    tokens = (size // patch) ** 2 + extra
    return TowerShape(patch, size, extra, "default" if extra else "full", tokens - 1 if extra else tokens)


def fit_image_processor(config: PreTrainedConfig, loaded: BaseImageProcessor | None) -> BaseImageProcessor:
    """The image processor for a tower: the one it came with, or its family's default; sized as the tower demands.

    A tower without interpolated positions accepts exactly ``config.image_size``; a processor that says otherwise is
    corrected. The PIL backend is used, so that torchvision is never needed.

    Raises:
        HostError: a tower of one's own without an image processor.
    """
    kind = family(config)
    if loaded is None and kind.image_processor is None:
        raise HostError(
            "a tower of one's own comes without preprocessing", where="vision", remedy="pass its image_processor="
        )
    processor: Any = kind.image_processor() if loaded is None and kind.image_processor else loaded
    wanted = _side(config.image_size, "image_size")
    if loaded is None or (not kind.any_size and _size_or_none(processor) != wanted):
        processor = copy.deepcopy(processor)  # it may be the user's own
        size = {"height": wanted, "width": wanted}
        if getattr(processor, "do_center_crop", None):
            processor.size, processor.crop_size = {"shortest_edge": wanted}, size
        else:
            processor.size = size
    return processor


def processor_size(processor: BaseImageProcessor) -> int:
    """Side in pixels of the square images ``processor`` emits.

    Raises:
        HostError: it does not emit squares of one size.
    """
    size = _size_or_none(processor)
    if size is None:
        raise HostError(
            f"{type(processor).__name__} does not emit square images of one size",
            where="vision",
            remedy="pass image_processor= with a fixed square size or crop size",
        )
    return size


def _size_or_none(processor: Any) -> int | None:
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    if size is None:
        return None
    height, width = size.get("height"), size.get("width")
    return int(height) if height is not None and height == width else None


def _side(value: int | list[int] | tuple[int, ...], name: str) -> int:
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise HostError(f"{name} {tuple(value)} is not square", where="vision")
    return int(value[0])
