"""The state of one forward pass, and the cache layer that carries it into the next.

Nothing here is global: a `ForwardContext` travels as a keyword argument through the host's own call chain, so it
survives gradient checkpointing and serves two models side by side; what the next step needs lives in the cache object
itself.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from alula.errors import SeamError
from alula.seam.dialect import REMEDY
from alula.seam.preconditions import Offset
from alula.tokens import TokenMap

if TYPE_CHECKING:
    from alula.seam.attention import SumsReader
    from alula.seam.install import Seam


class _TokenLayer(DynamicLayer):
    """A cache layer that grows by tokens like a decoder's, whose keys and values have dtypes and widths of their own.

    Being an ordinary cache layer it follows every crop, reorder, repeat and selection of the cache.
    """

    # A cache is compileable if all its layers are: this one has no say in it. Where a static cache stopped being so,
    # transformers would build no mask for its blank tail.
    is_compileable = True

    keys: Tensor
    values: Tensor
    _room: dict[str, Tensor]  # what `keys` and `values` are the filled beginnings of, once they grow

    def __init__(self) -> None:
        super().__init__()
        self._room = {}

    def _grown(self, name: str, new: Tensor) -> Tensor:
        """The tensor called `name` followed by `new`, in place where there is room behind it."""
        old: Tensor = getattr(self, name)
        if torch.is_grad_enabled():  # a backward may yet need the old tokens as they are, whoever asked for it
            return torch.cat([old, new], dim=-2)
        filled, length = old.shape[-2], old.shape[-2] + new.shape[-2]
        longer = self._roomy(name, length)[..., :length, :]
        longer[..., filled:, :] = new
        return longer

    def _roomy(self, name: str, length: int) -> Tensor:
        """A tensor of at least `length` tokens whose first ones are those of the tensor called `name`."""
        old: Tensor = getattr(self, name)
        room = self._room.get(name)
        if room is None or not _begins(old, room) or length > room.shape[-2]:
            room = old.new_empty(*old.shape[:-2], length + max(length // 8, 32), old.shape[-1])
            room[..., : old.shape[-2], :] = old
            setattr(self, name, room[..., : old.shape[-2], :])
            self._room[name] = room
        return room

    def _ahead(self, name: str, new: Tensor, heads: slice = slice(None)) -> Tensor:
        """Some heads of the tensor called `name`, followed by `new`, which is not stored by that."""
        filled, length = getattr(self, name).shape[-2], getattr(self, name).shape[-2] + new.shape[-2]
        whole = self._roomy(name, length)[:, heads, :length]
        whole[..., filled:, :] = new
        return whole

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
        else:
            self.keys, self.values = self._grown("keys", key_states), self._grown("values", value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        # one of the two may have width 0, which the inherited test takes for an empty cache
        return self.values.shape[-2] if self.is_initialized else 0


def _begins(part: Tensor, whole: Tensor) -> bool:
    """Whether `part` is the first tokens of `whole`, which may be written to behind them."""
    if whole.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return (
        part.data_ptr() == whole.data_ptr()
        and part.stride() == whole.stride()
        and part.shape[:-2] == whole.shape[:-2]
        and part.dtype == whole.dtype
    )


class GraftCacheLayer(_TokenLayer):
    """What one graft keeps per token, for some decoder layers: two tensors, `keys` and `values`.

    Each is (B, layers * h, S, w), with as many heads h and numbers w as the graft likes, e.g. one head for numbers that
    belong to the token as a whole.
    """

    def __init__(self, name: str, owner: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.name, self.owner, self.layers = name, owner, tuple(layers)

    def ahead(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Each (B, h, S + tokens, w): what is stored for a layer, followed by (B, h, tokens, w) that are not yet."""
        place = self.layers.index(layer)
        mine = [slice(place * new.shape[1], (place + 1) * new.shape[1]) for new in (keys, values)]
        return self._ahead("keys", keys, mine[0]), self._ahead("values", values, mine[1])

    def append(self, kept: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Add (B, h, tokens, w) keys and values per layer."""
        keys, values = zip(*(kept[layer] for layer in self.layers), strict=True)
        self.update(torch.cat(keys, dim=1), torch.cat(values, dim=1))

    @staticmethod
    def of(cache: Cache | None) -> dict[str, GraftCacheLayer]:
        """The shelves of a cache, by name."""
        layers = getattr(cache, "layers", None) or []
        return {layer.name: layer for layer in layers if isinstance(layer, GraftCacheLayer)}


class TokenCache(_TokenLayer):
    """A cache layer behind the decoder's own that remembers, per token, its TokenMap entry, block input and RoPE
    angles.

    `keys` holds the block inputs (B, 1, S, d) (width 0 when no graft asked for them); `values` the TokenMap entries and
    the first halves of cos and sin per attention type (B, 1, S, 4 + R * types), float32 (exact for integers up to
    2**24).
    """

    def __init__(self) -> None:
        super().__init__()
        # what `tokens` and `seen` return; None = to be read from what is stored
        self._known: tuple[TokenMap, tuple[bool, ...]] | None = None
        self.rope_types: list[str] = []
        self.offset: Offset | None = None

    def append(self, tokens: TokenMap, inputs: Tensor, rope: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Store the tokens of a finished forward."""
        batch, count = tokens.shape
        if not self.rope_types:
            self.rope_types = list(rope)
        halves = [half(table).expand(batch, count, -1).float() for name in self.rope_types for table in rope[name]]
        facts = torch.cat([tokens.stack().float(), *halves], dim=-1)
        self.update(inputs[:, None], facts[:, None])
        self._known = None

    def know(self, tokens: TokenMap, seeing: tuple[bool, ...]) -> None:
        """Remember what is stored in the form it is asked for, until the cache is rearranged."""
        self._known = tokens, seeing

    @property
    def tokens(self) -> TokenMap:
        return TokenMap.unstack(self.values[:, 0, :, :4]) if self._known is None else self._known[0]

    @property
    def has_inputs(self) -> bool:
        """Whether the block inputs were kept, and not only the TokenMap."""
        return self.is_initialized and self.keys.shape[-1] > 0

    @property
    def inputs(self) -> Tensor:
        """(B, S, d)."""
        return self.keys[:, 0]

    def inputs_ahead(self, new: Tensor) -> Tensor:
        """(B, S + tokens, d): the stored inputs followed by (B, tokens, d) not stored yet; without gradients."""
        return self._ahead("keys", new[:, None])[:, 0]

    def half_rope(self, layer_type: str) -> tuple[Tensor, Tensor]:
        """The first halves of (cos, sin) of all stored tokens, each (B, S, R / 2)."""
        width = (self.values.shape[-1] - 4) // (2 * len(self.rope_types))
        start = 4 + 2 * width * self.rope_types.index(layer_type)
        cos, sin = self.values[:, 0, :, start : start + 2 * width].split(width, dim=-1)
        return cos, sin

    def seen(self) -> tuple[bool, ...]:
        """Per sample, whether any stored token is perceptual; reads the device only after the cache was rearranged."""
        if self._known is None:
            tokens = self.tokens
            self._known = tokens, tuple(tokens.is_perceptual.any(dim=1).tolist())
        return self._known[1]

    def reorder_cache(self, beam_idx: Any) -> None:
        self._known = None
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._known = None
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._known = None
        super().batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        self._known = None
        super().crop(tokens_to_remove)

    @staticmethod
    def of(cache: Cache | None) -> TokenCache | None:
        """The token cache riding on `cache`, if any."""
        layers = getattr(cache, "layers", None) or []
        return next((layer for layer in layers if isinstance(layer, TokenCache)), None)


def half(table: Tensor) -> Tensor:
    """The first half of a (.., R) cos or sin table; RoPE tables repeat their half-width angles twice."""
    return table[..., : table.shape[-1] // 2]


def _seeing(tokens: TokenMap, past: TokenCache | None) -> tuple[bool, ...]:
    """Per sample, whether any token so far is perceptual. Reads the device only while some sample has seen nothing."""
    before = past.seen() if past is not None else (False,) * tokens.shape[0]
    if all(before):
        return before
    now = tokens.is_perceptual.any(dim=1).tolist()
    return tuple(a or b for a, b in zip(before, now, strict=True))


class ForwardContext:
    """What one forward pass knows: its tokens, past and new, and what the grafts of the seam keep during it.

    Attributes:
        tokens: TokenMap of the new tokens, (B, S).
        all_tokens: TokenMap of the cached tokens followed by the new ones, (B, P + S).
        past_tokens: TokenMap of the P cached tokens, or None.
        past: the token cache that remembers them as it was before this forward (a shallow copy: the cache itself grows
            when the forward ends), or None, also for a cache that was filled without the seam.
        growing: that token cache itself.
        keeps: whether a cache will take what this forward leaves.
        cache: the cache the model was given, or None.
        handed: the cache its layers were handed; set when the first of them is entered.
        marks: of the thread that began this forward (see `scope`).
        seeing: per sample, whether any of its tokens so far is perceptual.
        has_perceptual: whether any token so far, of any sample, is perceptual.
        inputs: (B, S, d) input of the first decoder layer; set when that layer is entered.
        rope: per attention type the (cos, sin) of the new tokens, each (1 or B, S, R); empty for hosts without RoPE.
        memo: results grafts share between layers, keyed by whatever they like; lives and dies with this forward.
    """

    def __init__(
        self,
        seam: Seam,
        tokens: TokenMap,
        past_tokens: TokenMap | None = None,
        past: TokenCache | None = None,
        shelves: Mapping[str, GraftCacheLayer] | None = None,
        *,
        keeps: bool = True,
        cache: Cache | None = None,
        marks: frozenset[Hashable] = frozenset(),
    ) -> None:
        self.seam = seam
        self.cache = cache
        self.handed: Cache | None = None
        self.marks = marks
        self.past_tokens = past_tokens
        self.past, self.growing = copy.copy(past), past
        self.all_tokens = tokens if past_tokens is None else past_tokens.append(tokens)
        self.tokens = self.all_tokens.last(tokens.shape[1])
        self.seeing = _seeing(tokens, past)
        self.has_perceptual = any(self.seeing)
        self.inputs: Tensor | None = None
        self._all_inputs: Tensor | None = None
        self.rope: dict[str, tuple[Tensor, Tensor]] = {}
        self.memo: dict[Any, Any] = {}
        known = past.get_seq_length() if past is not None else -1
        self.keeps = keeps
        # what another graft of this name left, or this one before a gap, is of no use
        self._shelves = {
            name: shelf
            for name, shelf in (shelves or {}).items()
            if shelf.get_seq_length() == known and shelf.owner == self._owner(name)
        }
        self._kept: dict[str, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
        self._layer_state: dict[int, dict[Any, Any]] = defaultdict(dict)

    def layer(self, index: int) -> dict[Any, Any]:
        """The state grafts keep for one layer of this forward. It is kept until the forward dies, so that a layer
        recomputed by gradient checkpointing finds what it found the first time."""
        return self._layer_state[index]

    def _owner(self, name: str) -> Any:
        return getattr(self.seam.holders.get(name), "token", None)

    # -- values kept per token for later forwards ----------------------------------------------------------------------

    def is_kept(self, name: str, layer: int) -> bool:
        """Whether the values that `keep` was given are known for all past tokens."""
        return name in self._shelves and layer in self._shelves[name].layers

    @torch.compiler.disable  # lengths change with every step, and each would be compiled anew
    def keep(self, name: str, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep two tensors of tokens in the cache, if this forward has one.

        Args:
            name: of the graft, which must keep something for the same layers in every forward.
            layer: the decoder layer they belong to.
            keys, values: (B, h, S, w) of the new tokens; (B, h, P + S, w) where nothing `is_kept`.

        Returns:
            (B, h, P + S, w) of all tokens; not to be written to.
        """
        if self.keeps:
            self._kept[name][layer] = keys, values
        return self._shelves[name].ahead(layer, keys, values) if self.is_kept(name, layer) else (keys, values)

    def shelve(self, cache: Cache) -> None:
        """Put what was kept on the cache, and take away what was not kept up."""
        for name, shelf in GraftCacheLayer.of(cache).items():
            if name not in self._shelves or set(self._kept.get(name, ())) != set(shelf.layers):
                cache.layers.remove(shelf)
        for name, kept in self._kept.items():
            if name not in self._shelves:
                self._shelves[name] = GraftCacheLayer(name, self._owner(name), sorted(kept))
                cache.layers.append(self._shelves[name])
            if set(kept) == set(self._shelves[name].layers):
                self._shelves[name].append(kept)
        self._kept.clear()

    def is_disabled(self, name: str) -> bool:
        """Whether the graft of that name takes no part in this forward."""
        return name not in self.seam.holders or self._owner(name) in self.marks

    def askers(self, layer: int) -> list[SumsReader]:
        """Those who may ask for sums of attention in a layer of this forward; probes of other threads may not."""
        heard = []
        for asker in self.seam.askers(layer):
            mark = getattr(asker, "mark", None)
            if mark is None or mark in self.marks:  # looked up, never gone through: torch 2.7 cannot compile that
                heard.append(asker)
        return heard

    def columns(self, module: nn.Module, queries: int, keys: int) -> list[tuple[SumsReader, Tensor]]:
        """Who wants which sums of attention in this attention module's layer.

        Raises:
            SeamError: the module has other queries or keys than this forward knows of.
        """
        index: int = module.layer_idx  # type: ignore[assignment]
        asked = [(asker, asker.key_values(self, index)) for asker in self.askers(index)]
        wanted = [(asker, columns) for asker, columns in asked if columns is not None]
        if wanted:
            self._check_lengths(index, queries, keys)
        return wanted

    def _check_lengths(self, layer: int, queries: int, keys: int) -> None:
        """What attention is given has to be what is known of the past and the new tokens: columns are matched by it."""
        new, known = self.tokens.shape[1], self.all_tokens.shape[1]
        held = getattr(self.handed, "layers", None) or []
        kept: Any = held[layer] if layer < len(held) else None
        window = getattr(kept, "is_sliding", False)  # keeps the last keys only
        room = getattr(kept, "is_compileable", False)  # has a blank tail
        if queries != new or (keys < known and not window) or (keys > known and not room):
            raise SeamError(
                f"the attention of layer {layer} was given {queries} queries and {keys} keys, where {new} new and "
                f"{known} tokens in all are known",
                remedy=REMEDY,
            )

    def split(self, askers: Sequence[SumsReader]) -> tuple[Tensor, Tensor] | None:
        """Indices of the samples whose sums `askers` want, and of the others; None when they want those of all."""
        if all(self.seeing) or not all(self.seam.is_gated(asker) for asker in askers):
            return None
        if "split" not in self.memo:
            picks = [[i for i, sees in enumerate(self.seeing) if sees is wanted] for wanted in (True, False)]
            self.memo["split"] = tuple(torch.tensor(pick, device=self.tokens.device) for pick in picks)
        return self.memo["split"]

    def all_inputs(self) -> Tensor:
        """(B, P + S, d) first-layer inputs of all tokens."""
        assert self.inputs is not None, "the first decoder layer has not been entered"
        if self.past is None:
            return self.inputs
        if self._all_inputs is None:
            alike = self.past.inputs.dtype == self.inputs.dtype and self.past.inputs.device == self.inputs.device
            if alike and self.growing is not None and not torch.is_grad_enabled():
                self._all_inputs = self.growing.inputs_ahead(self.inputs)
            else:
                self._all_inputs = torch.cat([self.past.inputs.to(self.inputs), self.inputs], dim=1)
        return self._all_inputs

    def new_half_rope(self, layer_type: str) -> tuple[Tensor, Tensor] | None:
        """The first halves of (cos, sin) of the new tokens, each (B, S, R / 2): the second ones repeat them."""
        if layer_type not in self.rope:
            return None
        cos, sin = (half(table).expand(self.tokens.shape[0], -1, -1) for table in self.rope[layer_type])
        return cos, sin

    def all_half_rope(self, layer_type: str) -> tuple[Tensor, Tensor] | None:
        """Those of all tokens, each (B, P + S, R / 2)."""
        halves = self.new_half_rope(layer_type)
        if halves is None or self.past is None:
            return halves
        cos, sin = (
            torch.cat([old.to(new), new], dim=1)
            for old, new in zip(self.past.half_rope(layer_type), halves, strict=True)
        )
        return cos, sin

    def all_rope(self, layer_type: str) -> tuple[Tensor, Tensor] | None:
        """(cos, sin) of all tokens for an attention type, each (B, P + S, R); None for hosts without RoPE."""
        halves = self.all_half_rope(layer_type)
        if halves is None:
            return None
        cos, sin = (torch.cat([table, table], dim=-1) for table in halves)
        return cos, sin

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A forward in flight is never part of a copied model."""
        return
