"""Caches of several prompts as one batch: how they join a running one, and how samples of it leave.

Tokens stand right-aligned, as `generate` has prompts of different lengths: what is missing on the left is padding,
which masks bar. Every kind of layer is joined in its own way; a kind that is not known here is named, and never guessed
at.

Shapes: B samples, L tokens of the longest.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from alula.anatomy import Anatomy, unwrap
from alula.seam.cache import GraftCacheLayer, TokenCache
from alula.seam.growing import GrowingLayer
from alula.seam.install import find
from alula.seam.preconditions import Offset

_PADDING = -1.0  # in all columns of a token map
_FACTS = 4  # of them


def empty_cache(model: nn.Module) -> DynamicCache:
    """A cache such as `generate` makes for a host."""
    return DynamicCache(config=unwrap(model).config.get_text_config(decoder=True))


def why_apart(model: nn.Module) -> str | None:
    """Why prompts of a host cannot be continued as one batch; None where they can."""
    host = unwrap(model)
    if host.config.is_encoder_decoder or getattr(host, "_is_stateful", False):
        return f"{type(host).__name__} keeps no cache of keys"
    strange = [layer for layer in empty_cache(model).layers if type(layer) not in _JOINED]
    if strange:
        return f"{type(host).__name__} has layers whose cache is a {type(strange[0]).__name__}, which cannot be joined"
    return None


def kind(cache: Cache) -> tuple[Any, ...] | None:
    """What two caches have to have in common to be joined; None where this one cannot be."""
    kinds: list[Any] = []
    for layer in _layers(cache):
        if type(layer) not in _JOINED:
            return None
        told = (layer.name, layer.owner_id, layer.layers) if isinstance(layer, GraftCacheLayer) else ()
        widths = (layer.keys.shape[-1], layer.values.shape[-1]) if layer.is_initialized else ()
        kinds.append((type(layer), told, widths))
    return tuple(kinds)


def joined(caches: Sequence[Cache]) -> Cache:
    """One cache of the samples of several of one `kind`, in order, each padded on the left to the longest."""
    if len(caches) == 1:
        return caches[0]
    length = max(int(cache.get_seq_length()) for cache in caches)
    return _with_layers(
        caches[0],
        [
            _JOINED[type(layers[0])](layers, length) if layers[0].is_initialized else layers[0]
            for layers in zip(*(_layers(cache) for cache in caches), strict=True)
        ],
    )


def chosen(cache: Cache, samples: Sequence[int], length: int) -> Cache:
    """A cache of some samples alone, of their last `length` tokens; it shares no memory with the one it is taken of."""
    return _with_layers(cache, [_chosen(layer, samples, length) for layer in _layers(cache)])


def apart(cache: Cache, lengths: Sequence[int]) -> list[Cache]:
    """A cache of each sample alone, of its last tokens. The one they are taken of is given up, layer by layer, so that
    there is never room for two of them."""
    layers, parts = _layers(cache), [list[Any]() for _ in lengths]
    for place, layer in enumerate(layers):
        for sample, length in enumerate(lengths):
            parts[sample].append(_chosen(layer, [sample], length))
        layers[place] = None
    return [_with_layers(cache, part) for part in parts]


def forked(cache: Cache, length: int) -> Cache:
    """A cache that begins as the first `length` tokens of another, which stays what it is whatever is added to this.

    Nothing is copied: memory is shared until one of the two grows.
    """
    cropped = _with_layers(cache, [_alike(layer) for layer in _layers(cache)])
    removed = int(cache.get_seq_length()) - length
    if removed:
        for layer in _layers(cropped):
            layer.crop(-removed)
    return cropped


def is_forkable(cache: Cache) -> bool:
    """Whether a cache can be cropped: layers with a window forget what is behind it."""
    return all(type(layer) in _JOINED and not getattr(layer, "is_sliding", False) for layer in _layers(cache))


def sample_bytes(cache: Cache, length: int) -> int:
    """Bytes that the last `length` tokens of one sample take in memory of their own, as `chosen` gives them."""
    each = [tensor for layer in _layers(cache) if layer.is_initialized for tensor in (layer.keys, layer.values)]
    return sum(math.prod(tensor.shape[1:-2]) * tensor.shape[-1] * tensor.element_size() * length for tensor in each)


def uncropped(cache: Cache) -> dict[int, Any]:
    """By place, the layers that forget what is behind their window, as they are now: what is added to the cache is not
    added to these. Nothing is copied."""
    return {place: _alike(layer) for place, layer in enumerate(_layers(cache)) if getattr(layer, "is_sliding", False)}


def take_back(cache: Cache, length: int, before: Mapping[int, Any]) -> None:
    """Take back what a forward that failed half-way left behind the first `length` tokens.

    Args:
        before: layers that cannot be cropped, as `uncropped` gave them before it.
    """
    layers = _layers(cache)
    for place, layer in enumerate(layers):
        over = int(layer.get_seq_length()) - length
        if over > 0:
            if place in before:
                layers[place] = before[place]
            else:
                layer.crop(-over)


def can_positions_be_given(model: nn.Module) -> bool:
    """Whether a host takes the positions of its tokens, each sample's own."""
    return "position_ids" in inspect.signature(type(unwrap(model)).forward).parameters


def position_sections(model: nn.Module) -> int | None:
    """In how many numbers a host goes by a token's position, as M-RoPE does; None: in one."""
    config = Anatomy.of(unwrap(model)).decoder.config
    sections = (getattr(config, "rope_parameters", None) or {}).get("mrope_section")
    return None if sections is None else len(sections)


def reads_in_pieces(model: nn.Module) -> bool:
    """Whether a prompt may be given to a host piece by piece: nothing goes by what comes behind a piece, and the host
    keeps nothing of one but the cache."""
    seam = find(model)
    has_offset = hasattr(Anatomy.of(unwrap(model)).backbone, "get_rope_index")
    return not has_offset and (seam is None or not seam.rewrites)


def forget_position_shift(model: nn.Module) -> None:
    """Have a host know of no earlier prompt (M-RoPE), as it stands before its first: one without media would leave that
    one's shift in place."""
    backbone = Anatomy.of(unwrap(model)).backbone
    if getattr(backbone, "rope_deltas", None) is not None:
        backbone.rope_deltas = None


def position_shift(model: nn.Module) -> int:
    """How far positions behind the prompt that a host read last run from plain ones (M-RoPE)."""
    deltas = getattr(Anatomy.of(unwrap(model)).backbone, "rope_deltas", None)
    return 0 if deltas is None else int(deltas.view(-1)[0])


def _layers(cache: Cache) -> list[Any]:
    """Of many kinds, which share no type that says what each has."""
    return cache.layers


def _alike(layer: Any) -> Any:
    """A layer of the same kind over the same tensors, that grows by itself."""
    one = copy.copy(layer)
    if isinstance(one, GrowingLayer):
        one._room = {}
    if isinstance(one, TokenCache):
        one.forget()
    return one


def _chosen(layer: Any, samples: Sequence[int], length: int) -> Any:
    one: Any = _alike(layer)
    if layer.is_initialized:
        index = torch.tensor(samples, device=layer.keys.device)
        held = _held(layer, length)
        one.keys, one.values = (_last(each, held).index_select(0, index) for each in (layer.keys, layer.values))
        _tell_length(one, length)
    if isinstance(layer, TokenCache) and layer.offset is not None:
        one.offset = Offset(layer.offset.deltas[list(samples)])
    return one


def _with_layers(cache: Cache, layers: list[Any]) -> Cache:
    one = copy.copy(cache)
    one.layers = layers
    return one


def _held(layer: Any, length: int) -> int:
    """How many of its last tokens a layer holds."""
    return min(length, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else length


def _tell_length(layer: Any, length: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length


def _last(tensor: Tensor, count: int) -> Tensor:
    return tensor[..., tensor.shape[-2] - count :, :]


def _side_by_side(tensors: Sequence[Tensor], length: int) -> Tensor:
    """(B, h, length, w) of tensors of fewer tokens each, zeros before them."""
    first = tensors[0]
    count = sum(len(each) for each in tensors)
    made = first.new_zeros(count, *first.shape[1:-2], length, first.shape[-1])
    start = 0
    for each in tensors:
        made[start : start + len(each), ..., length - each.shape[-2] :, :] = each
        start += len(each)
    return made


def _joined_plain(layers: Sequence[Any], length: int) -> Any:
    one, held = _alike(layers[0]), _held(layers[0], length)
    one.keys, one.values = (
        _side_by_side([_last(tensor, min(held, tensor.shape[-2])) for tensor in tensors], held)
        for tensors in ([layer.keys for layer in layers], [layer.values for layer in layers])
    )
    _tell_length(one, length)
    return one


def _joined_tokens(layers: Sequence[TokenCache], length: int) -> TokenCache:
    one: TokenCache = _joined_plain(layers, length)
    start = 0
    for layer in layers:
        count, missing = len(layer.values), length - layer.values.shape[-2]
        one.values[start : start + count, ..., :missing, :_FACTS] = _PADDING
        start += count
    known = next((layer.offset.deltas for layer in layers if layer.offset is not None), None)
    if known is not None:
        one.offset = Offset(torch.cat([_deltas(layer, known) for layer in layers]))
    return one


def _deltas(layer: TokenCache, like: Tensor) -> Tensor:
    """(samples, 1) by how much positions are off; by nothing for a prompt that was read without media."""
    if layer.offset is None:
        return like.new_zeros(len(layer.values), *like.shape[1:])
    return layer.offset.deltas


_JOINED: dict[type, Callable[..., Any]] = {
    DynamicLayer: _joined_plain,
    GrowingLayer: _joined_plain,
    DynamicSlidingWindowLayer: _joined_plain,
    GraftCacheLayer: _joined_plain,
    TokenCache: _joined_tokens,
}
