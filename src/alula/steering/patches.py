"""What share of every token of a medium a region covers, family by family.

Images and frames go through the processor's own code; what is known here is in which order a host's tokens come from
the pixels that it is given. Hosts whose tokens are no patches (Q-Formers, learned queries) are refused.

Shapes: N images of a sample, T tokens of theirs, H and W height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.items import Host, packed_tiles
from alula.steering.regions import Painted

Pooling = Callable[[Anatomy, Any, Tensor, Mapping[str, Any], int], Tensor]
"""(anatomy, image processor, painted pixels, what came with them, tokens) -> (T,)"""

_LEADING = 8
"""class and register tokens that may stand before an image's patches, at most"""


def shares_of_images(
    anatomy: Anatomy, processor: Any, painted: Sequence[Painted], tokens: int, **options: Any
) -> Tensor:
    """(T,) what share of each image token of a sample lies in what is painted.

    Args:
        anatomy: of the host.
        processor: of images.
        painted: of each image of the sample, (H, W) of its own size.
        tokens: how many placeholders the sample has.
        options: that the processor was called with.

    Raises:
        HostError: tokens of this host are no patches of images. UsageError: the processor makes another number of
            tokens of images of these sizes.
    """
    config = anatomy.host.config
    is_pixtral = getattr(getattr(config, "vision_config", None), "model_type", None) == "pixtral"
    way = None if is_pixtral else _WAYS.get(config.model_type)
    if way is None or not _keeps_patches(anatomy):
        raise HostError(
            f"which part of an image a token of {type(anatomy.host).__name__} holds is not known",
            remedy="highlight whole images: regions=[Whole('image')]",
        )
    pixels, told = _through(processor, painted, **options)
    shares = way(anatomy, processor, pixels, told, tokens)
    if len(shares) != tokens:
        raise UsageError(
            f"images of these sizes do not make the {tokens} image tokens of the prompt",
            remedy="give the images as the processor was given them, and images_kwargs= as it was called with",
        )
    return shares


def _through(processor: Any, painted: Sequence[Painted], **options: Any) -> tuple[Tensor, Mapping[str, Any]]:
    """The pixels that an image processor makes, scaled so that white is 1 and black 0 (padding is black), and what it
    says beside them."""
    told: Any = {}

    def run(values: Sequence[Painted]) -> Tensor:
        nonlocal told
        pictures = [Image.fromarray(np.rint(255 * each).astype(np.uint8)).convert("RGB") for each in values]
        told = processor(pictures, return_tensors="pt", **options)
        return told["pixel_values"].float()

    given, white, black = (run(each) for each in (painted, *([np.full_like(p, v) for p in painted] for v in (1, 0))))
    spread = white - black
    is_seen = spread.abs() > 1e-6
    scaled = torch.where(is_seen, (given - black) / torch.where(is_seen, spread, 1), 0)
    return scaled.clamp(0, 1), told


def _keeps_patches(anatomy: Anatomy) -> bool:
    return (getattr(anatomy.host.config, "connector", None) or {}).get("kind") != "queries"


# -- how tokens come from pixels --------------------------------------------------------------------------------------


def _one_by_one(anatomy: Anatomy, processor: Any, pixels: Tensor, told: Mapping[str, Any], tokens: int) -> Tensor:
    """Images (or crops and tiles of them) of one size, each a square of patches row by row."""
    count, each = len(pixels), tokens // max(len(pixels), 1)
    tower = anatomy.tower
    patch = getattr(getattr(tower, "config", None), "patch_size", 1)
    if patch is None:  # a tower of one's own whose tokens stand nowhere in the picture
        return pixels.new_zeros(0)
    side = pixels.shape[-1] // (patch if isinstance(patch, int) else patch[-1])
    root = math.isqrt(each)
    if each * count != tokens or not each:
        return pixels.new_zeros(0)
    leading = each - side**2
    if root**2 == each and side % root == 0:
        leading, side = 0, root
    elif not 0 <= leading <= _LEADING:
        return pixels.new_zeros(0)
    pooled = adaptive_avg_pool2d(pixels.mean(dim=1), side).flatten(1)
    return torch.nn.functional.pad(pooled, (leading, 0)).flatten()


def _by_patches(anatomy: Anatomy, processor: Any, pixels: Tensor, told: Mapping[str, Any], tokens: int) -> Tensor:
    """Rows of pixels, one per patch, those that become one token side by side."""
    return pixels.mean(dim=1).unflatten(0, (-1, processor.merge_size**2)).mean(dim=1)


def _by_tiles(anatomy: Anatomy, processor: Any, pixels: Tensor, told: Mapping[str, Any], tokens: int) -> Tensor:
    """A small image of the whole, then tiles put together, padding taken off, each line closed by a token."""
    vision = anatomy.host.config.vision_config
    side = vision.image_size // vision.patch_size
    cells = adaptive_avg_pool2d(pixels.mean(dim=2), side).flatten(2)[..., None]  # (N, tiles, patches, 1)
    packed = packed_tiles(Host(anatomy.backbone, anatomy.host.config), told, list(cells))
    return torch.cat(list(packed))[:, 0]


# -- films ------------------------------------------------------------------------------------------------------------


def shares_of_film(
    anatomy: Anatomy, processor: Any, painted: Painted, tokens: int, grid: Sequence[int] | None
) -> Tensor:
    """(T,) what share of each token of a film lies in what is painted.

    Args:
        anatomy: of the host.
        processor: of the host.
        painted: (F, H, W), frames as the processor is given them.
        tokens: how many the film has.
        grid: steps, rows and columns of patches, where the host is told them.

    Raises:
        HostError: tokens of this host are no patches of frames.
    """
    kind, config = anatomy.host.config.model_type, anatomy.host.config
    if kind == "alula" and config.frame_side:
        frames = np.rint(255 * painted).astype(np.uint8)[..., None].repeat(3, axis=-1)
        white, black = np.full_like(frames, 255), np.zeros_like(frames)
        given, most, least = (
            processor(text=[processor.video_token], videos=[each], return_tensors="pt")["pixel_values_videos"][0]
            for each in (frames, white, black)
        )
        scaled = ((given - least) / (most - least)).clamp(0, 1)
        return adaptive_avg_pool2d(scaled.mean(dim=1), config.frame_side).flatten()
    if grid is not None and kind in ("qwen2_vl", "qwen2_5_vl"):
        vision, (steps, rows, columns) = config.vision_config, grid
        merge = vision.spatial_merge_size
        found = _by_steps(torch.from_numpy(painted), rows // merge, columns // merge, steps, vision.temporal_patch_size)
        if len(found) == tokens:
            return found
    raise HostError(
        f"which part of a film a token of {type(anatomy.host).__name__} holds is not known",
        remedy="highlight whole films: regions=[Whole('video')]",
    )


def _by_steps(painted: Tensor, rows: int, columns: int, steps: int, together: int) -> Tensor:
    """Films of which nothing is cut off (Qwen-VL): each step holds some frames that follow one another.

    Args:
        painted: (F, H, W).
        rows, columns: of tokens of one step.
        steps: of the film.
        together: frames in a step, of which the last is filled up by repeating one.
    """
    count = len(painted)
    if -(-count // together) == steps:
        parts = [painted[step * together : (step + 1) * together].mean(dim=0) for step in range(steps)]
    else:  # some were taken, evenly
        parts = list(adaptive_avg_pool1d(painted.flatten(1).T, steps).T.unflatten(1, painted.shape[1:]))
    return adaptive_avg_pool2d(torch.stack(parts), (rows, columns)).flatten()


# -- sounds -----------------------------------------------------------------------------------------------------------


def edges_of_sound(anatomy: Anatomy, seconds: float, tokens: int) -> list[tuple[float, float]]:
    """From which second to which each token of a sound hears, by the strides of the tower.

    Args:
        anatomy: of the host.
        seconds: how long the sound is.
        tokens: how many it has.

    Raises:
        HostError: strides of this host are not known, or do not come to so many tokens.
    """
    kind, config = anatomy.host.config.model_type, anatomy.host.config
    if kind == "alula" and config.pool_audio:
        edges = _moments(config.audio_config, config.audio_stack)
        if len(edges) == tokens:  # `queries` are no moments
            return edges
    step = _STEPS.get(kind)
    # the last step may be cut off, or filled up, as may be a window of 30 seconds
    if step is not None and (abs(tokens * step - seconds) <= 2 * step or (tokens * step) % 30 < 1e-6):
        return [(place * step, (place + 1) * step) for place in range(tokens)]
    raise HostError(
        f"which part of a sound of {seconds:.2f} seconds each of its {tokens} tokens holds is not known in "
        f"{type(anatomy.host).__name__}",
        remedy="highlight whole sounds: regions=[Whole('audio')]",
    )


def _moments(audio: Any, stack: int) -> list[tuple[float, float]]:
    """Of towers of alula's own hosts, ``stack`` moments to a token."""
    if hasattr(audio, "time_stride"):  # AST, all frequencies together: patches of columns of 10 ms
        count = (audio.max_length - audio.patch_size) // audio.time_stride + 1
        spans = [(place * audio.time_stride, place * audio.time_stride + audio.patch_size) for place in range(count)]
    else:  # Whisper's encoder
        spans = [(2 * place, 2 * place + 2) for place in range(audio.max_source_positions)]
    return [(spans[at][0] / 100, spans[at + stack - 1][1] / 100) for at in range(0, len(spans), stack)]


# host config.model_type -> seconds of sound behind one token
_STEPS = {"qwen2_audio": 0.04, "audioflamingo3": 0.04, "voxtral": 0.08}

# host config.model_type -> how (seen in transformers 5.23.0 and 5.24.0)
_WAYS: Mapping[str, Pooling] = {
    "llava": _one_by_one,
    "vipllava": _one_by_one,
    "paligemma": _one_by_one,
    "gemma3": _one_by_one,
    "alula": _one_by_one,
    "qwen2_vl": _by_patches,
    "qwen2_5_vl": _by_patches,
    "qwen3_vl": _by_patches,
    "llava_next": _by_tiles,
    "llava_next_video": _by_tiles,
    "llava_onevision": _by_tiles,
}
