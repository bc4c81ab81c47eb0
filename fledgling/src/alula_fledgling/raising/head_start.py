"""A head start: some heads of a fresh model look back, others find what stood beside a word, and values are copied.

To answer from what was just read, a decoder needs two heads in a row: one that tells each token what stood before it,
one that finds the token by that (induction heads, Olsson et al., 2022). Neither is of use without the other, so from
random weights they take thousands of steps to form; on two cores that is the whole schooling. Both are given here, in
the manner of mimetic initialisation (Trockman and Kolter, 2023). Nothing is frozen: the school may change all of it.

- Looking back (layers 0 and 1): every embedding gets the same entry in its first coordinate, so a query and a key can
  hold a constant vector. The rotation of RoPE then makes their score depend on nothing but distance; turning the query
  by d positions puts its maximum at distance d. What is seen is written to a subspace of its own.
- Finding (layers 1 to 3): a query is the token's own embedding, a key what one of those heads wrote, or the embedding
  too, both through one random projection. Only the slow rotations of RoPE are used, so that distance hardly matters.
  Two layers find what follows a word, so that what was found can be looked up in turn.
- Copying (layers 2 and up): outputs undo the value projections, so that a token attended to becomes more likely. The
  embeddings are tied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Qwen3ForCausalLM

_PLAN: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...] = (
    (("back", (1, 2)),),
    (("back", (3, 4)), ("same", ())),
    (("after", (1, 2)), ("after", (3, 4))),
    (("after", (1, 2)), ("after", (3, 4))),
)
"""Per layer and key head: its query heads look back so far; or its first one finds the tokens that stand so far after
the query's token; or finds the same token."""

_PAIRS = 6  # of RoPE's fastest rotations that carry the constant vector: slower ones cannot tell neighbours apart
_SLOW = 0.4  # share of the rotations that are too fast for matching tokens
_SPREAD = 0.08  # of embedding entries
_SHARED_ENTRY = 0.4
_STRENGTH = 0.5  # of the constant vector in the projections, against entries of 0.02
_SHARPNESS = 2.0  # of the query and key norms in the rotations used
_QUIET = 0.3  # factor on everything else in those heads
_WRITTEN = 0.1  # gain of what looking back writes: about as long as an embedding
_COPIED = (0.2, 0.05)  # gain of copying, of the heads that find and of the others


class _Slot(NamedTuple):
    """Where a head that looks back writes: ``written @ read`` (d, d) maps the token seen to its trace in the stream."""

    read: torch.Tensor
    written: torch.Tensor


class _Heads(NamedTuple):
    """An attention's weights by head; views, so writing to them changes the model."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    outputs: torch.Tensor


@torch.no_grad()
def give_head_start(model: Qwen3ForCausalLM, seed: int = 0) -> None:
    """Set the weights of a fresh ``model`` as described above, in place."""
    generator = torch.Generator().manual_seed(seed)
    embeddings: torch.Tensor = model.model.embed_tokens.weight
    embeddings.copy_(torch.randn(embeddings.shape, generator=generator) * _SPREAD)
    embeddings[:, 0] = _SHARED_ENTRY
    config: Any = model.config
    slots: dict[int, _Slot] = {}
    for place, layer in enumerate(model.model.layers):
        for key in range(config.num_key_value_heads):
            _copy(_heads(config, layer.self_attn), key, generator)
        for key, (task, distances) in enumerate(_PLAN[place] if place < len(_PLAN) else ()):
            if task == "back":
                slots.update(_look_back(config, layer.self_attn, key, distances, generator))
            else:
                _find(config, layer.self_attn, key, [slots[distance] for distance in distances], generator)


def _heads(config: Any, attention: nn.Module) -> _Heads:
    queries, keys, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    weights: Any = attention
    return _Heads(
        weights.q_proj.weight.view(queries, width, -1),
        weights.k_proj.weight.view(keys, width, -1),
        weights.v_proj.weight.view(keys, width, -1),
        weights.o_proj.weight.view(-1, queries, width),
    )


def _copy(heads: _Heads, key: int, generator: torch.Generator) -> None:
    """Let the query heads of a key head add a little of what they attend to."""
    width, hidden = heads.values[key].shape
    heads.values[key] = _orthogonal(width, hidden, generator)
    heads.values[key, :, 0] = 0.0  # the shared entry says nothing
    per_key = len(heads.queries) // len(heads.keys)
    heads.outputs[:, key * per_key : (key + 1) * per_key] = heads.values[key].T[:, None] * _COPIED[1]


def _look_back(
    config: Any, attention: Any, key: int, distances: tuple[int, ...], generator: torch.Generator
) -> dict[int, _Slot]:
    """Let the query heads of a key head attend to fixed distances back."""
    heads, half = _heads(config, attention), config.head_dim // 2
    rotation = config.rope_parameters["rope_theta"] ** (-torch.arange(_PAIRS) / half)
    first, second = torch.arange(_PAIRS), torch.arange(_PAIRS) + half
    heads.keys[key] *= _QUIET
    heads.keys[key, first, 0] = _STRENGTH
    heads.keys[key, second, 0] = 0.0
    slots = {}
    for head, distance in enumerate(distances, start=key * len(heads.queries) // len(heads.keys)):
        heads.queries[head] *= _QUIET
        heads.queries[head, first, 0] = _STRENGTH * torch.cos(distance * rotation)
        heads.queries[head, second, 0] = -_STRENGTH * torch.sin(distance * rotation)
        written = _orthogonal(config.hidden_size, config.head_dim, generator)
        written[0] = 0.0
        heads.outputs[:, head] = written * _WRITTEN
        slots[distance] = _Slot(heads.values[key].clone(), written)
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight[first] = _SHARPNESS
        norm.weight[second] = _SHARPNESS
    return slots


def _find(config: Any, attention: nn.Module, key: int, slots: list[_Slot], generator: torch.Generator) -> None:
    """Let the first query head of a key head match its own token with what the keys' tokens saw; or, without, are."""
    heads, match = _heads(config, attention), _matching(config, generator)
    head = key * len(heads.queries) // len(heads.keys)
    if slots:
        read = slots[0].read
        heads.keys[key] = match @ sum(slot.read.T @ slot.written.T for slot in slots)
        heads.queries[head] = match @ read.T @ read
    else:
        heads.keys[key] = heads.queries[head] = match
    heads.outputs[:, head] = heads.values[key].T * _COPIED[0]


def _matching(config: Any, generator: torch.Generator) -> torch.Tensor:
    """A random projection (head_dim, d) into the slow rotations."""
    half = config.head_dim // 2
    slow = torch.arange(int(half * _SLOW), half)
    slow = torch.cat([slow, slow + half])
    match = torch.zeros(config.head_dim, config.hidden_size)
    match[slow, 1:] = _orthogonal(len(slow), config.hidden_size - 1, generator)
    return match


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """A random matrix whose singular values are all 1."""
    basis, _ = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))
    return basis if rows >= columns else basis.T
