"""Attention of packed batches: samples side by side in one row, of which none sees another.

All that a decoder does token by token is done to the tokens that there are, and to no padding. For attention alone they
are laid out sample by sample again, causal and padded behind, where nothing attends to padding. So no mask is made, and
what one sample computes is what it computes beside others in a padded batch.

Shapes: B samples, L tokens of the longest, T tokens of the row, H heads, D head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alula.anatomy import HostParts
from alula.errors import HostError
from alula.seam.attention import set_attention

PACKED = "alula_packed"
"""keyword of a forward that says where tokens stand; name of the attention that reads it"""


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    alula_packed: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `sdpa_attention_forward` computes it, of a packed row if it is one.

    Args:
        query, key, value: (1, H, T, D) of a packed row.
        attention_mask: of other batches; what stands there of a packed one is not read.
        alula_packed: ``members`` (B, L) int64, the place in the row of each sample's tokens, any behind its last; and
            ``places`` (T,) int64, where each token of the row stands in (B x L) of these.

    Returns:
        (1, T, H, D) output and None for the weights.
    """
    if alula_packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    members, places = alula_packed["members"], alula_packed["places"]
    query, key, value = (_spread(each, members) for each in (query, key, value))
    output, _ = sdpa_attention_forward(
        module, query, key, value, None, scaling=scaling, dropout=dropout, is_causal=True
    )
    heads = output.shape[2:]
    return F.embedding(places, output.flatten(2).flatten(0, 1)).unflatten(-1, heads)[None], None


def _spread(row: Tensor, members: Tensor) -> Tensor:
    """(1, H, T, D) -> (B, H, L, D). An embedding's gradient adds up in the same order each time, also on a GPU."""
    tokens = row[0].transpose(0, 1)
    return F.embedding(members, tokens.flatten(1)).unflatten(-1, tokens.shape[1:]).transpose(1, 2)


AttentionInterface.register(PACKED, packed_attention_forward)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def check_packs(parts: HostParts) -> None:
    """Refuse a host that says of itself that its tokens meet in more, or in less, than plain causal attention.

    Raises:
        HostError: by what it is.
    """
    config = parts.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if hasattr(parts.backbone, "get_rope_index"):
        problem = "counts positions in three directions"
    elif kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        problem = "has layers of other than full attention"
    elif config.model_type in _TWO_WAY or parts.host.config.model_type in _TWO_WAY:
        problem = "lets the tokens of an image attend to one another in both directions"
    elif not getattr(parts.decoder, "_supports_attention_backend", False):
        problem = "does not let its attention be exchanged"
    elif config._attn_implementation not in (None, "sdpa", PACKED):
        problem = f"runs the attention implementation {config._attn_implementation!r}, not SDPA"
    else:
        return
    raise _refused(parts, problem)


@contextlib.contextmanager
def packs(model: nn.Module) -> Iterator[None]:
    """Within the block the decoder of ``model`` takes packed rows (and other batches as before).

    Raises:
        HostError: see `check_packs`; or what it makes of a small packed row is not what it makes of the same samples
            one below the other.
    """
    parts = HostParts.of(model)
    check_packs(parts)
    before = parts.config._attn_implementation
    set_attention(parts, PACKED)
    try:
        _hold(parts)
        yield
    finally:
        set_attention(parts, before)


def _hold(parts: HostParts) -> None:
    """Refuse a decoder that drops the layout on the way, or lets samples of a row meet by other means."""
    device = next(parts.embeddings.parameters()).device
    first, second = [1, 2, 3], [1, 4]  # they begin alike
    padded, mask = (
        torch.tensor([first, [*second, 0]], device=device),
        torch.tensor([[1, 1, 1], [1, 1, 0]], device=device),
    )
    row, positions = torch.tensor([[*first, second[1]]], device=device), torch.tensor([[0, 1, 2, 1]], device=device)
    layout = {
        "members": torch.tensor([[0, 1, 2], [0, 3, 0]], device=device),
        "places": torch.tensor([0, 1, 2, 4], device=device),
    }
    training = parts.decoder.training
    parts.decoder.eval()
    try:
        with torch.no_grad():
            told: Any = parts.decoder(
                input_ids=row, position_ids=positions, **{PACKED: layout, **blank_mask(row)}, use_cache=False
            )
            meant: Any = parts.decoder(input_ids=padded, attention_mask=mask, use_cache=False)
    finally:
        parts.decoder.train(training)
    got, wanted = told.last_hidden_state[0].float(), meant.last_hidden_state.flatten(0, 1)[layout["places"]].float()
    if not torch.allclose(got, wanted, rtol=0, atol=float(_CLOSE * wanted.abs().max())):  # a NaN is not close
        raise _refused(parts, "makes something else of samples that stand side by side in a row")


def blank_mask(row: Tensor) -> dict[str, Tensor]:
    """The mask beside a packed row: one that is taken as it is, and lets nothing pass to whoever would read it."""
    return {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=row.device)}


def _refused(parts: HostParts, problem: str) -> HostError:
    return HostError(
        f"{type(parts.host).__name__} {problem}", where="packing", remedy="leave packing out for this host"
    )


_CLOSE = 1e-2
"""of the largest number: what rounding in half precision may make of it, and less than another token would"""
_TWO_WAY = ("gemma3", "gemma3_text", "shieldgemma2", "paligemma")
