"""What some classes of hosts need of their callers, checked: without it they compute something else and say nothing.

Each was seen in transformers 5.23 and 5.24. B samples, P cached and S new tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from alula.anatomy import Anatomy
from alula.errors import SeamError, UsageError
from alula.tokens import TokenMap

# hosts in which the tokens of an image attend to one another in both directions, by way of ``token_type_ids``
_TWO_WAY = ("gemma3", "shieldgemma2")


class Offset:
    """How far M-RoPE's positions run from plain ones after a prompt: what `rope_deltas` was when a cache was filled.

    It is compared by identity, so a copied cache keeps the one it came with.
    """

    def __init__(self, deltas: Tensor) -> None:
        self.deltas = deltas

    def __deepcopy__(self, memo: dict[int, Any]) -> Offset:
        return self


def current_offset(anatomy: Anatomy) -> Offset | None:
    """The offset that the host would go on with now; None where its class keeps none or has read no image yet."""
    deltas = getattr(anatomy.backbone, "rope_deltas", None)
    return None if deltas is None else Offset(deltas)


def check_cache(anatomy: Anatomy, cache: Cache | None) -> None:
    """Refuse a cache with which the host's attention computes something else.

    A cache of fixed size says how full it is by a tensor that it then advances in place, and masks of flex attention
    are made from that tensor after it was advanced: queries attend to a blank.

    Raises:
        UsageError: with the remedy.
    """
    if getattr(cache, "is_compileable", False) and "flex_attention" in anatomy.config._attn_implementation:
        raise UsageError(
            "a cache of fixed size under flex attention: every token after the first would attend to a blank",
            remedy='run the decoder with SDPA, model.set_attn_implementation("sdpa"), or with a cache that grows',
        )


def check(
    anatomy: Anatomy, given: Mapping[str, Any], tokens: TokenMap, past: TokenMap | None, offset: Offset | None
) -> None:
    """Refuse a forward that its host would compute with other positions or another mask than meant.

    Args:
        given: what the module below the head was given, by name.
        tokens, past: maps of the (B, S) new and (B, P) cached tokens.
        offset: the host's when the cache was filled.

    Raises:
        UsageError: something is missing, with the remedy. SeamError: another prompt came between.
    """
    if hasattr(anatomy.backbone, "get_rope_index"):
        _check_multimodal_positions(anatomy, given, tokens)
        if past is not None and offset is not None:
            _check_offset(anatomy, given, tokens, past, offset)
    if anatomy.host.config.model_type in _TWO_WAY:
        _check_two_way(anatomy, given, tokens, past)


def _check_multimodal_positions(anatomy: Anatomy, given: Mapping[str, Any], tokens: TokenMap) -> None:
    name = type(anatomy.host).__name__
    if given.get("position_ids") is not None:
        return
    media = [key for key in ("image_grid_thw", "video_grid_thw") if given.get(key) is not None]
    if media and given.get("mm_token_type_ids") is None and _counts_by_types(anatomy.backbone):
        raise UsageError(
            f"{name} was given {media[0]} without mm_token_type_ids, and would count its image tokens like text",
            remedy="pass all that the processor returns, mm_token_type_ids included (or position_ids)",
        )
    if given.get("input_ids") is None and bool(tokens.is_perceptual.any()):
        raise UsageError(
            f"{name} counts positions by input_ids, and would count the image tokens of inputs_embeds like text",
            remedy="pass position_ids (the model below the head makes them: get_rope_index), or input_ids",
        )
    left = getattr(anatomy.backbone, "rope_deltas", None)
    if given.get("input_ids") is None and left is not None and not media and bool(left.any()):
        raise UsageError(
            f"{name} would shift the positions of inputs_embeds by what an earlier prompt with an image left behind",
            remedy="pass position_ids, or set rope_deltas of the model below the head to None first",
        )


def _counts_by_types(backbone: Any) -> bool:
    """Whether a class with M-RoPE asks for ``mm_token_type_ids``; Qwen-Omni's thinkers count by `input_ids` alone."""
    return "mm_token_type_ids" in inspect.signature(backbone.get_rope_index).parameters


def _check_offset(anatomy: Anatomy, given: Mapping[str, Any], tokens: TokenMap, past: TokenMap, offset: Offset) -> None:
    """These classes keep the offset of one prompt, on the model; a cache of another one goes on with it."""
    now = anatomy.backbone.rope_deltas
    if now is offset.deltas or given.get("image_grid_thw") is not None or given.get("video_grid_thw") is not None:
        return
    positions = given.get("position_ids")
    deltas = offset.deltas.to(tokens.device).view(-1)
    # of a cache from which samples were taken it is not known whose offset is whose
    if positions is not None and len(past.position) % len(deltas) == 0:
        first = past.position.max(dim=1).values + 1 + deltas.repeat_interleave(len(past.position) // len(deltas))
        valid = tokens.valid.to(torch.int64)
        reached = positions[-1].gather(1, valid.argmax(dim=1, keepdim=True)).squeeze(1)
        if bool(((reached == first) | (valid.sum(dim=1) == 0)).all()):
            return
    raise SeamError(
        f"{type(anatomy.host).__name__} has read another prompt since this cache was filled, and would go on with that "
        "one's positions: it keeps them on the model",
        remedy="finish one prompt before the next, use a copy of the model per thread, or pass position_ids",
    )


def _check_two_way(anatomy: Anatomy, given: Mapping[str, Any], tokens: TokenMap, past: TokenMap | None) -> None:
    if not isinstance(given.get("attention_mask"), Tensor | None):
        return  # masks made already, by `generate`
    types, known = given.get("token_type_ids"), 0 if past is None else past.shape[1]
    whole = known + tokens.shape[1]
    if (given.get("pixel_values") is not None) and (types is None or types.shape[1] != whole):
        got = "none" if types is None else f"those of {types.shape[1]}"
        raise UsageError(
            f"{type(anatomy.host).__name__} needs token_type_ids of all {whole} tokens, cached ones included, for an "
            f"image to be seen as a whole, and was given {got}",
            remedy="pass token_type_ids of the whole dialogue: (batch, cached + new tokens)",
        )
