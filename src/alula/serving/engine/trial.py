"""A trial at loading: two prompts of different lengths continued as one batch, held to each computed alone.

Classes count positions, mask padding and cache keys in ways of their own. What is not seen to be computed alike is not
assumed to be.

Shapes: V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alula.anatomy import unwrap
from alula.seam import joining
from alula.seam.dialect import cache_keyword, logits_of

_LENGTHS = (7, 4)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the logits' norm: sums of a batch round otherwise
_HALF = 0.05


@torch.inference_mode()
def is_alike(model: Any, ids: list[int]) -> bool:
    """Whether a model answers prompts of text in a batch as it does alone.

    Args:
        model: a host whose caches can be joined.
        ids: tokens to try it with, at least eight.
    """
    host = unwrap(model)
    device, name = next(host.parameters()).device, cache_keyword()
    tokens = torch.tensor(ids, device=device)
    wanted, caches = [], []
    for length in _LENGTHS:
        prompt, cache = tokens[None, :length], joining.empty_cache(model)
        host(input_ids=prompt, **{name: cache}, use_cache=True)
        caches.append(cache)
        wanted.append(_last(host, input_ids=tokens[None, : length + 1], use_cache=False))
    longest = max(_LENGTHS)
    places = torch.arange(longest + 1, device=device)
    lengths = torch.tensor(_LENGTHS, device=device)
    positions, sections = lengths[:, None], joining.position_sections(model)
    found = _last(
        host,
        input_ids=tokens[lengths][:, None],
        attention_mask=(places >= longest - lengths[:, None]).to(torch.int64),
        position_ids=positions if sections is None else positions.expand(sections, *positions.shape),
        use_cache=True,
        **{name: joining.joined(caches)},
    )
    alone = torch.cat(wanted)
    tolerance = _TOLERANCE.get(next(host.parameters()).dtype, _HALF)
    return bool(((found - alone).norm(dim=-1) <= tolerance * alone.norm(dim=-1)).all())


def _last(host: Any, **given: Any) -> Tensor:
    """(B, V) the logits behind the last tokens."""
    return logits_of(host(**given), where=type(host).__name__)[:, -1].float()
