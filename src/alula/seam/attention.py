"""The attention function registered with transformers as ``"alula"``, and its mask function.

It *is* the stock SDPA path, with one addition: sums of attention over sets of keys. Such sums are linear in the
attention rows, so extra value columns give them exactly in the same fused pass: the caller names a value per key (an
indicator of a set, a router's weight), the columns ride behind the real values, q and k are zero-padded to the widened
value width (equal widths keep the fused kernels usable), and nobody materialises (S, S).

Shapes: B batch, H query heads, G key/value heads, Q query rows, K key rows, D head width, C extra columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alula.anatomy import Anatomy
from alula.errors import HostError

ATTENTION = "alula"
_QUERY_CHUNK = 512
_FEW_QUERIES = 8


class KeyColumns(Protocol):
    """Something that wants sums of attention over keys of a layer, and receives them in the same forward.

    An asker whose attribute `aside` is true gets its sums from a pass of its own, without gradients or dropout, which
    leaves every bit of the forward as it is: for probes. The others share the forward's own pass and its gradients.
    """

    def key_columns(self, forward: Any, layer: int) -> Tensor | None:
        """(B, K_all, C) values per key over all rows seen so far, or None when nothing is wanted this time."""

    def receive(self, forward: Any, layer: int, sums: Tensor) -> None:
        """Take the (B, Q, H, C) sums of the columns, weighted by attention."""


class LearnerColumns(KeyColumns, Protocol):
    """An asker that also wants sums of the attention of grafts' own learners. They come after the main branch's."""

    def learner_columns(self, forward: Any, layer: int) -> Tensor | None:
        """(B, K_all, C) values per key, or None when nothing is wanted this time."""

    def receive_learner(self, forward: Any, layer: int, weight: Tensor, sums: Tensor) -> None:
        """Take the (B, Q, H, C) sums of one learner's attention (0 where it is silent), and the weight, broadcastable
        to (B, Q, 1), with which its output joins the stream."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    alula: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `sdpa_attention_forward` computes it, plus the sums asked for through `alula`.

    Args:
        query: (B, H, Q, D); key, value: (B, G, K, D).
        attention_mask: None (causal when Q > 1), boolean (True = attend) or additive, broadcastable to (B, H, Q, K).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma-2); stock SDPA refuses it.
        alula: the `Forward` of this call, when a seam is installed.

    Returns:
        (B, Q, H, D) output and None for the weights.
    """
    run = sdpa_attention_forward if softcap is None else _softcap_attention
    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    if softcap is not None:
        options["softcap"] = softcap
    # vision towers of some hosts hand our keyword to attention modules that have no layer index
    asked = (
        alula.columns(module, query.shape[2], key.shape[2])
        if alula is not None and hasattr(module, "layer_idx")
        else []
    )
    aside = [(asker, columns) for asker, columns in asked if getattr(asker, "aside", False)]
    if aside:
        _answer_aside(run, module, query, key, attention_mask, options, alula, aside)
    asked = [(asker, columns) for asker, columns in asked if not getattr(asker, "aside", False)]
    if not asked:
        return run(module, query, key, value, attention_mask, **options)

    values = torch.cat([_align(columns, key.shape[2]) for _, columns in asked], dim=-1).to(value.dtype)
    options["scaling"] = query.shape[-1] ** -0.5 if scaling is None else scaling
    split = alula.split([asker for asker, _ in asked])
    if split is None:
        output, sums = _with_sums(run, module, query, key, value, attention_mask, columns=values, options=options)
    else:
        asking, silent_ones = split
        chosen = _samples(asking, query, key, value, attention_mask)
        spoken, sums = _with_sums(run, module, *chosen, columns=values[asking], options=options)
        silent, _ = run(module, *_samples(silent_ones, query, key, value, attention_mask), **options)
        back = torch.cat(split).argsort()
        output = torch.cat([spoken, silent])[back]
        sums = torch.cat([sums, sums.new_zeros(len(silent), *sums.shape[1:])])[back]
    _deliver(asked, sums, alula, module)
    return output, None


@torch.no_grad()
def _answer_aside(
    run: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    alula: Any,
    asked: list[tuple[KeyColumns, Tensor]],
) -> None:
    """Give askers their sums from passes whose values are nothing but columns, as many at a time as a head is wide."""
    width = query.shape[-1]
    wanted = torch.cat([_align(columns, key.shape[2]) for _, columns in asked], dim=-1).to(query)
    sums = []
    for columns in wanted.split(width, dim=-1):
        padded = F.pad(columns, (0, width - columns.shape[-1]))[:, None].expand(-1, key.shape[1], -1, -1)
        output, _ = run(module, query, key, padded, mask, **{**options, "dropout": 0.0})
        sums.append(output[..., : columns.shape[-1]])
    _deliver(asked, torch.cat(sums, dim=-1), alula, module)


def _deliver(asked: list[tuple[KeyColumns, Tensor]], sums: Tensor, alula: Any, module: nn.Module) -> None:
    """Hand every asker its share of (B, Q, H, all columns)."""
    start = 0
    for asker, wanted in asked:
        asker.receive(alula, module.layer_idx, sums[..., start : start + wanted.shape[-1]])  # type: ignore[arg-type]
        start += wanted.shape[-1]


def _with_sums(
    run: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    columns: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(B, Q, H, D) output of attention and (B, Q, H, C') sums of the (B, K, C) columns, C' >= C."""
    plain = options.get("softcap") is None and not options.get("dropout")
    if plain and query.shape[2] <= _FEW_QUERIES and (mask is not None or query.shape[2] == 1):
        return _few_with_sums(query, key, value, mask, columns=columns, scaling=options["scaling"])
    width = value.shape[-1]
    padding = -(width + columns.shape[-1]) % 8 + columns.shape[-1]
    columns = F.pad(columns, (0, padding - columns.shape[-1]))
    widened = torch.cat([value, columns[:, None].expand(-1, value.shape[1], -1, -1)], dim=-1)
    output, _ = run(module, F.pad(query, (0, padding)), F.pad(key, (0, padding)), widened, mask, **options)
    output, sums = output.split([width, padding], dim=-1)
    return output.contiguous(), sums


def _few_with_sums(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, columns: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """`_with_sums` for few queries, whose weights are cheaper to write out than keys and values are to widen."""
    batch, heads, queries, _ = query.shape
    groups = key.shape[1]
    grouped = (query * scaling).reshape(batch, groups, -1, query.shape[-1])
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, queries, -1)
    if mask is not None:
        keys = mask[..., : scores.shape[-1]]
        barred = scores.masked_fill(~keys, torch.finfo(scores.dtype).min) if keys.dtype == torch.bool else None
        scores = scores + keys if barred is None else barred
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    output = (weights.view(*grouped.shape[:3], -1) @ value).view(batch, heads, queries, -1)
    sums = weights.flatten(1, 2) @ columns
    return output.transpose(1, 2).contiguous(), sums.view(batch, heads, queries, -1).transpose(1, 2)


def _samples(pick: Tensor, *tensors: Tensor | None) -> list[Any]:
    """The chosen samples of each tensor; what is None or broadcast over samples stays as it is."""
    return [t if t is None or len(t) == 1 else t.index_select(0, pick) for t in tensors]


def _align(columns: Tensor, keys: int) -> Tensor:
    """Fit (B, K_all, C) to the keys attention holds: a sliding cache keeps the last, a static one has a blank tail."""
    have = columns.shape[1]
    return columns[:, have - keys :] if have >= keys else F.pad(columns, (0, 0, 0, keys - have))


def _softcap_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Soft-capped attention in float32 softmax, a block of queries at a time so that (Q, K) never exists whole."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    queries, keys = query.shape[2], key.shape[2]
    causal = attention_mask is None and queries > 1
    outputs = []
    for start in range(0, queries, _QUERY_CHUNK):
        stop = min(start + _QUERY_CHUNK, queries)
        logits = softcap * torch.tanh(query[:, :, start:stop] @ key.transpose(-1, -2) * scaling / softcap)
        if causal:
            at = torch.arange(start, stop, device=query.device)[:, None]
            allowed = torch.arange(keys, device=query.device)[None, :] <= at
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        elif attention_mask is not None:
            mask = attention_mask[..., start:stop, :] if attention_mask.shape[-2] > 1 else attention_mask
            if mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
            else:
                logits = logits + mask
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
        outputs.append(F.dropout(weights, p=dropout, training=module.training) @ value)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention_forward)
# without its own entry, transformers would hand decoders a mask of None and padding would be ignored
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def set_attention(anatomy: Anatomy, name: str) -> str:
    """Set the decoder's attention implementation (the towers keep theirs) and return the previous name.

    Raises:
        HostError: the decoder did not take it.
    """
    previous = anatomy.config._attn_implementation
    if previous != name:
        host: Any = anatomy.host
        composite = host.config is not anatomy.config
        host.set_attn_implementation({"text_config": name} if composite else name)
        if anatomy.config._attn_implementation != name:
            raise HostError(f"{type(host).__name__} refused the attention implementation {name!r}")
    return previous


@contextmanager
def use_attention(model: nn.Module, name: str = ATTENTION) -> Iterator[None]:
    """Run the decoder of `model` with another attention implementation, then restore the one it had."""
    anatomy = Anatomy.of(model)
    previous = set_attention(anatomy, name)
    try:
        yield
    finally:
        set_attention(anatomy, previous)
