"""The state of one forward pass.

Nothing here is global: a `ForwardContext` travels as a keyword argument through the host's own call chain, so it
survives gradient checkpointing and serves two models side by side; what the next step needs lives in the cache object
itself (see `cache`). It knows who takes part in it (`Requests`) and nothing of the seam that made it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from alula.anatomy import NAME as NAME
from alula.anatomy import Anatomy
from alula.errors import SeamError, UsageError
from alula.seam import dialect
from alula.seam.cache import GraftCacheLayer, TokenCache, TokenPresence, half
from alula.seam.hooks import ByThread
from alula.seam.lanes import Lane, LeanLayer, Plan, Slots
from alula.seam.requests import Bias, Branch, BranchReader, Foresight, Heads, Request, Requests, Sums, Weights
from alula.seam.scope import SECOND
from alula.seam.view import LayerView, gather, located
from alula.tokens import KnownTokens, Modality, TokenMap

_T = TypeVar("_T")
Standing = tuple[TokenMap, Tensor | None, Tensor | None, Tensor | None]
"""what a `LayerView` says of the tokens in a layer"""


class ForwardContext:
    """What one forward pass knows: its tokens, past and new, and what the grafts of the seam keep during it.

    Attributes:
        tokens: TokenMap of the new tokens, (B, S).
        all_tokens: TokenMap of the cached tokens followed by the new ones, (B, P + S).
        past_tokens: TokenMap of the P cached tokens, or None.
        past: the token cache that remembers them as it was before this forward (a shallow copy: the cache itself grows
            when the forward ends), or None, also for a cache that was filled without the seam.
        growing: that token cache itself.
        presence: which cached tokens stand in which layers; None: all in all.
        keeps_inputs: whether the first layer's inputs are wanted; they have width 0 otherwise.
        left: the decoder layers that have given their output. What runs in them later is a recomputation.
        is_caching: whether a cache will take what this forward leaves.
        cache: the KV cache the model was given, or None.
        layer_cache: the one its layers were given; set when the first of them is entered.
        plans: by decoder layer, what its attention and its MLP are given, where these are not the same tokens.
        foresight: who has a layer run only to see its attention, meanwhile.
        requests: who takes part, as it was when this forward began.
        shapes: gives rows and columns of tokens of the new media in order, by modality, where the host is told them.
        of_tower: by owner what was read of the images that the vision tower made last in this thread.
        marks: of the thread that began it (see `scope`).
        given: inputs that owners take beside the host's own, (B, ..) by name.
        labels: (B, S) the labels that the host was given by name, or None; a wrapper that calls past the host's hooks
            (PEFT's of 0.19) is not heard.
        has_roles: whether it was said whose turn the new tokens are.
        has_media: per sample, whether any of its tokens so far is perceptual.
        any_media: whether any token so far, of any sample, is perceptual.
        new_media: whether any of the new tokens is; True also where only the device knows.
        inputs: (B, S, d) input of the first decoder layer; set when that layer is entered.
        rope: per attention type the (cos, sin) of the new tokens, each (1 or B, S, R); empty for hosts without RoPE.
        facts: what `facts_of_tokens` gave, by key, for the cache to remember.
        beside: by layer the keys there, where it holds some and all new tokens are in it; see `seam.steps`.
        memo: what grafts keep for a layer or share between layers, keyed by whatever they like. It lives and dies with
            this forward, so that a layer recomputed by gradient checkpointing finds what it found the first time.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        requests: Requests,
        tokens: TokenMap,
        past_tokens: TokenMap | None = None,
        past: TokenCache | None = None,
        cached: Mapping[str, GraftCacheLayer] | None = None,
        *,
        presence: TokenPresence | None = None,
        keeps_inputs: bool = True,
        is_caching: bool = True,
        cache: Cache | None = None,
        marks: frozenset[Hashable] = frozenset(),
        given: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        has_roles: bool = False,
        of_tower: ByThread[dict[str, Tensor]] | None = None,
        shapes: Callable[[], Mapping[Modality, list[tuple[int, int]]]] = dict,
        known: KnownTokens | None = None,
    ) -> None:
        """
        Args:
            known: what the host knows of the new tokens. None: it is read from the device while some sample has seen
                nothing.
        """
        self.anatomy = anatomy
        self.requests = requests
        self.cache = cache
        self.shapes = shapes
        self.of_tower: ByThread[dict[str, Tensor]] = ByThread() if of_tower is None else of_tower
        self.layer_cache: Cache | None = None
        self.marks = marks
        self.given: Mapping[str, Tensor] = given or {}
        self.labels, self.has_roles = labels, has_roles
        self.past_tokens = past_tokens
        self.past, self.growing = copy.copy(past), past
        self.tokens = tokens if past_tokens is None else past_tokens.followed_by(tokens, known)
        self.all_tokens = tokens if past_tokens is None else past_tokens.joined(self.tokens, known)
        before = (False,) * tokens.shape[0] if past is None else past.has_media()
        if known is None and not all(before):
            known = KnownTokens.read(tokens)
        now = before if known is None else known.has_media
        self.has_media = tuple(a or b for a, b in zip(before, now, strict=True))
        self.new_media = known is None or any(now)
        self._new_known = known
        self._known: KnownTokens | None = None
        self._checked: Tensor | None = None  # the bias that was last found to fit
        self.facts: dict[Hashable, Tensor] = {}
        self.any_media = any(self.has_media)
        self.inputs: Tensor | None = None
        self._all_inputs: Tensor | None = None
        self.rope: dict[str, tuple[Tensor, Tensor]] = {}
        self.memo: dict[Any, Any] = {}
        stored = past.get_seq_length() if past is not None else -1
        self.is_caching, self.keeps_inputs = is_caching, keeps_inputs
        self.left: set[int] = set()
        self.presence = presence
        # by layer the tokens in it, and the indices of a `LayerView`: a view itself would keep this forward alive
        self._standing: dict[int, Standing] = {}
        self.plans: dict[int, Plan] = {}
        self.beside: dict[int, Slots] = {}
        self.foresight: Request[Foresight] | None = None
        self._packed: dict[int, Standing] = {}
        self._said: dict[int, Tensor] = {}
        self._all_positions: dict[str, list[Tensor]] = {}
        # what another graft of this name left, or this one before a gap, is of no use
        self._cached = {
            name: layer
            for name, layer in (cached or {}).items()
            if layer.get_seq_length() == stored and layer.owner_id == requests.owner_id(name)
        }
        self._new: dict[str, dict[tuple[int, ...], tuple[Tensor, Tensor]]] = defaultdict(dict)

    def known(self, *, exactly: bool = False) -> KnownTokens:
        """All tokens, as the host knows them; what it does not know yet is read from the device.

        Args:
            exactly: padding has to be told from text.
        """
        known = self.known_so_far
        if known is None or (exactly and not known.is_exact):
            known = self._known = KnownTokens.read(self.all_tokens)
        return known

    @property
    def known_new(self) -> KnownTokens:
        """The new tokens, as the host knows them; what it does not know yet is read from the device."""
        if self._new_known is None or not self._new_known.is_exact:
            self._new_known = KnownTokens.read(self.tokens)
        return self._new_known

    @property
    def known_so_far(self) -> KnownTokens | None:
        """What the host knows of all tokens without waiting for the device; None where it lacks some."""
        if self._known is None:
            before = None if self.past is None else self.past.known
            if self._new_known is not None and self.past_tokens is None:
                self._known = self._new_known
            elif self._new_known is not None and before is not None:
                self._known = before.append(self._new_known)
        return self._known

    def at(self, layer: int) -> LayerView:
        """The tokens of this forward as they stand in a decoder layer."""
        if layer not in self._standing:
            if layer in self.beside:
                self.pack(layer, self.stood(None, self.beside[layer].places))
                return LayerView(self, layer, *self._standing[layer])
            if self.presence is None:
                return LayerView(self, layer, self.tokens)
            self._stand(layer, None)
        return LayerView(self, layer, *self._standing[layer])

    def _stand(self, layer: int, index: Tensor | None) -> None:
        """Note which new tokens stand in a layer, and thereby which keys."""
        tokens = self.tokens if index is None else self.tokens.pick(index)
        cached = None if self.presence is None else self.presence.index(layer)
        keys = None
        if index is not None or cached is not None:
            known, (batch, count) = self.all_tokens.shape[1] - self.tokens.shape[1], self.tokens.shape
            places = torch.arange(known + count, device=self.tokens.device).expand(batch, -1)
            new = places[:, known:] if index is None else index + known
            keys = torch.cat([places[:, :known] if cached is None else cached, new], dim=1)
        self._standing[layer] = tokens, index, keys, None

    def pack(self, layer: int, standing: Standing) -> None:
        """From here on these tokens stand in a decoder layer."""
        self._packed[layer] = self._standing[layer] = standing

    def stood(self, lane: Lane | None, keys: Tensor | None) -> Standing:
        """Of a layer in which the tokens of a lane stand, and whose attention is given keys of (B, K) tokens; None:
        all."""
        if lane is None:
            return self.tokens, None, keys, None
        return self.once(Lane.tokens, lane, self.tokens), lane.index, keys, lane.real

    @contextmanager
    def narrowed(self, layer: int, lane: Lane) -> Iterator[None]:
        """Inside, the tokens of a lane stand in a decoder layer, while its attention or its MLP runs."""
        before = self._standing[layer]
        self._standing[layer] = self.stood(lane, before[2])
        try:
            yield
        finally:
            self._standing[layer] = before

    @contextmanager
    def foreseeing(
        self, layer: int, request: Request[Foresight], lane: Lane | None, keys: Tensor | None
    ) -> Iterator[None]:
        """Inside, the tokens of a lane stand in a decoder layer, which is run for its attention alone."""
        before = self._standing.get(layer), self._packed.get(layer)
        self.pack(layer, self.stood(lane, keys))
        self.foresight = request
        try:
            yield
        finally:
            self.foresight = None
            for table, entry in zip((self._standing, self._packed), before, strict=True):
                table.pop(layer, None)
                if entry is not None:
                    table[layer] = entry

    def unpack(self, layer: int) -> None:
        """From here on all tokens of the forward are there again."""
        self._standing.pop(layer, None)

    def held(self, layers: Sequence[int]) -> Tensor | None:
        """(B, 1) of how many cached tokens, padding left out, some layers hold keys that all hold the same; None where
        all of them let go of those behind a window."""
        if self.past_tokens is None or self.layer_cache is None:
            return torch.zeros(self.tokens.shape[0], 1, dtype=torch.int64, device=self.tokens.device)
        valid = self.past_tokens.valid
        for layer in layers:
            there: Any = self.layer_cache.layers[layer]
            if getattr(there, "is_sliding", False):
                continue
            if isinstance(there, LeanLayer):
                valid = valid.gather(1, there.slots.places)
                valid = valid if there.slots.real is None else valid & there.slots.real
            return valid.sum(dim=1, keepdim=True)
        return None

    def once(self, make: Callable[..., _T], *by: Any) -> _T:
        """What a function gives for these arguments, computed once in this forward: for the same objects, not for equal
        ones, but for numbers."""
        key = (make, *[each if isinstance(each, (int, float)) else id(each) for each in by])
        if key not in self.memo:
            self.memo[key] = make(*by), by
        return self.memo[key][0]

    def meet(self, layer: int, count: int, kwargs: Mapping[str, Any], *, inside: bool = False) -> None:
        """Find out which tokens a decoder layer or its attention was given.

        Args:
            layer: index of the decoder layer.
            count: how many tokens per sample it was given.
            kwargs: its keyword arguments.
            inside: whether it was its attention, which is given the packed ones where the layer's tokens were packed.

        Raises:
            SeamError: it was given some of the tokens, and which of them cannot be known.
        """
        if inside and layer in self._packed:
            self._standing[layer] = self._packed[layer]  # also where gradient checkpointing computes the layer again
            return
        if count == self.tokens.shape[1]:
            if self._standing and self._index(layer) is not None:
                self._stand(layer, None)
            return
        left = [table for table in self._positions(kwargs) if table.shape[1] == count]
        every = self._all_positions.get(self.anatomy.layer_type(layer), []) if left else []
        index = None
        for guess in (self._said.get(layer), self._index(layer), self._index(layer - 1)):
            # as was said, or as in the layer before, unless the positions say otherwise
            if guess is not None and guess.shape[1] == count and (not every or _stand_at(left, every, guess)):
                index = guess
                break
        if index is None and every and len(left) == len(every):
            index = located(left, every, self.tokens.shape[0])
        if index is None:
            raise SeamError(
                f"decoder layer {layer} was given {count} tokens of {self.tokens.shape[1]}, and their positions do not "
                "say which",
                remedy="a hook that takes tokens out has to pick position_embeddings (and position_ids) with them, in "
                "that layer and all later ones, behind the first; where positions repeat, say which tokens are left: "
                "seam.on(Point.BLOCK_INPUT, layer, function, phase=Phase.TOKENS, ...)",
            )
        self._stand(layer, index)

    def leave_tokens(self, layer: int, index: Tensor) -> None:
        """Have it known that of the new tokens only those at (B, M) `index` are left in a decoder layer."""
        self._said[layer] = index.to(self.tokens.device)

    def _index(self, layer: int) -> Tensor | None:
        """(B, M) of the new tokens that stand in a layer; None where all do, as far as is known."""
        return self._standing[layer][1] if layer in self._standing else None

    def _positions(self, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """What says where the tokens of a layer stand: (B or 1, M, R) RoPE tables, else (B or 1, M, 1) positions."""
        rope = self.anatomy.rope(dialect.rope_of(kwargs))
        if rope is not None:
            return list(rope)
        positions = dialect.positions_of(kwargs)
        return [] if positions is None or positions.dim() != 2 else [positions[..., None]]

    @property
    def is_step(self) -> bool:
        """Whether it is of one token per sample behind a cache, as `generate` adds word by word."""
        return self.past_tokens is not None and self.tokens.shape[1] == 1

    @property
    def is_withdrawn(self) -> bool:
        """Whether some decoder layer that was looked at did not get all tokens."""
        return any(index is not None for _, index, _, _ in self._standing.values())

    def presence_of_tokens(self) -> Tensor:
        """(B, S, layers) bool: the new token stands in the layer."""
        present = torch.ones(*self.tokens.shape, self.anatomy.num_layers, dtype=torch.bool, device=self.tokens.device)
        for layer, (_, index, _, _) in self._standing.items():
            if index is not None:
                present[..., layer] = False
                present[..., layer].scatter_(1, index, True)
        return present

    def enter(
        self, index: int, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Note what a decoder layer is given.

        Args:
            index, layer: the decoder layer.
            hidden: (B, S, d) its input.
            args, kwargs: its arguments, by position and by name.

        Raises:
            SeamError: another cache than the one this forward began with.
        """
        if index == 0:
            self.layer_cache = self._checked_cache(layer, args, kwargs)
            self.inputs = hidden if self.keeps_inputs else hidden.narrow(-1, 0, 0)
        kind = self.anatomy.layer_type(index)
        if kind in self._all_positions:
            return
        told = self._positions(kwargs)
        has_rope = dialect.rope_of(kwargs) is not None
        if has_rope and told[0].shape[1] != self.tokens.shape[1]:
            raise SeamError(
                f"decoder layer {index}, the first of its kind ({kind}), was not given the positions of all tokens",
                remedy="attach before the hook that takes tokens out is put there, or take them out in a later layer",
            )
        self._all_positions[kind] = told
        if has_rope:
            self.rope[kind] = told[0], told[1]

    def _checked_cache(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The cache that decoder layers add their keys to, which has to be the one this forward began with, or an
        empty one that the decoder made."""
        given = dialect.cache_in(args)
        cache = dialect.cache_of(kwargs, where=type(layer).__name__) if given is None else given
        lost = self.cache is not None and cache is None and self.past_tokens is not None
        if lost or (cache is not self.cache and cache is not None and int(cache.get_seq_length())):
            raise SeamError(
                f"{type(layer).__name__} was handed another cache than the model, with "
                f"{0 if cache is None else int(cache.get_seq_length())} tokens in it",
                remedy="hand the model the cache to continue, and turn gradient checkpointing off while continuing one",
            )
        return cache

    # -- values stored per token for later forwards --------------------------------------------------------------------

    def is_cached(self, name: str, layer: int) -> bool:
        """Whether the values that `to_cache` was given are known for all past tokens."""
        return name in self._cached and layer in self._cached[name].layers

    @torch.compiler.disable  # lengths change with every step, and each would be compiled anew
    def to_cache(self, name: str, layers: Sequence[int], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Have two tensors of tokens stored in the cache when this forward ends, if it has one.

        Args:
            name: of the graft, which must store something for the same layers in every forward.
            layers: the decoder layers they belong to, some that follow one another among the graft's.
            keys, values: (B, layers * h, S, w) of the new tokens; (B, layers * h, P + S, w) where nothing `is_cached`.

        Returns:
            (B, layers * h, P + S, w) of all tokens; not to be written to.
        """
        if self.is_caching:
            self._new[name][tuple(layers)] = keys, values
        return self._cached[name].peek(layers, keys, values) if self.is_cached(name, layers[0]) else (keys, values)

    def commit(self, cache: Cache) -> None:
        """Store what grafts gave for it in the cache, and take away what was not kept up."""
        given = {name: sorted(layer for layers in new for layer in layers) for name, new in self._new.items()}
        for name, layer in GraftCacheLayer.of(cache).items():
            if name not in self._cached or given.get(name, []) != list(layer.layers):
                cache.layers.remove(layer)
        for name, new in self._new.items():
            if name not in self._cached:
                self._cached[name] = GraftCacheLayer(name, self.requests.owner_id(name), given[name])
                cache.layers.append(self._cached[name])
            if given[name] == list(self._cached[name].layers):
                self._cached[name].append(new)
        self._new.clear()

    def is_disabled(self, name: str) -> bool:
        """Whether the graft of that name takes no part in this forward."""
        return name not in self.requests.owners or self.requests.owner_id(name) in self.marks

    @property
    def is_second(self) -> bool:
        """Whether it is run again for the sake of a contrast: nobody reads it then."""
        return SECOND in self.marks

    def _asked(self, requests: Sequence[Request[_T]]) -> list[Request[_T]]:
        """Those that are for this forward; what probes of other threads ask is not."""
        found = []
        for request in requests:
            # looked up, never gone through: torch 2.7 cannot compile that
            if request.mark is None or request.mark in self.marks:
                found.append(request)
        return found

    def requested_sums(self, module: nn.Module, queries: int, keys: int) -> list[tuple[Request[Sums], Tensor]]:
        """Who wants which sums of attention in this attention module's layer.

        Raises:
            SeamError: the module has other queries or keys than this forward knows of.
        """
        index: int = module.layer_idx  # type: ignore[assignment]
        asked = self._asked(self.requests.sums.get(index, ()))
        if self.is_second:
            asked = [request for request in asked if not request.by.separate_pass]
        if not asked:
            return []
        view, wanted = self.at(index), []
        for request in asked:
            values = request.by.key_values(view)
            if values is not None:
                wanted.append((request, view.pick_keys(values)))
        if wanted:
            self._check_lengths(view, queries, keys)
        return wanted

    def requested_weights(self, module: nn.Module, queries: int, keys: int) -> list[tuple[Request[Weights], Tensor]]:
        """Who wants the attention of which (B, n) queries of this attention module.

        Raises:
            SeamError: it was given none of them, or other queries or keys than this forward knows of.
        """
        index: int = module.layer_idx  # type: ignore[assignment]
        wanted = []
        asked = self._asked(self.requests.weights.get(index, ())) if self.foresight is None else [self.foresight]
        for request in asked:
            view = self.at(index)
            chosen = request.by.queries(view)
            if chosen is not None:
                self._check_lengths(view, queries, keys)
                wanted.append((request, view.rows(chosen)))
        return wanted

    def requested_heads(self, module: nn.Module, queries: int, keys: int) -> list[Request[Heads]]:
        """Who wants queries and keys of this attention module.

        Raises:
            SeamError: the module has other queries or keys than this forward knows of.
        """
        index: int = module.layer_idx  # type: ignore[assignment]
        asked = self._asked(self.requests.heads.get(index, ())) if self.foresight is None else []
        if asked:
            self._check_lengths(self.at(index), queries, keys)
        return asked

    def key_bias(self, module: nn.Module, queries: int, keys: int) -> Tensor | None:
        """(B or 1, H or 1, queries or 1, K) what is to be added to the logits of this attention module's layer, for the
        K of its keys that are known; None where nothing is.

        Raises:
            UsageError: a bias of another shape. SeamError: the module has other queries or keys than are known.
        """
        index: int = module.layer_idx  # type: ignore[assignment]
        total, view = None, None
        for request in self._asked(self.requests.biases.get(index, ())):
            view = self.at(index)
            bias = request.by.key_bias(view)
            if bias is not None:
                if bias is not self._checked:  # the same for many layers, most often
                    self._check_bias(request.by, bias)
                    self._checked = bias
                total = bias if total is None else total + bias
        if total is None or view is None:
            return None
        self._check_lengths(view, queries, keys)
        return view.pick_pairs(total)

    @cached_property
    def implementation(self) -> str:
        """The attention that the decoder runs; a config takes long to answer."""
        name: str = self.anatomy.config._attn_implementation
        return name

    def _check_bias(self, by: Bias, bias: Tensor) -> None:
        (batch, new), heads = self.tokens.shape, self.anatomy.num_heads
        sizes = (batch, heads, new)
        fits = bias.dim() == 4 and all(have in (1, size) for have, size in zip(bias.shape[:3], sizes, strict=True))
        if not fits or bias.shape[3] != self.all_tokens.shape[1]:
            raise UsageError(
                f"{type(by).__name__} gave a bias of {tuple(bias.shape)}",
                remedy=f"give one of ({batch} or 1, {heads} or 1, {new} or 1, {self.all_tokens.shape[1]}): samples, "
                "heads, new tokens, all tokens so far",
            )

    def is_asked(self, layer: int) -> bool:
        """Whether anybody wants to know of the attention in a layer of this forward."""
        return bool(self._asked(self.requests.sums.get(layer, ())) or self._asked(self.requests.weights.get(layer, ())))

    def reads_attention(self, layer: int, but: Sequence[Any]) -> bool:
        """Whether anybody reads or biases the attention of a layer of this forward.

        Args:
            but: those who do not count.
        """
        now = self.requests
        asked = [each.get(layer, ()) for each in (now.biases, now.weights, now.heads, now.branches)]
        view = self.at(layer)
        sums = [each for each in self._asked(now.sums.get(layer, ())) if all(each.by is not known for known in but)]
        others = any(each.by.key_values(view) is not None for each in sums)
        return others or any(bool(self._asked(each)) for each in asked)

    @property
    def room(self) -> int | None:
        """How many tokens a cache of fixed size has room for; None where it grows, or where there is none."""
        layers = getattr(self.layer_cache, "layers", None) or []
        rooms = [layer.max_cache_len for layer in layers if isinstance(layer, StaticLayer)]
        return max(rooms, default=None)

    def check_unread(self, layer: int, *, is_skipped: bool) -> None:
        """Refuse that no token attends in a layer whose attention somebody wants to know.

        Args:
            is_skipped: the layer is left out as a whole, and with it whatever a graft would add there.

        Raises:
            SeamError: somebody does.
        """
        now = self.requests
        readers = [each for each in self._asked(now.sums.get(layer, ())) if each.by.separate_pass or not is_skipped]
        weights, heads = now.weights.get(layer, ()), now.heads.get(layer, ())
        if bool(readers) or bool(self._asked(weights)) or bool(self._asked(heads)):
            raise SeamError(
                f"a policy has no token attend in decoder layer {layer}, whose attention is asked for",
                remedy="leave attention in layers that grafts, probes or policies read it in, or put these on others",
            )

    def subscribers(self, layer: int) -> list[Request[BranchReader]]:
        """Those who want to know the branches of a layer of this forward. Usually nobody: then nothing is published."""
        return [] if self.is_second else self._asked(self.requests.branches.get(layer, ()))

    def publish(self, layer: int, branch: Branch) -> None:
        """Tell those who want to know of a branch of attention in a decoder layer."""
        for request in self.subscribers(layer):
            request.by.on_branch(self.at(layer), branch)

    def _check_lengths(self, view: LayerView, queries: int, keys: int) -> None:
        """What attention is given has to be what is known to stand in its layer."""
        layer = view.layer
        new = view.tokens.shape[1]
        known = self.all_tokens.shape[1] if view.key_index is None else view.key_index.shape[1]
        layers = getattr(self.layer_cache, "layers", None) or []
        cached: Any = layers[layer] if layer < len(layers) else None
        window = getattr(cached, "is_sliding", False)  # keeps the last keys only
        room = getattr(cached, "is_compileable", False)  # has a blank tail
        if queries != new or (keys < known and not window) or (keys > known and not room):
            raise SeamError(
                f"the attention of layer {layer} was given {queries} queries and {keys} keys, where {new} new and "
                f"{known} tokens in all are known",
                remedy=dialect.REMEDY,
            )

    def split(self, requests: Sequence[Request[Any]]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Indices of the samples of which something is asked, those of the others, and where each sample is found in
        these two lists put together; None when it is asked of all."""
        if all(self.has_media) or not all(request.is_gated for request in requests):
            return None
        if "split" not in self.memo:
            asked = self.all_tokens.is_perceptual.any(dim=1)
            order = asked.to(torch.int8).argsort(descending=True, stable=True)
            count = sum(self.has_media)
            self.memo["split"] = order[:count], order[count:], order.argsort()
        return self.memo["split"]

    def all_inputs(self) -> Tensor:
        """(B, P + S, d) first-layer inputs of all tokens."""
        assert self.inputs is not None, "the first decoder layer has not been entered"
        if self.past is None:
            return self.inputs
        if self._all_inputs is None:
            alike = self.past.inputs.dtype == self.inputs.dtype and self.past.inputs.device == self.inputs.device
            if alike and self.growing is not None and not torch.is_grad_enabled():
                self._all_inputs = self.growing.peek_inputs(self.inputs)
            else:
                self._all_inputs = torch.cat([self.past.inputs.to(self.inputs), self.inputs], dim=1)
        return self._all_inputs

    def facts_of_tokens(self, key: Hashable, facts: Callable[[TokenMap], Tensor]) -> Tensor:
        """(.., P + S) something about every token that follows from its modality, item and role; not to be written to.

        The cache remembers it of the P tokens in it, from one forward that asks to the next.

        Args:
            key: what it is.
            facts: gives (.., tokens) of it, about all tokens or the new ones.
        """
        if self.growing is None or torch.is_grad_enabled():
            return facts(self.all_tokens)
        if key not in self.facts:
            self.facts[key] = self.growing.peek_facts(key, facts, self.all_tokens, self.tokens)
        return self.facts[key].narrow(-1, 0, self.all_tokens.shape[1])

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


def _stand_at(left: Sequence[Tensor], every: Sequence[Tensor], index: Tensor) -> bool:
    """Whether the tokens of (B or 1, M, R) tables are those at (B, M) of (B or 1, S, R) ones."""
    return all(bool((gather(b, index) == a).all()) for a, b in zip(left, every, strict=True))
