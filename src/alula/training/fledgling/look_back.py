"""A start that looks back: some heads of a fresh model attend one to four tokens back.

To answer from what was just read, a decoder needs two heads in a row: one that tells each token what stood before it,
one that finds the token by that (induction heads, Olsson et al., 2022). Neither is of use without the other, so from
random weights they take thousands of steps to form; on two cores that is the whole schooling. Giving the first kind at
the start, in the manner of mimetic initialisation (Trockman and Kolter, 2023), lets the second form within a hundred
steps. Nothing is frozen: the school may change all of it.

How: every embedding gets the same entry in its first coordinate, so each query and key can hold a constant vector. The
rotation of RoPE then makes the score of such a pair depend on nothing but distance; turning the query by d positions
puts its maximum at distance d.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3ForCausalLM

_DISTANCES = ((1, 2), (3, 4))
"""Per layer, from the first on: how far the query heads of its first key head look back."""

_PAIRS = 6  # of RoPE's fastest rotations that carry the constant vector: slower ones cannot tell neighbours apart
_SHARED_ENTRY = 0.1  # several times the usual embedding entry
_STRENGTH = 0.5  # of the constant vector in the projections, against entries of 0.02
_SHARPNESS = 2.0  # of the query and key norms in the rotations used
_QUIET = 0.3  # factor on everything else in those heads
_LOUD = 3.0  # factor on their values, so that what is seen stands out from the rest


@torch.no_grad()
def look_back(model: Qwen3ForCausalLM) -> None:
    """Let the heads of the first key-value group in the first layers attend to fixed distances back; in place."""
    config: Any = model.config
    width, half = config.head_dim, config.head_dim // 2
    rotation = config.rope_parameters["rope_theta"] ** (-torch.arange(_PAIRS) * 2.0 / width)
    first, second = torch.arange(_PAIRS), torch.arange(_PAIRS) + half
    model.model.embed_tokens.weight[:, 0] = _SHARED_ENTRY
    for layer, distances in zip(model.model.layers, _DISTANCES, strict=False):
        attention = layer.self_attn
        queries = attention.q_proj.weight.view(config.num_attention_heads, width, -1)
        keys = attention.k_proj.weight.view(config.num_key_value_heads, width, -1)
        values = attention.v_proj.weight.view(config.num_key_value_heads, width, -1)
        keys[0] *= _QUIET
        keys[0, first, 0] = _STRENGTH
        keys[0, second, 0] = 0.0
        for head, distance in enumerate(distances):
            queries[head] *= _QUIET
            queries[head, first, 0] = _STRENGTH * torch.cos(distance * rotation)
            queries[head, second, 0] = -_STRENGTH * torch.sin(distance * rotation)
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight[first] = _SHARPNESS
            norm.weight[second] = _SHARPNESS
        values[0] *= _LOUD
        values[0, :, 0] = 0.0  # the shared entry says nothing
