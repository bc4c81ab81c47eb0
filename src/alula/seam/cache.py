"""What the seam and grafts store in a KV cache: layers behind the decoder's own, which follow what is done to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from alula.errors import SeamError
from alula.seam.growing import GrowingLayer, is_usable
from alula.seam.preconditions import Offset
from alula.tokens import KnownTokens, TokenMap


class _TokenLayer(GrowingLayer):
    """A cache layer that grows by tokens like a decoder's, whose keys and values have dtypes and widths of their own.

    Being an ordinary cache layer it follows every crop, reorder, repeat and selection of the cache.
    """

    # A cache is compileable if all its layers are: this one has no say in it. Where a static cache stopped being so,
    # transformers would build no mask for its blank tail.
    is_compileable = True

    def _peek(self, name: str, new: Tensor, heads: slice) -> Tensor:
        """Some heads of the tensor called `name`, followed by `new`, which is not stored by that."""
        if torch.is_grad_enabled():  # written to memory, they would lose their gradients
            stored = getattr(self, name)
            return torch.cat([stored[:, heads], new.to(stored)], dim=-2)
        filled, count = getattr(self, name).shape[-2], new.shape[-2]
        room = self._roomy(name, filled + count)
        behind, whole = room.memory.narrow(-2, filled, count), room.tensor.narrow(-2, 0, filled + count)
        if new.shape[1] != whole.shape[1]:
            behind, whole = behind[:, heads], whole[:, heads]
        behind.copy_(new)
        room.ahead = new
        return whole

    def _is_written(self, name: str, new: Tensor) -> bool:
        """Whether `_peek` wrote `new` behind the tensor called `name`, and nobody who shares its memory wrote since."""
        room = self._room_of(name, self.get_seq_length() + new.shape[-2])
        return room is not None and room.ahead is new

    def _taken(self, name: str, length: int) -> Tensor:
        """The tensor called `name` up to what `_peek` wrote behind it."""
        room = self._roomy(name, length)
        room.filled, room.ahead = room.tensor.narrow(-2, 0, length), None
        return room.filled

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
        else:
            self._grow(key_states, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        # one of the two may have width 0, which the inherited test takes for an empty cache
        return self.values.shape[-2] if self.is_initialized else 0


def _version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _cat(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class GraftCacheLayer(_TokenLayer):
    """What one graft keeps per token, for some decoder layers: two tensors, `keys` and `values`.

    Each is (B, layers * h, S, w), with as many heads h and numbers w as the graft likes, e.g. one head for numbers that
    belong to the token as a whole.
    """

    def __init__(self, name: str, owner_id: str | None, layers: Sequence[int]) -> None:
        super().__init__()
        self.name, self.owner_id, self.layers = name, owner_id, tuple(layers)

    def peek(self, layers: Sequence[int], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Each (B, layers * h, S + tokens, w): what is stored for layers in a row, followed by (B, layers * h, tokens,
        w) that are not yet."""
        first = self.layers.index(layers[0])
        starts = [first * (new.shape[1] // len(layers)) for new in (keys, values)]
        mine = [slice(start, start + new.shape[1]) for start, new in zip(starts, (keys, values), strict=True)]
        return self._peek("keys", keys, mine[0]), self._peek("values", values, mine[1])

    def append(self, new: Mapping[tuple[int, ...], tuple[Tensor, Tensor]]) -> None:
        """Add (B, layers * h, tokens, w) keys and values of layers in a row, for all of them."""
        keys, values = zip(*(new[layers] for layers in sorted(new)), strict=True)
        length = self.get_seq_length() + keys[0].shape[-2]
        if len(keys) == 1 and self._is_written("keys", keys[0]) and self._is_written("values", values[0]):
            self.keys, self.values = self._taken("keys", length), self._taken("values", length)
        else:
            self.update(_cat(keys), _cat(values))

    @staticmethod
    def of(cache: Cache | None) -> dict[str, GraftCacheLayer]:
        """The graft layers of a cache, by name."""
        layers = getattr(cache, "layers", None) or []
        return {layer.name: layer for layer in layers if type(layer) is GraftCacheLayer}


class TokenCache(_TokenLayer):
    """A cache layer behind the decoder's own that remembers, per token, its TokenMap entry, block input and RoPE
    angles.

    `keys` holds the block inputs (B, 1, S, d) (width 0 when no graft asked for them); `values` the TokenMap entries and
    the first halves of cos and sin per attention type (B, 1, S, 4 + sum of R), float32 (exact for integers up to
    2**24).
    """

    def __init__(self) -> None:
        super().__init__()
        # what `tokens`, `has_media` and `known` return; None = to be read from what is stored
        self._known: tuple[TokenMap, tuple[bool, ...], KnownTokens | None] | None = None
        # see `peek_facts`; with room behind the stored tokens, which the layer of this id writes to, and no copy of it
        self._facts: tuple[int, Mapping[Hashable, Tensor]] = (id(self), {})
        self.rope_widths: dict[str, int] = {}  # of a half, by type of attention
        self.offset: Offset | None = None
        self._counter: tuple[Tensor, int, int] | None = None
        self._word: TokenMap | None = None
        self._of_word: dict[Hashable, Tensor] = {}  # facts about it

    def __copy__(self) -> TokenCache:
        one = TokenCache.__new__(TokenCache)  # every forward makes one, and `copy` takes four times as long
        vars(one).update(vars(self))
        return one

    def word(self, batch: int, device: torch.device) -> TokenMap:
        """A token of text for each sample, as every step brings one; not to be written to."""
        word = self._word
        if word is None or word.shape[0] != batch or word.device != device or not is_usable(word.modality):
            self._word, self._of_word = (word := TokenMap.text(batch, 1, device=device)), {}
        return word

    def length_of(self, cache: Cache) -> int:
        """How many tokens a cache holds that this layer rides on.

        One of fixed size keeps the number on its device, where the host would have to wait for it in every step. It is
        changed in place by all that is done to it, and torch counts such changes: while nobody changed it since
        `note_length`, it is what it was then. A graph that is played again changes it uncounted, so the device looks,
        which the host need not wait for.

        Raises:
            RuntimeError: it was changed uncounted. On a GPU, at the next synchronization.
        """
        length = cache.get_seq_length()
        if isinstance(length, Tensor) and self._counter is not None:
            counter, version, known = self._counter
            if counter is length and _version_of(length) == version:
                torch._assert_async(length == known, "the length of a cache was changed behind alula's back")
                return known
        return int(length)

    def note_length(self, cache: Cache, length: int) -> None:
        """Remember that a cache holds so many tokens, for `length_of`."""
        counter = cache.get_seq_length()
        version = _version_of(counter) if isinstance(counter, Tensor) else None
        self._counter = None if version is None else (counter, version, length)

    def append(self, tokens: TokenMap, inputs: Tensor, rope: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Store the tokens of a finished forward."""
        if not self.rope_widths:
            self.rope_widths = {name: cos.shape[-1] // 2 for name, (cos, _) in rope.items()}
        halves = [half(table).float() for name in self.rope_widths for table in rope[name]]
        halves = [each if each.shape[:2] == tokens.shape else each.expand(*tokens.shape, -1) for each in halves]
        facts = torch.cat([tokens.stack(), *halves], dim=-1).float()  # float32 as soon as there is RoPE
        self.update(inputs.unsqueeze(1), facts.unsqueeze(1))
        self.forget()

    def remember(
        self,
        tokens: TokenMap,
        has_media: tuple[bool, ...],
        known: KnownTokens | None,
        facts: Mapping[Hashable, Tensor],
    ) -> None:
        """Remember what is stored in the forms it is asked for, until the cache is rearranged.

        Args:
            facts: what `peek_facts` gave in the forward that stored the last tokens, by key.
        """
        self._known, self._facts = (tokens, has_media, known), (id(self), facts)

    def forget(self) -> None:
        """Remember nothing of what is stored but itself: it was rearranged."""
        self._known, self._facts = None, (id(self), {})

    def peek_facts(self, key: Hashable, facts: Callable[[TokenMap], Tensor], every: TokenMap, new: TokenMap) -> Tensor:
        """(.., room) whose first entries are facts about the tokens stored, remembered under a key, and the `new` ones,
        which are not stored yet. Where none are remembered they are asked for about `every` token.

        Facts are about what tokens are and not where they stand: those about a word of a step hold for the next.
        """
        owner, known = self._facts
        room, length = known.get(key) if owner == id(self) else None, every.shape[1]
        if room is None or length > room.shape[-1] or not is_usable(room):
            of_all = facts(every)
            room = of_all.new_empty(*of_all.shape[:-1], length + max(length // 8, 32))
            room[..., :length] = of_all
        else:
            room.narrow(-1, length - new.shape[1], new.shape[1]).copy_(self._facts_of(key, facts, new))
        return room

    def _facts_of(self, key: Hashable, facts: Callable[[TokenMap], Tensor], new: TokenMap) -> Tensor:
        word = self._word
        if word is None or any(getattr(word, name) is not getattr(new, name) for name in ("modality", "item", "role")):
            return facts(new)
        if key not in self._of_word:
            self._of_word[key] = facts(new)
        return self._of_word[key]

    @property
    def known(self) -> KnownTokens | None:
        """What the host knows of the stored tokens without asking the device."""
        return None if self._known is None else self._known[2]

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

    def peek_inputs(self, new: Tensor) -> Tensor:
        """(B, S + tokens, d): the stored inputs followed by (B, tokens, d) not stored yet; without gradients."""
        return self._peek("keys", new[:, None], slice(None))[:, 0]

    def half_rope(self, layer_type: str) -> tuple[Tensor, Tensor]:
        """The first halves of (cos, sin) of all stored tokens, each (B, S, R / 2)."""
        width, start = self.rope_widths[layer_type], 4
        for name, before in self.rope_widths.items():
            if name == layer_type:
                break
            start += 2 * before
        cos, sin = self.values[:, 0, :, start : start + 2 * width].split(width, dim=-1)
        return cos, sin

    def has_media(self) -> tuple[bool, ...]:
        """Per sample, whether any stored token is perceptual; reads the device only after the cache was rearranged."""
        if self._known is None:
            known = KnownTokens.read(self.tokens)
            self._known = self.tokens, known.has_media, known
        return self._known[1]

    def reset(self) -> None:
        self.forget()
        super().reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        self.forget()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.forget()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.forget()
        super().batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        self.forget()
        super().crop(tokens_to_remove)

    @staticmethod
    def of(cache: Cache | None) -> TokenCache | None:
        """The token cache riding on `cache`, if any."""
        layers = getattr(cache, "layers", None) or []
        return next((layer for layer in reversed(layers) if type(layer) is TokenCache), None)  # it is behind


class SecondCache(_TokenLayer):
    """A cache layer that is a whole cache: what second runs left (see `requests.Contrast`), riding on that of the
    first ones.

    Attributes:
        cache: of second runs.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache, self.is_initialized = cache, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise SeamError("the cache of second runs was handed the keys of first ones")

    def get_seq_length(self) -> int:
        return int(self.cache.get_seq_length())

    def reorder_cache(self, beam_idx: Any) -> None:
        self.cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        self.cache.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        self.cache.activate_past_recording()

    def reset(self) -> None:
        self.cache.reset()

    def offload(self) -> None:
        """It stays where it is."""

    def prefetch(self) -> None:
        """It is there."""

    @staticmethod
    def before(cache: Cache | None) -> Cache | None:
        """What a second run is to go on with beside a first one that goes on with `cache`: what the last one left, or a
        copy of what the first ones did where there was none, or some without one since. None: nothing."""
        if cache is None or not hasattr(cache, "layers"):
            return None
        riding = next((layer for layer in cache.layers if type(layer) is SecondCache), None)
        if riding is not None:
            if riding.get_seq_length() == int(cache.get_seq_length()):
                return riding.cache
            cache.layers.remove(riding)
        return copy.deepcopy(cache)

    @staticmethod
    def ride(cache: Cache | None, second: Cache | None) -> None:
        """Have the cache of second runs ride on that of first ones."""
        if cache is None or second is None or not hasattr(cache, "layers"):
            return
        if not any(type(layer) is SecondCache for layer in cache.layers):
            cache.layers.append(SecondCache(second))
        one, other = TokenCache.of(cache), TokenCache.of(second)
        if one is not None and other is not None:
            other.offset = one.offset  # one prompt's, of which the host keeps one


_BITS = 24  # integers up to 2**24 are exact in float32


class TokenPresence(_TokenLayer):
    """A cache layer that remembers, per token, which decoder layers it stands in; only where some lack some.

    `keys` holds (B, 1, S, ceil(layers / 24)) numbers in float32, whose bits are the layers; `values` has width 0.
    """

    def append(self, present: Tensor) -> None:
        """Store (B, S, layers) bool of new tokens."""
        parts = present.split(_BITS, dim=-1)
        numbers = [(part * 2 ** torch.arange(part.shape[-1], device=part.device)).sum(dim=-1) for part in parts]
        stacked = torch.stack(numbers, dim=-1)[:, None].float()
        self.update(stacked, stacked[..., :0])

    def index(self, layer: int) -> Tensor | None:
        """(B, K) of the tokens that stand in a decoder layer; None where all do.

        Raises:
            SeamError: samples have different numbers of them.
        """
        numbers = self.keys[:, 0, :, layer // _BITS].to(torch.int64)
        present = numbers.bitwise_right_shift(layer % _BITS).bitwise_and(1).bool()
        counts = present.sum(dim=1)
        if bool((counts == present.shape[1]).all()):
            return None
        if not bool((counts == counts[0]).all()):
            raise SeamError(f"the samples of a cache have different numbers of tokens in decoder layer {layer}")
        return present.nonzero()[:, 1].view(len(present), -1)

    @staticmethod
    def of(cache: Cache | None) -> TokenPresence | None:
        """The one riding on `cache`, if any."""
        layers = getattr(cache, "layers", None) or []
        return next((layer for layer in layers if type(layer) is TokenPresence), None)


def half(table: Tensor) -> Tensor:
    """The first half of a (.., R) cos or sin table; RoPE tables repeat their half-width angles twice."""
    return table.narrow(-1, 0, table.shape[-1] // 2)
