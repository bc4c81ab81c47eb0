"""Some of a forward's tokens in a decoder layer: packed for the way through it, and held by its cache.

Outside a layer all tokens of a forward are there, inside stand only those that have work, packed. Samples that have
fewer than others are filled up with tokens that have none: nothing attends to them, and what comes of them is dropped.

Shapes: B batch, S new tokens of the forward, M of them in the layer, P cached tokens, K keys of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from alula.errors import HostError, SeamError, UsageError
from alula.seam.growing import GrowingLayer
from alula.seam.requests import Tokens, Work, either
from alula.seam.view import gather, widened
from alula.tokens import TokenMap


@dataclass(frozen=True, eq=False)
class Lane:
    """The tokens of a forward that stand in a decoder layer.

    Attributes:
        index: (B, M) of them among the S new tokens, ascending, each once.
        real: (B, M) bool: the token has work; the others fill up their sample. None: all have.
    """

    index: Tensor
    real: Tensor | None = None
    _wide: dict[Any, Tensor] = field(default_factory=dict, repr=False)  # `index` as wide as what is gathered by it

    @classmethod
    def of(cls, working: Tokens, tokens: TokenMap, counts: Sequence[int] | None = None) -> Lane | None:
        """The lane of the `working` tokens, padding left out; None where all tokens have work.

        Args:
            counts: how many there are in each sample, of fewer than all. None: it is read from the device, once, where
                these are some.
        """
        if working is None:
            return None
        if working is False:
            return cls(tokens.modality[:, :0])
        left = working & tokens.valid
        if counts is None:
            counts, out = torch.stack([left.sum(dim=1), (tokens.valid & ~working).sum(dim=1)]).tolist()
            if not any(out):
                return None
        most, working = max(counts), left
        order = working.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        index = order[:, :most].sort(dim=1).values
        return cls(index, None if min(counts) == most else working.gather(1, index))

    def gather(self, values: Tensor) -> Tensor:
        """(B, M, ..) of the tokens in the lane, from (B or 1, S, ..) of all."""
        if values.shape[0] != self.index.shape[0]:
            values = values.expand(self.index.shape[0], *values.shape[1:])
        return values.gather(1, self._index_of(values))

    def _index_of(self, values: Tensor) -> Tensor:
        """(B, M, ..) the index, as wide as (B, any, ..) values and where these are."""
        key = values.device, values.shape[2:]
        if key not in self._wide:
            self._wide[key] = widened(self.index.to(values.device), values).expand(-1, -1, *values.shape[2:])
        return self._wide[key]

    def scatter(self, values: Tensor, into: Tensor) -> Tensor:
        """(B, S, d) `into`, with the (B, M, d) values of the lane's tokens in their places, as these are kept."""
        into = into.to(values)
        if self.real is not None:
            values = torch.where(self.real.to(values.device)[..., None], values, self.gather(into))
        return into.scatter(1, self._index_of(values), values)

    def tokens(self, tokens: TokenMap) -> TokenMap:
        """The map of the lane's tokens, in which those that fill up are padding."""
        return tokens.pick(self.index).only(self.real)

    def among(self, of: Lane | None) -> Lane:
        """A lane within another, as one of the forward; None: of all tokens."""
        return self if of is None else Lane(of.index.gather(1, self.index), self.real)

    @property
    def is_empty(self) -> bool:
        return not self.index.shape[1]


@dataclass(frozen=True, eq=False)
class Part:
    """What attention or the MLP of a layer does, where it does not add something to all tokens in the layer.

    Attributes:
        lane: the tokens it is given, among those of the forward; None: all in the layer.
        within: the same among those of the layer.
        heard: (B, M) bool of the tokens it is given: to these is added what it gives; None: to all that have work.
    """

    lane: Lane | None
    within: Lane | None
    heard: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self.lane is not None and self.lane.is_empty

    def gather(self, values: Tensor) -> Tensor:
        """What it is given, from what all tokens of the layer have."""
        return values if self.within is None else self.within.gather(values)

    def scatter(self, values: Tensor, like: Tensor) -> Tensor:
        """What it adds to all tokens of the layer, shaped as `like`; 0 where it adds nothing."""
        if self.heard is not None:
            values = values.masked_fill(~self.heard.to(values.device)[..., None], 0)
        return values if self.within is None else self.within.scatter(values, torch.zeros_like(like))


@dataclass(frozen=True, eq=False)
class Plan:
    """The work of a layer, as lanes.

    Attributes:
        layer: the tokens in it; None: all.
        attention, mlp: what these do; None: they add to all in the layer.
        lends: whether tokens leave keys of the layer before.
        lent: the tokens that leave a key, with those; None: all.
        positions: (B, S) of all new tokens, in place of the host's own.
    """

    layer: Lane | None
    attention: Part | None = None
    mlp: Part | None = None
    lends: bool = False
    lent: Lane | None = None
    positions: Tensor | None = None

    @classmethod
    def of(cls, work: Work, tokens: TokenMap) -> Plan | None:
        """None where all tokens do all. Reads the device, once per set of tokens."""
        if work.is_whole:
            layer = Lane.of(work.attend, tokens, work.counts)
            is_host = layer is None and work.positions is None
            return None if is_host else cls(layer, positions=work.positions)
        given = work.owning
        layer = Lane.of(either(given, work.feed), tokens, work.counts)
        lends = work.lend is not False and given is not None
        plan = cls(
            layer,
            _part(given, layer, tokens, work.attend, work.counts),
            _part(work.feed, layer, tokens, work.feed, work.counts),
            lends,
            Lane.of(work.leaving, tokens) if lends else None,
            work.positions,
        )
        parts = (layer, plan.attention, plan.mlp, plan.positions)
        return None if all(part is None for part in parts) else plan

    @property
    def attending(self) -> Lane | None:
        """The tokens that attention is given, among those of the forward; None: all."""
        return self.layer if self.attention is None or self.attention.lane is None else self.attention.lane


def _part(
    given: Tokens, layer: Lane | None, tokens: TokenMap, heard: Tokens, counts: Sequence[int] | None
) -> Part | None:
    """A part of a layer that is given some tokens, of which some are `heard`."""
    if isinstance(given, Tensor) and layer is not None:
        within = Lane.of(layer.gather(given), layer.tokens(tokens))
    else:
        within = Lane.of(given, tokens, counts)
    lane = None if within is None else within.among(layer)
    if heard is given or heard is None:
        return None if lane is None else Part(lane, within)
    if heard is False:
        heard = torch.zeros_like(tokens.valid)
    at = layer if lane is None else lane
    return Part(lane, within, heard if at is None else at.gather(heard))


@dataclass(eq=False)
class Slots:
    """Of which tokens a lean cache layer holds keys. It is never changed, so that layers that hold the same share one,
    and what is done to all of them is computed once.

    Attributes:
        first: (B, K - len(behind)) places of tokens among all so far, ascending.
        real: (B, K) bool: the key is of a token with work; None: all are.
        spare: how many keys at most are of tokens that were cropped away, from samples that were left with fewer.
        behind: places of further tokens, the same in all samples, which every step adds to.
    """

    first: Tensor
    real: Tensor | None = None
    spare: int = 0
    behind: range = range(0)
    _next: tuple[tuple[Any, ...], Any, Slots] | None = field(default=None, repr=False)

    @cached_property
    def places(self) -> Tensor:
        """(B, K) of the tokens among all so far, ascending."""
        if not self.behind:
            return self.first
        more = torch.arange(self.behind.start, self.behind.stop, device=self.first.device)
        return torch.cat([self.first, more.expand(len(self.first), -1)], dim=1)

    @property
    def count(self) -> int:
        """K."""
        return self.first.shape[1] + len(self.behind)

    def _once(self, done: tuple[Any, ...], by: Any, make: Callable[[], Slots]) -> Slots:
        """What `make` gives, made once while the same is done, `by` the same object, to all layers that share this."""
        if self._next is None or self._next[1] is not by or self._next[0] != done:
            self._next = done, by, make()
        return self._next[2]

    def grown(self, lane: Lane | None, past: int, count: int) -> Slots:
        """With those of `count` new tokens behind `past` ones that stand in a lane; None: all of them."""
        return self._once(("grown", past, count), lane, partial(self._grown, lane, past, count))

    def _grown(self, lane: Lane | None, past: int, count: int) -> Slots:
        if lane is None and self.real is None:
            if not self.behind:
                return Slots(self.first, None, self.spare, range(past, past + count))
            if self.behind.stop == past:
                return Slots(self.first, None, self.spare, range(self.behind.start, past + count))
        batch, device = len(self.places), self.places.device
        if lane is None:
            new = torch.arange(past, past + count, device=device).expand(batch, -1)
        else:
            new = lane.index.to(device) + past
        real = None
        if self.real is not None or (lane is not None and lane.real is not None):
            new_real = None if lane is None or lane.real is None else lane.real.to(device)
            real = torch.cat([_all_true(self.real, self.places), _all_true(new_real, new)], dim=1)
        return Slots(torch.cat([self.places, new], dim=1), real, self.spare)

    def of_samples(self, index: Tensor) -> Slots:
        """Those of the samples at `index`."""
        return self._once(("samples",), index, lambda: self._at(index.to(self.places.device)))

    def repeated(self, repeats: int) -> Slots:
        """Those of every sample, side by side as often."""
        samples = torch.arange(len(self.places), device=self.places.device)
        return self._once(("repeated", repeats), None, lambda: self._at(samples.repeat_interleave(repeats)))

    def _at(self, index: Tensor) -> Slots:
        return Slots(self.places[index], None if self.real is None else self.real[index], self.spare)

    def cropped(self, length: int) -> Slots:
        """Those of the first `length` tokens. Reads the device."""

        def make() -> Slots:
            left = self.places < length
            counts = left.sum(dim=1).tolist()
            most, least = max(counts), min(counts)
            real = None if self.real is None and most == least else _all_true(self.real, self.places) & left
            # places of keys that nothing attends to any more only have to exist
            places = self.places[:, :most].clamp(max=max(length - 1, 0))
            return Slots(places, None if real is None else real[:, :most], self.spare + most - least)

        return self._once(("cropped", length), None, make)

    def last(self, count: int) -> Slots:
        """The last `count`."""
        start = self.count - count
        if start <= 0:
            return self
        real = None if self.real is None else self.real[:, start:]
        return self._once(("last", count), None, lambda: Slots(self.places[:, start:], real, self.spare))


def _all_true(real: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if real is None else real


@dataclass(frozen=True, eq=False)
class Lent:
    """Keys that tokens have in one layer of a cache, for them to leave in the next.

    Attributes:
        source: the layer that has them.
        at: (B, U) of the keys it holds: those of the tokens that leave one.
        rank: (B, U) of these among the (B, M) tokens that bring their own, where `brings` says that they do.
        brings: (B, U) bool.
    """

    source: DynamicLayer
    at: Tensor
    rank: Tensor
    brings: Tensor

    def joined(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, U, w) keys and values, of which the (B, h, M, w) given are some."""
        return self._joined(self.source.keys, keys), self._joined(self.source.values, values)

    def alone(self) -> tuple[Tensor, Tensor]:
        """(B, h, U, w) keys and values, where no token brings its own."""
        return _columns(self.source.keys, self.at), _columns(self.source.values, self.at)

    def _joined(self, held: Tensor | None, own: Tensor) -> Tensor:
        rank = self.rank.clamp(max=own.shape[-2] - 1)
        return torch.where(self.brings[:, None, :, None], _columns(own, rank), _columns(held, self.at))


def _columns(held: Tensor | None, at: Tensor) -> Tensor:
    assert held is not None
    index = at.to(held.device)[:, None, :, None]
    return held.gather(2, index.expand(-1, held.shape[1], -1, held.shape[-1]))


def held_at(slots: Slots | None, lane: Lane | None, tokens: TokenMap, past: int) -> Tensor:
    """(B, U) where a cache layer holds the keys of a lane's tokens.

    Args:
        slots: of the layer; None: it holds all.
        lane: of the new tokens; None: all.
        past: how many tokens came before.

    Raises:
        SeamError: it does not hold all of them. Reads the device for it, where it does not hold all tokens.
    """
    wanted = _queries(lane, tokens) + past
    if slots is None:
        return wanted
    places, is_free = slots.places.contiguous(), ~tokens.pick(_queries(lane, tokens)).valid
    if lane is not None and lane.real is not None:
        is_free = is_free | ~lane.real
    if places.shape[1]:
        at = torch.searchsorted(places, wanted.contiguous()).clamp(max=places.shape[1] - 1)
        is_there = places.gather(1, at) == wanted
        if slots.real is not None:
            is_there = is_there & slots.real.gather(1, at)
        if bool((is_there | is_free).all()):
            return at
    raise SeamError(
        "a token is to leave the key that it has in the layer before, and has none there",
        remedy='let the layer in front of one that lends leave keys: keys="own" or "lent" there, or other layers',
    )


def ranked(own: Lane, lane: Lane | None, tokens: TokenMap) -> tuple[Tensor, Tensor]:
    """(B, U) for the tokens of a lane: their rank among those of another, and whether they are there with work."""
    wanted = _queries(lane, tokens).contiguous()
    rank = torch.searchsorted(own.index.contiguous(), wanted)
    within = rank.clamp(max=max(own.index.shape[1] - 1, 0))
    if own.is_empty:
        return rank, torch.zeros_like(wanted, dtype=torch.bool)
    is_own = own.index.gather(1, within) == wanted
    return within, is_own if own.real is None else is_own & own.real.gather(1, within)


class Coming(NamedTuple):
    """What the next `update` of a lean cache layer brings.

    Attributes:
        slots: of what it holds then.
        tokens: how many new ones, those without a key too.
        lent: gives the keys that are not brought.
    """

    slots: Slots
    tokens: int
    lent: Lent | None = None


class LeanLayer(GrowingLayer):
    """A cache layer that holds the keys of some tokens, knows of which, and reports the length of all.

    So nothing outside the layer learns that any are missing: positions, masks and lengths are those of all tokens, and
    `crop` counts tokens, not keys.
    """

    def __init__(self, slots: Slots, length: int, window: int | None = None) -> None:
        """
        Args:
            slots: of what it holds.
            length: of all tokens so far.
            window: width of a sliding layer's window; None: it is none.
        """
        super().__init__()
        self.slots, self.length = slots, length
        self.is_sliding = window is not None
        self.sliding_window = window
        self.record_past = False
        self.coming: Coming | None = None

    @classmethod
    def of(cls, cache: Cache, index: int, held: Tensor | None, stretch: Callable[[int, int], Slots]) -> LeanLayer:
        """The lean layer at `index` of a cache, put in the place of an ordinary one, whose keys it takes over.

        Args:
            held: (B, K) the tokens it holds keys of; None: it does of all, or the last within its window.
            stretch: gives the slots of all tokens from one place to another.

        Raises:
            UsageError: the layer there is of a kind that has no room for some tokens only.
        """
        layers = cache.layers
        if getattr(cache, "layer_class_to_replicate", None) is not None:
            while len(layers) <= index:
                layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
        layer: Any = layers[index]
        if isinstance(layer, LeanLayer):
            return layer
        if type(layer) not in (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer):
            raise UsageError(
                f"a cache of {type(layer).__name__} cannot hold some tokens of a layer and not others",
                remedy="use a cache that grows, transformers' own default: no cache_implementation, or a DynamicCache",
            )
        length = int(layer.get_seq_length())
        count = layer.keys.shape[-2] if length else 0
        slots = stretch(length - count, length) if held is None else Slots(held)
        lean = cls(slots, length, getattr(layer, "sliding_window", None))
        if layer.is_initialized:
            lean.lazy_initialization(layer.keys, layer.values)
            lean.keys, lean.values = layer.keys, layer.values
        lean.record_past = getattr(layer, "record_past", False)
        layers[index] = lean
        return lean

    def expect(self, lane: Lane | None, count: int, lent: Lent | None = None) -> Slots:
        """Have the next `update` bring the keys of the lane's tokens among `count` new ones.

        Args:
            lent: gives those that it will not bring.

        Returns:
            The keys that attention will be given.
        """
        self.coming = Coming(self.slots.grown(lane, self.length, count), count, lent)
        return self.coming.slots

    def pass_by(self, count: int) -> None:
        """Know of `count` new tokens that leave no key."""
        self.length += count

    def take(self, lane: Lane | None, count: int, lent: Lent) -> Slots:
        """Take the keys of the lane's tokens among `count` new ones, which the layer itself computes none of."""
        self.slots = self.slots.grown(lane, self.length, count)
        super().update(*lent.alone())
        self.length += count
        return self.slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        coming, self.coming = self.coming, None
        if coming is None:
            raise UsageError(
                f"the cache holds {self.slots.count} of {self.length} tokens in one of its layers: it was "
                "filled under a policy that took tokens out",
                remedy="go on with it under that policy, or start from an empty cache",
            )
        self.slots = coming.slots
        if coming.lent is not None:
            key_states, value_states = coming.lent.joined(key_states, value_states)
        keys, values = super().update(key_states, value_states)
        self.length += coming.tokens
        if self.is_sliding and not self.record_past:
            self._trim()
        return keys, values

    def _trim(self) -> None:
        """Let go of what no window reaches: places differ, so the last as many keys are at least those in it."""
        assert self.sliding_window is not None
        kept = self.sliding_window - 1 + self.slots.spare
        if kept < self.slots.count:
            self.slots = self.slots.last(kept)
            self.keys, self.values = self.keys[..., -kept:, :], self.values[..., -kept:, :]

    def activate_past_recording(self) -> None:
        """Keep all keys until the next `crop`, as transformers asks of sliding layers."""
        self.record_past = True

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of an ordinary layer, after which the host makes one mask for all layers of a kind."""
        window = self.sliding_window
        if window is None or self.length < window:
            return self.length + query_length, 0
        return window - 1 + query_length, self.length - window + 1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: of tokens to remove")
        if self.sliding_window is not None and self.length >= self.sliding_window and not self.record_past:
            raise RuntimeError("tokens behind a window are gone: call activate_past_recording before they are added")
        if tokens_to_remove:
            self.length += tokens_to_remove
            self.slots = self.slots.cropped(self.length)
            if self.is_initialized:
                left = self.slots.count
                self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]
        if self.is_sliding and self.is_initialized:
            self._trim()

    def reset(self) -> None:
        super().reset()
        self.slots, self.length, self.coming = Slots(self.slots.places[:, :0]), 0, None

    def reorder_cache(self, beam_idx: Any) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.slots = self.slots.of_samples(indices)
        if self.is_initialized:
            at = indices.to(self.keys.device)
            self.keys, self.values = self.keys[at], self.values[at]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.slots = self.slots.repeated(repeats)
        if self.is_initialized:
            self.keys, self.values = (each.repeat_interleave(repeats, dim=0) for each in (self.keys, self.values))


def packed_mask(
    mask: Any, lane: Lane | None, keys: Slots, tokens: TokenMap, past: int, additive: torch.dtype | None
) -> Tensor | None:
    """What the host's mask says of the queries of a lane and the keys of a layer.

    Args:
        mask: the host's (B or 1, H or 1, S, C) mask of all new tokens and the last C of all P + S, boolean (True =
            attend) or additive; None: causal.
        lane: which of the new tokens are there; None: all.
        keys: which keys are.
        tokens: TokenMap of the new tokens.
        past: P.
        additive: dtype of a mask that is added, where one has to be made for attention that adds it; None: boolean.

    Returns:
        (B, H or 1, M, K), None where causality of what is there says it all.

    Raises:
        HostError: a mask of another kind.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        raise HostError(
            f"tokens cannot be taken out of layers whose mask is a {type(mask).__name__}",
            remedy='run the decoder with SDPA: model.set_attn_implementation("sdpa")',
        )
    places = keys.places
    queries = _queries(lane, tokens) + past
    fill = None if lane is None else lane.real
    if mask is None:
        alone = places.shape[1] == queries.shape[1]
        if keys.real is None and fill is None and (alone or queries.shape[1] == 1):
            return None
        allowed = (places[:, None, :] <= queries[..., None])[:, None]
        if additive is not None:
            allowed = torch.zeros_like(allowed, dtype=additive).masked_fill(~allowed, torch.finfo(additive).min)
    else:
        whole = past + tokens.shape[1]
        columns = places.to(mask.device) - (whole - mask.shape[-1])
        allowed = mask
        if lane is not None:
            allowed = gather(allowed.transpose(1, 2), lane.index).transpose(1, 2)
        allowed = gather(allowed.movedim(-1, 1), columns.clamp(min=0)).movedim(1, -1)
        if mask.shape[-1] < whole:
            allowed = _barred(allowed, (columns < 0)[:, None, None])
    if keys.real is not None:
        allowed = _barred(allowed, ~keys.real.to(allowed.device)[:, None, None])
    if fill is not None:
        # they attend to themselves alone, so that no row is barred as a whole; what comes of it is dropped
        themselves = (places[:, None, :] == queries[..., None]) & ~fill[..., None]
        free = True if allowed.dtype == torch.bool else 0
        allowed = allowed.masked_fill(themselves[:, None].to(allowed.device), free)
    return allowed


def _queries(lane: Lane | None, tokens: TokenMap) -> Tensor:
    """(B, M) of a lane's tokens among the new ones."""
    if lane is not None:
        return lane.index
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)


def _barred(mask: Tensor, where: Tensor) -> Tensor:
    return mask.masked_fill(where, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
