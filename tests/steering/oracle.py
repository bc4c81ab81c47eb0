"""Prompt Highlighter written out: two whole forwards per token, attention in float64 with a mask for every pair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from alula.anatomy import Anatomy
from tests import zoo

ADDED: dict[str, Tensor] = {}


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **options: Any
) -> Any:
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if options.get("softcap") is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores + ADDED["bias"].double()[:, None, None, :]
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask is None else mask
    scores = scores.masked_fill(~allowed, -1e9)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register("highlighted", _attention)
AttentionMaskInterface.register("highlighted", sdpa_mask)


@contextmanager
def _in_float64(model: Any) -> Iterator[None]:
    """Attention of the decoder as above, embeddings of the first layer as they are told to be."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    zoo.set_attention(model, "highlighted")
    try:
        yield
    finally:
        zoo.set_attention(model, before)


def run(model: Any, inputs: dict[str, Tensor], bias: Tensor, factor: Tensor | None = None) -> Tensor:
    """(B, S, V) logits with (B, S) added to all logits of attention, embeddings multiplied by (B, S)."""
    ADDED["bias"] = bias
    layer = Anatomy.of(model).layers[0]

    def scale(layer: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] * factor[..., None], *args[1:]), kwargs

    hook = None if factor is None else layer.register_forward_pre_hook(scale, with_kwargs=True)
    try:
        with torch.no_grad(), _in_float64(model):
            return model(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()


def branches(
    model: Any, inputs: dict[str, Tensor], marks: Tensor, *, strength: float, embedding: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the normal and of the unconditional branch, (B, S, V) each."""
    sign = -1 if strength < 0 else 1
    factor = 1 + (embedding - 1) * (sign * marks).clamp(0, 1)
    one = run(model, inputs, strength * marks)
    other = run(model, inputs, -(strength + sign * 2) * marks, factor)
    return torch.log_softmax(one, dim=-1), torch.log_softmax(other, dim=-1)


def scores(model: Any, inputs: dict[str, Tensor], marks: Tensor, *, strength: float, guidance: float) -> Tensor:
    """(B, S, V) guided scores."""
    one, other = branches(model, inputs, marks, strength=strength)
    return guidance * one - (guidance - 1) * other


def extended(inputs: dict[str, Tensor], marks: Tensor, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same with (B, n) more tokens behind."""
    more = dict(inputs)
    more["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            more[name] = torch.cat([inputs[name], torch.full_like(tokens, fill)], dim=1)
    return more, torch.nn.functional.pad(marks, (0, tokens.shape[1]))


def greedy(
    model: Any, inputs: dict[str, Tensor], marks: Tensor, steps: int, *, strength: float, guidance: float
) -> Tensor:
    """(B, steps) of the tokens of the highest scores, without caches; prompts padded on the left."""
    found = inputs["input_ids"][:, :0]
    for _ in range(steps):
        more, known = extended(inputs, marks, found)
        last = scores(model, more, known, strength=strength, guidance=guidance)[:, -1:]
        suppressed = model.generation_config.suppress_tokens
        if suppressed:
            last[..., suppressed] = float("-inf")
        found = torch.cat([found, last.argmax(dim=-1)], dim=1)
    return found
