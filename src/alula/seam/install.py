"""Installing the seam: hooks that give every forward its `ForwardContext`, and its tokens into the cache afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from alula.anatomy import Anatomy, unwrap
from alula.errors import AlulaError, SeamError, UsageError
from alula.items import SHAPES, brings_media
from alula.seam import dialect, preconditions
from alula.seam.attention import close_attention, open_attention
from alula.seam.cache import GraftCacheLayer, SecondCache, TokenCache, TokenPresence
from alula.seam.compiled import CompiledLayer, Region, check_compilable, compiled
from alula.seam.conductor import check_readable
from alula.seam.context import NAME, ForwardContext
from alula.seam.embeddings import EmbeddingHooks, Rewriter
from alula.seam.growing import let_grow
from alula.seam.hooks import ByThread, Handle, with_keywords
from alula.seam.points import (
    AnyPoint,
    Entry,
    LayerHooks,
    PartMaker,
    Phase,
    Point,
    PointFunction,
    check_named,
    check_point,
)
from alula.seam.requests import (
    Bias,
    BranchReader,
    Contrast,
    Ending,
    Foresight,
    Heads,
    Owner,
    Request,
    Requests,
    Sums,
    Tower,
    Weights,
    Worker,
)
from alula.seam.scope import SECOND, marked_instead, marks
from alula.seam.tested import tell_untested
from alula.seam.tower import TowerHooks
from alula.seam.vocabulary import VocabularyHooks, Wider
from alula.tokens import TOKEN_ROLES, KnownTokens, Modality, Role, TokenMap, on_device

_changing = threading.RLock()  # held while it changes who is on a host
_given_tokens: ContextVar[Mapping[nn.Module, TokenMap]] = ContextVar("alula_given_tokens", default=MappingProxyType({}))
_given_inputs: ContextVar[Mapping[nn.Module, Mapping[str, Tensor]]] = ContextVar(
    "alula_given_inputs", default=MappingProxyType({})
)
_given_roles: ContextVar[Mapping[nn.Module, Tensor]] = ContextVar("alula_given_roles", default=MappingProxyType({}))


_T = TypeVar("_T")


class _Second(NamedTuple):
    """A forward that is to be run a second time."""

    request: Request[Contrast]
    changed: Mapping[str, Any]
    cache: Cache | None
    is_run: bool


class Seam(nn.Module):
    """The seam of one host, found at ``host.alula``. It owns no parameters.

    Its hooks are bound methods of this module, which is part of the host's module tree: a deep copy of the host gets
    hooks that belong to the copy.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        self.anatomy = anatomy
        self.requests = Requests()
        self._previous_attention: str | None = None
        self._input_users: set[str] = set()
        self._labels: ByThread[Tensor | None] = ByThread()
        self._seconds: ByThread[_Second] = ByThread()
        self._tower = TowerHooks(anatomy, self._marks)
        self._embeddings = EmbeddingHooks(anatomy)
        self._vocabulary = VocabularyHooks(anatomy)
        self._names = dialect.positional_names(anatomy.backbone)
        types = [anatomy.layer_type(index) for index in range(anatomy.num_layers)]
        firsts = {types.index(kind) for kind in types}
        self._layers = [LayerHooks(anatomy, i, is_watched=i in firsts) for i in range(anatomy.num_layers)]
        self._handles = [
            anatomy.host.register_forward_pre_hook(self._settle, with_kwargs=True),
            anatomy.host.register_forward_hook(self._contrast, with_kwargs=True),
            anatomy.backbone.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            anatomy.backbone.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    # -- who needs what -------------------------------------------------------------------------------------------

    def request_sums(self, layer: int, sums: Sums, *, gated: bool = False, mark: Hashable | None = None) -> Handle:
        """Have `sums` receive sums of attention in a decoder layer, until the handle is removed.

        Args:
            layer: index of the decoder layer.
            sums: says which sums, and takes them.
            gated: it needs no sums of samples that have no media so far (it may receive zeros); those samples keep the
                decoder's own attention, bit for bit, also in one batch with others.
            mark: only in forwards that carry this mark (see `scope`).

        Raises:
            HostError: the decoder runs an attention implementation that cannot be asked.
        """
        request = Request(sums, mark, gated)

        def put(requests: tuple[Request[Sums], ...]) -> None:
            self.requests = replace(self.requests, sums=_with_layer(self.requests.sums, layer, requests))
            self._read_weights(layer)

        return self._ask_attention(layer, request, lambda: self.requests.sums.get(layer, ()), put)

    def request_weights(self, layer: int, weights: Weights, *, mark: Hashable | None = None) -> Handle:
        """Have `weights` receive the attention of a few tokens in a decoder layer, until the handle is removed.

        Args:
            layer: index of the decoder layer.
            weights: says of which, and takes it.
            mark: only in forwards that carry this mark (see `scope`).

        Raises:
            HostError: the decoder runs an attention implementation that cannot be asked.
        """
        check_readable(self.anatomy)
        request = Request(weights, mark)

        def put(requests: tuple[Request[Weights], ...]) -> None:
            self.requests = replace(self.requests, weights=_with_layer(self.requests.weights, layer, requests))
            self._read_weights(layer)

        return self._ask_attention(layer, request, lambda: self.requests.weights.get(layer, ()), put)

    def request_foresight(self, layer: int, foresight: Foresight, *, mark: Hashable | None = None) -> Handle:
        """Have `foresight` receive the attention of a few new tokens to the new tokens in a decoder layer, before
        anybody is asked who has work there, until the handle is removed.

        The layer is run for it as far as its queries and keys, by the tokens that `foresight` names.

        Args:
            layer: index of the decoder layer.
            foresight: says of which, and takes it.
            mark: only in forwards that carry this mark (see `scope`).

        Raises:
            HostError: the decoder runs an attention implementation that does not show queries and keys.
        """
        check_readable(self.anatomy, shows_heads=True)
        request, hooks = Request(foresight, mark, is_ahead=True), self._layers[layer]

        def put(requests: tuple[Request[Foresight], ...]) -> None:
            hooks.foresights = requests
            hooks.update()

        return self._ask_attention(layer, request, lambda: hooks.foresights, put)

    def request_tower(self, tower: Tower, *, owner: str, mark: Hashable | None = None) -> Handle:
        """Have `tower` read what the host's vision tower makes of images, until the handle is removed.

        Args:
            tower: what it gives is at ``ForwardContext.of_tower`` until the tower runs again in this thread.
            owner: under which name it is there.
            mark: only where forwards would carry this mark (see `scope`).

        Raises:
            HostError: the host has no tower whose layers are known.
        """
        request = Request(tower, mark)
        with _changing:
            self._tower.put(owner, request)
        return Handle(self._drop, None, request)

    def request_features(self, *, owner: str) -> Handle:
        """Have what the vision tower hands to the connector of images, (images, positions, width), kept without
        gradients until the handle is removed: see `features_of`, and ``ForwardContext.of_tower`` under that name.

        Args:
            owner: under which name it is there.

        Raises:
            HostError: the host has no connector that only images go through.
        """
        self.anatomy.image_connector  # noqa: B018 - refuses where there is none
        with _changing:
            return self._tower.keep_features(owner)

    def features_of(self, owner: str) -> Tensor:
        """(images, positions, width) of the images that the tower made last in this thread, for who requested them."""
        return (self._tower.notes.get() or {})[owner]

    def request_embeddings(self, rewriter: Rewriter, *, mark: Hashable | None = None) -> Handle:
        """Have `rewriter` write the decoder's inputs anew in forwards that bring images, until the handle is removed.

        Args:
            rewriter: is handed them, what the connector was given, and a way to have the decoder read them first.
            mark: only in forwards that carry this mark (see `scope`).

        Raises:
            HostError: the host has no connector that only images go through.
        """
        request = Request(rewriter, mark)
        with _changing:
            self._embeddings.put(request)
        return Handle(self._drop, None, request)

    def request_wider(self, wider: Wider) -> Handle:
        """Have `wider` embed and tell ids behind the host's own vocabulary, until the handle is removed: the host takes
        them among its ids, and its logits are longer.

        Raises:
            HostError: the host has no head. UsageError: somebody else has ids there.
        """
        request = Request(wider)
        with _changing:
            self._vocabulary.put(request)
        return Handle(self._drop, None, request)

    @property
    def rewrites(self) -> bool:
        """Whether somebody writes the decoder's inputs anew (`request_embeddings`)."""
        return bool(self._embeddings.requests)

    @property
    def own_vocabulary(self) -> int | None:
        """How many ids are the host's own, where somebody has ids behind them (`request_wider`); else None."""
        return self._vocabulary.own

    def request_heads(self, layer: int, heads: Heads, *, mark: Hashable | None = None) -> Handle:
        """Have `heads` receive queries and keys of a decoder layer's attention, until the handle is removed.

        Args:
            layer: index of the decoder layer.
            heads: takes them.
            mark: only in forwards that carry this mark (see `scope`).

        Raises:
            HostError: the decoder runs an attention implementation that does not show them.
        """
        check_readable(self.anatomy, shows_heads=True)
        request = Request(heads, mark)

        def put(requests: tuple[Request[Heads], ...]) -> None:
            self.requests = replace(self.requests, heads=_with_layer(self.requests.heads, layer, requests))
            self._read_weights(layer)

        return self._ask_attention(layer, request, lambda: self.requests.heads.get(layer, ()), put)

    def _is_read(self, layer: int) -> bool:
        """Whether anybody wants to know of a layer's attention."""
        now = self.requests
        return layer in now.sums or layer in now.weights or layer in now.heads

    def _read_weights(self, layer: int) -> None:
        """Have eager attention's weights read in a layer, or no more."""
        hooks = self._layers[layer]
        hooks.reads_weights = self._is_read(layer)
        hooks.update()

    def request_bias(self, layer: int, bias: Bias, *, mark: Hashable | None = None) -> Handle:
        """Have what `bias` gives added to the logits of attention in a decoder layer, until the handle is removed.

        Those of several add up. What grafts attend to beside the decoder's own attention is not biased.

        Args:
            layer: index of the decoder layer.
            bias: gives it.
            mark: only in forwards that carry this mark (see `scope`).

        Raises:
            HostError: the decoder runs an attention implementation that cannot be biased.
        """
        request = Request(bias, mark)

        def put(requests: tuple[Request[Bias], ...]) -> None:
            self.requests = replace(self.requests, biases=_with_layer(self.requests.biases, layer, requests))
            self._layers[layer].is_biased = bool(requests)
            self._layers[layer].update()

        return self._ask_attention(layer, request, lambda: self.requests.biases.get(layer, ()), put)

    def request_contrast(self, contrast: Contrast, *, mark: Hashable) -> Handle:
        """Have forwards of the host that carry `mark` (see `scope`) run a second time, and their logits replaced, until
        the handle is removed.

        Args:
            contrast: says what the second run is given, and makes logits of both.
            mark: second runs carry ``contrast.second`` in its place.
        """
        request = Request(contrast, mark)
        with _changing:
            self.requests = replace(self.requests, contrasts=(*self.requests.contrasts, request))
        return Handle(self._drop, None, request)

    def request_work(
        self, layer: int, worker: Worker, *, has_parts: bool = False, mark: Hashable | None = None
    ) -> Handle:
        """Have only those new tokens of a forward computed in a decoder layer that have work there, until the handle is
        removed. Where several say it, those have work that have it by all.

        The others leave neither keys nor values there, and their hidden states pass the layer by as they are.

        Args:
            layer: index of the decoder layer.
            worker: says which.
            has_parts: its work tells the layer's attention from its MLP.
            mark: only in forwards that carry this mark (see `scope`).

        Raises:
            HostError: the decoder runs an attention implementation whose masks cannot be read; or its layers have no
                MLP module.
        """
        check_readable(self.anatomy)
        self.anatomy.check_tokens_apart(layer)
        if has_parts:
            self.anatomy.mlp(layer)
        request = Request(worker, mark, has_parts=has_parts)
        with _changing:
            there = (*self.requests.workers.get(layer, ()), request)
            self.requests = replace(self.requests, workers=_with_layer(self.requests.workers, layer, there))
            self._tell_of_workers(layer)
            self._layers[layer].update()
        return Handle(self._drop, layer, request)

    def _tell_of_workers(self, layer: int) -> None:
        there = self.requests.workers.get(layer, ())
        self._layers[layer].has_workers = bool(there)
        self._layers[layer].has_parts = any(request.has_parts for request in there)

    def _ask_attention(
        self,
        layer: int,
        request: Request[_T],
        present: Callable[[], tuple[Request[_T], ...]],
        put: Callable[[tuple[Request[_T], ...]], None],
    ) -> Handle:
        """Add a request to those that are `present`, and see to it that the decoder's attention knows of requests."""
        self.anatomy.attention(layer)  # refuses where there is none
        with _changing:
            if self._previous_attention is None:
                self._previous_attention = open_attention(self.anatomy)
            put((*present(), request))
        return Handle(self._drop, layer, request)

    def _rest_attention(self) -> None:
        """Give the decoder its own attention function back where nobody asks any more."""
        now = self.requests
        is_asked = now.sums or now.biases or now.weights or now.heads or any(each.foresights for each in self._layers)
        if not is_asked and self._previous_attention is not None:
            close_attention(self.anatomy, self._previous_attention)
            self._previous_attention = None

    def subscribe(self, layer: int, reader: BranchReader, *, mark: Hashable | None = None) -> Handle:
        """Have `reader` told of each branch that is published in a decoder layer, until the handle is removed.

        Args:
            layer: index of the decoder layer.
            reader: takes the branches.
            mark: only in forwards that carry this mark (see `scope`).
        """
        request = Request(reader, mark)

        def put(requests: tuple[Request[BranchReader], ...]) -> None:
            self.requests = replace(self.requests, branches=_with_layer(self.requests.branches, layer, requests))

        with _changing:
            put((*self.requests.branches.get(layer, ()), request))
        return Handle(self._drop, layer, request)

    def on(
        self,
        point: AnyPoint,
        layer: int,
        function: PointFunction,
        *,
        phase: Phase,
        owner: str,
        mark: Hashable | None = None,
        part: PartMaker | None = None,
    ) -> Handle:
        """Call ``function(view, hidden)`` at a point of a decoder layer; what it returns takes the place of `hidden`.

        Args:
            point: where in the layer; an `InputOf` can only be read, and what stands at an `OutputOf` is told the
                module's input too.
            layer: index of the decoder layer.
            function: given the `LayerView` and the (B, M, d) hidden states; returns others, or None to leave them.
            phase: when at that point: edits first, then what grafts add, then readings. A function of the phase TOKENS
                changes nothing; it returns the (B, M) indices of the tokens that are left in this layer and later ones.
            owner: name under which its owner holds the seam.
            mark: call it only in forwards that carry this mark (see `scope`).
            part: what stands at the output of attention in a layer that is compiled (see `compile_layers`); None: the
                layer runs uncompiled while the function is there.

        Raises:
            UsageError: no such point or layer, or no function. HostError: the host has no such point, or it can only be
                read.
        """
        if not callable(function):
            raise UsageError(f"what stands at a point is called, and a {type(function).__name__} cannot be")
        point, (layer,) = check_named(point), self.anatomy.layer_indices([layer])
        check_point(self.anatomy, point, layer, phase)
        entry, hooks = Entry(phase, function, owner, mark, part), self._layers[layer]
        with _changing:
            hooks.put(point, entry)
        return Handle(self._drop, layer, entry)

    def compile_layers(self, **options: Any) -> Handle:
        """Have the decoder's layers run compiled, with what grafts add to them, until the handle is removed or the last
        owner lets go of the seam.

        Args:
            options: of `torch.compile`.

        Raises:
            HostError: its layers cannot be compiled with grafts. UsageError: they are compiled already.
        """
        with _changing:
            if any(hooks.compiled is not None for hooks in self._layers):
                raise UsageError("the decoder's layers are compiled already", remedy="remove the handle first")
            check_compilable(self.anatomy)
            region, told = compiled(**options), set[str]()
            for index, hooks in enumerate(self._layers):
                hooks.compiled = CompiledLayer(self.anatomy, index, region, hooks.parts, told)
                hooks.update()
        return Handle(self._uncompile, region)

    def _uncompile(self, region: Region) -> None:
        with _changing:
            for hooks in self._layers:
                if hooks.compiled is not None and hooks.compiled.region is region:
                    hooks.compiled = None
                    hooks.update()

    def at_end(self, function: Callable[[ForwardContext], None], *, mark: Hashable) -> Handle:
        """Call ``function(ctx)`` when a forward that carries `mark` (see `scope`) has ended, its cache filled."""
        ending = Ending(function, mark)
        with _changing:
            self.requests = replace(self.requests, endings=(*self.requests.endings, ending))
        return Handle(self._drop, None, ending)

    def forget(self, mark: Hashable) -> None:
        """Take away all that was put at points or asked for in forwards that carry a mark (see `scope`)."""
        self._let_go(range(len(self._layers)), lambda each: each.mark == mark)

    def _drop(self, layer: int | None, one: Entry | Request[Any] | Ending) -> None:
        """Take away one thing that was put at a point or asked for, in a layer or in none."""
        self._let_go(() if layer is None else (layer,), lambda each: each is one)

    def _let_go(self, layers: Iterable[int], is_gone: Callable[[Entry | Request[Any] | Ending], bool]) -> None:
        def left(asked: Mapping[int, tuple[Request[_T], ...]]) -> dict[int, tuple[Request[_T], ...]]:
            others = {layer: tuple(each for each in there if not is_gone(each)) for layer, there in asked.items()}
            return {layer: there for layer, there in others.items() if there}

        with _changing:
            now = self.requests
            self.requests = replace(
                now,
                sums=left(now.sums),
                biases=left(now.biases),
                weights=left(now.weights),
                heads=left(now.heads),
                branches=left(now.branches),
                workers=left(now.workers),
                contrasts=tuple(each for each in now.contrasts if not is_gone(each)),
                endings=tuple(ending for ending in now.endings if not is_gone(ending)),
            )
            self._tower.drop(is_gone)
            self._embeddings.drop(is_gone)
            self._vocabulary.drop(is_gone)
            for layer in layers:
                hooks = self._layers[layer]
                hooks.is_biased = layer in self.requests.biases
                hooks.reads_weights = self._is_read(layer)
                self._tell_of_workers(layer)
                hooks.drop(is_gone)
            self._rest_attention()

    def replace(self, point: Point, layer: int, module: nn.Module) -> Handle:
        """Have `module` stand in for a decoder layer's attention or MLP until the handle is removed.

        It is called as the host calls its own, and what stands at points of the layer stands there as before. The
        host's own module is out of its module tree meanwhile; a stand-in that needs it may hold it.

        Args:
            point: "attention" or "mlp".
            layer: index of the decoder layer.
            module: the stand-in.

        Raises:
            UsageError: another point, no such layer, or no module. HostError: the host has no MLP module.
        """
        if not isinstance(module, nn.Module):
            raise UsageError(f"a {type(module).__name__} is no module", remedy="give a torch.nn.Module")
        named, (layer,) = check_named(point), self.anatomy.layer_indices([layer])
        if not isinstance(named, Point) or named not in (Point.ATTENTION, Point.MLP):
            raise UsageError(f"nothing can stand in for {point}", remedy='replace "attention" or "mlp"')
        if named is Point.MLP:
            check_point(self.anatomy, Point.MLP_INPUT, layer, Phase.READ)
        with _changing:
            return self._layers[layer].replace(named, module)

    @property
    def owners(self) -> Mapping[str, Owner]:
        """The grafts, policies and probes on the host, by name."""
        return self.requests.owners

    def set_owner(self, name: str, owner: Owner) -> None:
        """Put `owner` in the place of who has the seam under `name`."""
        with _changing:
            self.requests = replace(self.requests, owners={**self.owners, name: owner})

    def keep_inputs(self, name: str) -> None:
        """Have the first layer's inputs stored in the cache for the owner of that name until it lets go of the seam."""
        self._input_users = self._input_users | {name}

    def release(self, name: str) -> None:
        """Let go of the seam; the last owner takes the hooks and the seam itself out of the host."""
        with _changing:
            owners = {each: owner for each, owner in self.owners.items() if each != name}
            self.requests = replace(self.requests, owners=owners)
            self._input_users = self._input_users - {name}
            if not owners:
                for handle in self._handles:
                    handle.remove()
                for hooks in self._layers:
                    hooks.release()
                delattr(self.anatomy.host, NAME)

    # -- one forward ----------------------------------------------------------------------------------------------

    @with_keywords
    @torch.compiler.disable  # bookkeeping on the host: nothing in it to fuse
    def _settle(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let a cache that was given under an older name too arrive (see `dialect.settled`), note the labels, and make
        ready for a second run."""
        self._labels.put(kwargs.get("labels"))
        self._vocabulary.begin(kwargs)
        kwargs = dialect.settled(kwargs, where=type(host).__name__)
        self._seconds.drop()
        request = self._asked_to_contrast()
        if request is not None:
            named = dialect.named_of(dialect.positional_names(host), args, kwargs)
            changed = request.by.changed({**_given_inputs.get().get(self, {}), **named})
            if changed is not None and kwargs.get("labels") is not None:
                raise UsageError(
                    "a loss was asked for under a contrast, which changes logits after the host has made its loss",
                    remedy="leave labels out, and take the loss of the logits that come back",
                )
            cache = None if changed is None else dialect.cache_of(named, where=type(host).__name__)
            self._seconds.put(_Second(request, changed or {}, SecondCache.before(cache), changed is not None))
        return args, kwargs

    def _asked_to_contrast(self) -> Request[Contrast] | None:
        """Who has a forward that begins now run a second time.

        Raises:
            UsageError: two do.
        """
        if not self.requests.contrasts:
            return None
        here = self._marks()
        asked = [request for request in self.requests.contrasts if request.mark in here]
        if len(asked) > 1:
            raise UsageError(
                "two contrasts at once: next tokens can be told against one second run, not two",
                remedy="leave one of the blocks, or give one of them guidance=1",
            )
        return asked[0] if asked else None

    @with_keywords
    @torch.compiler.disable  # it calls the host
    def _contrast(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Run a finished forward a second time for who asked for it, and give logits made of both."""
        second = self._seconds.get()
        self._seconds.drop()
        if second is None or not second.is_run:
            return None
        named = dialect.named_of(dialect.positional_names(host), args, kwargs)
        given_cache = dialect.cache_of(named, where=type(host).__name__)
        first = dialect.cache_of_output(output) if given_cache is None else given_cache
        given = {**named, **second.changed}
        if second.cache is not None:
            given[dialect.cache_keyword()] = second.cache
        deltas = preconditions.current_offset(self.anatomy)
        with marked_instead(second.request.mark, second.request.by.second, SECOND):
            others = host(**given)
        if deltas is not None:
            self.anatomy.backbone.rope_deltas = deltas.deltas  # what the first run left, which its cache knows
        SecondCache.ride(first, dialect.cache_of_output(others) if second.cache is None else second.cache)
        where = type(host).__name__
        logits = second.request.by.combined(
            dialect.logits_of(output, where=where), dialect.logits_of(others, where=where)
        )
        return dialect.output_with_logits(output, logits)

    @with_keywords
    @torch.compiler.disable  # bookkeeping on the host: nothing in it to fuse
    def _before_forward(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(zip(self._names, args, strict=False)) | dialect.settled(kwargs, where=type(backbone).__name__)
        if len(args) > len(self._names):
            raise SeamError(
                f"{type(backbone).__name__} was given {len(args)} arguments by position, of which the seam can name "
                f"{len(self._names)}",
                remedy="pass them by name",
            )
        input_ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if input_ids is None and embeds is None:
            return (), kwargs  # the host's own error says so
        if self._seconds.get() is None and self._asked_to_contrast() is not None:
            raise SeamError(
                f"{type(backbone).__name__} was called past its host, whose logits a contrast is to replace",
                remedy="call the model with its head, or generate",
            )
        self._embeddings.begin(kwargs)
        reference: Tensor = embeds[..., 0] if input_ids is None else input_ids  # type: ignore[index]
        cache = dialect.cache_of(kwargs, where=type(backbone).__name__)
        past = TokenCache.of(cache)
        length = 0
        if cache is not None:
            length = int(cache.get_seq_length()) if past is None else past.length_of(cache)
        preconditions.check_cache(self.anatomy, cache)
        mask = _key_mask(kwargs.get("attention_mask"), length, reference.shape[1])
        known = past is not None and past.get_seq_length() > 0
        past_tokens = None
        if self._input_users and length and not (past is not None and past.has_inputs):
            raise AlulaError(
                f"the cache holds {length} tokens that were computed before {', '.join(sorted(self._input_users))} was "
                "attached, so their inputs are not known",
                remedy="start from an empty cache after attaching",
            )
        if past is not None and known:
            if past.get_seq_length() != length:
                raise AlulaError(
                    f"the cache holds {length} tokens, and what stands in {past.get_seq_length()} of them is known: a "
                    "forward failed half-way, or tokens were added while nothing was attached",
                    remedy="crop the cache to the tokens before that, or start from an empty one",
                )
            past_tokens = past.tokens
        elif length:
            # a cache filled without the seam, e.g. by prefix tuning: its tokens are taken for text
            modalities = torch.zeros(reference.shape[0], length, dtype=torch.int64, device=reference.device)
            past_tokens = TokenMap.from_modalities(modalities, None if mask is None else mask[:, :length])
        further = self._take_further_inputs(kwargs, reference.shape[0])
        given, roles = kwargs.pop("token_map", None), kwargs.pop(TOKEN_ROLES, None)
        lent = _given_tokens.get().get(self)
        if given is None and lent is not None and past_tokens is None:
            given = _expand(lent, *reference.shape)
        new_mask = mask[:, mask.shape[1] - reference.shape[1] :] if mask is not None else None
        tokens, known_new = given, None
        if tokens is None:
            tokens, known_new = self._read_tokens(input_ids, reference, kwargs, new_mask, past, length > 0)
        if tokens.shape != tuple(reference.shape):
            raise UsageError(f"token_map describes {tokens.shape} tokens, the forward has {tuple(reference.shape)}")
        if roles is None and self in (lent_roles := _given_roles.get()):
            roles = _expand_roles(lent_roles[self], *reference.shape, past=length, device=reference.device)
        if roles is not None:
            tokens = tokens.with_roles(roles.to(tokens.device))
        preconditions.check(
            self.anatomy, kwargs, tokens, past_tokens, past.offset if past is not None and known else None
        )
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.anatomy.config, "use_cache", True)
        is_caching = cache is not None or bool(use_cache)
        tokens, past = tokens.to(reference.device), past if known else None
        kwargs[NAME] = ForwardContext(
            self.anatomy,
            self.requests,
            tokens,
            past_tokens,
            past,
            GraftCacheLayer.of(cache),
            presence=TokenPresence.of(cache) if known else None,
            keeps_inputs=bool(self._input_users),
            is_caching=is_caching,
            cache=cache,
            marks=self._marks(),
            of_tower=self._tower.notes,
            shapes=partial(self.anatomy.shapes, {name: kwargs[name] for name in SHAPES if name in kwargs}),
            given=further,
            labels=self._taken_labels(tokens),
            has_roles=roles is not None,
            known=known_new,
        )
        return (), kwargs

    def _taken_labels(self, tokens: TokenMap) -> Tensor | None:
        """The labels that the host was given for these tokens."""
        labels = self._labels.get()
        self._labels.drop()
        return labels if labels is not None and labels.shape == tokens.modality.shape else None

    def _marks(self) -> frozenset[Hashable]:
        """Those of a forward that begins now: the thread's, and those of owners that are here for good."""
        here = marks()
        standing = [
            owner.standing
            for owner in self.owners.values()
            if owner.standing is not None and owner.owner_id not in here
        ]
        return here.union(standing) if standing else here

    def _take_further_inputs(self, kwargs: dict[str, Any], batch: int) -> dict[str, Tensor]:
        """Take what owners take out of the arguments of a forward of `batch` samples, and add what the thread gives."""
        names = {name for owner in self.owners.values() for name in owner.further_inputs}
        taken = {name: kwargs.pop(name) for name in names if name in kwargs}
        for name, value in _given_inputs.get().get(self, {}).items():
            if name not in taken:
                repeats = _repeats(len(value), batch)
                taken[name] = value if repeats == 1 else value.repeat_interleave(repeats, dim=0)
        for name, value in taken.items():
            if len(value) != batch:
                raise UsageError(f"{name} is of {len(value)} samples, the forward of {batch}")
        return taken

    def _read_tokens(
        self,
        input_ids: Tensor | None,
        reference: Tensor,
        kwargs: dict[str, Any],
        mask: Tensor | None,
        past: TokenCache | None,
        continued: bool,
    ) -> tuple[TokenMap, KnownTokens]:
        """The TokenMap of a forward's new tokens, from what the host was given, and what is known of them here."""
        if continued and input_ids is not None and reference.shape[1] == 1 and not brings_media(kwargs):
            # a generated token: text, whatever id was sampled. Several at once are read as in a forward without a
            # cache, whatever keyword brought their media: a new turn must not pass for text because it is not known
            known = KnownTokens.text(len(reference), 1, is_exact=mask is None)
            if mask is None and past is not None:
                return past.word(len(reference), reference.device), known
            return TokenMap.text(len(reference), 1, mask, device=reference.device), known
        modalities = torch.zeros(reference.shape, dtype=torch.int64, device=reference.device)
        types = kwargs.get("mm_token_type_ids")
        if types is not None and types.shape != reference.shape:
            types = None
        if types is not None:
            modalities = types.to(modalities)
        elif input_ids is not None:
            for modality, token in self.anatomy.placeholders.items():
                modalities = torch.where(input_ids == token, int(modality), modalities)
        elif self.anatomy.placeholders:
            raise UsageError(
                f"{type(self.anatomy.host).__name__} was given inputs_embeds alone, and what is an image in them is "
                "not known",
                remedy="pass input_ids; or, beside inputs_embeds, mm_token_type_ids of the same tokens (0 text, "
                "1 image, 2 video, 3 audio) or token_map=; around generate: with graft.seam.given_tokens(token_map)",
            )
        if mask is not None:
            modalities = torch.where(mask.to(torch.bool), modalities, int(Modality.PADDING))
        if types is None and not self.anatomy.placeholders:
            known = KnownTokens.text(reference.shape[0], reference.shape[1], is_exact=mask is None)
            return TokenMap.from_modalities(modalities), known
        # the one thing the host waits for: where media stand decides what is computed
        asked = [modalities] if input_ids is None else [modalities, input_ids.to(modalities)]
        modality, *ids = torch.stack(asked).cpu().numpy()
        known = KnownTokens.of(modality)
        if not any(known.has_media):
            return TokenMap.from_modalities(modalities), known
        found, item = self.anatomy.items(kwargs, modality, *ids)
        if (found != modality).any():
            modalities, items = on_device(np.stack([found, item]), reference.device).unbind()
            known = KnownTokens.of(found)
        else:
            items = on_device(item, reference.device)
        return replace(TokenMap.from_modalities(modalities), item=items), known

    @with_keywords
    @torch.compiler.disable  # bookkeeping on the host: nothing in it to fuse
    def _after_forward(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward = kwargs.get(NAME)
        if not isinstance(forward, ForwardContext):  # it began before the seam was there
            return
        if not self.owners or forward.anatomy is not self.anatomy:
            return  # another thread let go of the seam it began with, whose hooks left the layers on the way
        self._fill_cache(forward, backbone, output)
        for ending in () if forward.is_second else forward.requests.endings:
            if ending.mark in forward.marks:
                ending.function(forward)

    def _fill_cache(self, forward: ForwardContext, backbone: nn.Module, output: Any) -> None:
        """Store a finished forward's tokens, and what grafts gave for them, in the cache it was given, if any."""
        cache, returned = forward.layer_cache, dialect.cache_of_output(output)
        # the decoder's own, which stays empty under gradient checkpointing, is none
        if returned is not None and returned is not cache and int(returned.get_seq_length()):
            raise SeamError(
                f"{type(backbone).__name__} gave back a cache that its first layer was not seen to be handed",
                remedy=dialect.REMEDY,
            )
        if cache is None or not hasattr(cache, "layers") or forward.inputs is None:
            return
        length, known = cache.get_seq_length(), forward.all_tokens.shape[1]
        if isinstance(length, int) and length != known:  # that of a static cache is a tensor, kept on its device
            raise SeamError(
                f"{type(backbone).__name__} left {length} tokens in the cache, where {known} are known",
                remedy=f"start from an empty cache; if that does not help, {dialect.REMEDY}",
            )
        past = TokenCache.of(cache)
        if past is None:
            # behind the decoder's own layers, which a lazy cache has made by now
            let_grow(cache)
            past = TokenCache()
            cache.layers.append(past)
        if not past.get_seq_length() and forward.past_tokens is not None:
            blank = {
                name: (torch.zeros_like(cos[:, :1]), torch.zeros_like(sin[:, :1]))
                for name, (cos, sin) in forward.rope.items()
            }
            past.append(forward.past_tokens, forward.inputs.new_zeros(*forward.past_tokens.shape, 0), blank)
        past.append(forward.tokens, forward.inputs, forward.rope)
        past.remember(forward.all_tokens, forward.has_media, forward.known_so_far, forward.facts)
        past.note_length(cache, known)
        # else positions go on as they did, whatever the host read since
        if forward.past is None or (forward.new_media and forward.shapes()):
            past.offset = preconditions.current_offset(self.anatomy)
        presence = TokenPresence.of(cache)
        if presence is None and forward.is_withdrawn:
            presence = TokenPresence()
            cache.layers.append(presence)
            if forward.past_tokens is not None:
                known_tokens, layers = forward.past_tokens.shape, self.anatomy.num_layers
                presence.append(torch.ones(*known_tokens, layers, dtype=torch.bool, device=forward.tokens.device))
        if presence is not None:
            presence.append(forward.presence_of_tokens())
        forward.commit(cache)

    @property
    def needs_roles(self) -> bool:
        """Whether anybody here asks whose turn a token belongs to."""
        return any(owner.needs_roles for owner in self.owners.values())

    @contextmanager
    def given_inputs(self, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Have owners find (B, ..) `inputs` in all forwards that this thread begins inside: see `generation_extras`."""
        before = _given_inputs.get()
        _given_inputs.set({**before, self: inputs} if inputs else before)
        try:
            yield
        finally:
            _given_inputs.set(before)

    @contextmanager
    def given_roles(self, roles: Tensor | None) -> Iterator[None]:
        """Have the forwards that this thread begins inside take their tokens' roles from (B, S) `roles`, e.g. those of
        the prompt of a `generate` call; all that follows is the assistant's.

        Args:
            roles: of all tokens from the first of the cache on, however many of them it holds already, padding
                included. None: nothing is known.
        """
        before = _given_roles.get()
        _given_roles.set(before if roles is None else {**before, self: roles})
        try:
            yield
        finally:
            _given_roles.set(before)

    @contextmanager
    def given_tokens(self, tokens: TokenMap) -> Iterator[None]:
        """Use `tokens` for the first forward of every empty cache, e.g. the prompt of a `generate` call, in this
        thread.

        Where that forward has more tokens (drafted tokens, generation without a cache), the rest is taken for text.
        """
        before = _given_tokens.get()
        _given_tokens.set({**before, self: tokens})
        try:
            yield
        finally:
            _given_tokens.set(before)


def install(model: nn.Module, name: str, owner: Owner | None = None) -> Seam:
    """Return the host's seam, installing it when `name` is the first to need it.

    Args:
        model: a host (PEFT wrappers are looked through).
        name: under which `owner` has the seam; `Seam.release(name)` gives it back.
        owner: the graft, policy or probe; None: somebody who says nothing of itself.

    Raises:
        UsageError: the name is taken. HostError: the host is of a class alula does not know.
    """
    tell_untested()
    host = unwrap(model)
    with _changing:
        seam = getattr(host, NAME, None)
        if seam is None:
            seam = Seam(Anatomy.of(host))
            host.add_module(NAME, seam)
        if name in seam.owners:
            raise UsageError(
                f"the name {name!r} is already in use on this model", remedy="detach it, or give another name"
            )
        seam.set_owner(name, Owner() if owner is None else owner)
    return seam


def find(model: nn.Module) -> Seam | None:
    """The host's seam, or None when nothing is attached."""
    return getattr(unwrap(model), NAME, None)


def _key_mask(mask: Any, length: int, new: int) -> Tensor | None:
    """(B, length + new) which tokens are no padding, from the mask a forward was given; None where it says nothing.

    `generate` hands over masks of (B, 1, new, keys) that it made itself where the cache has a fixed size, one per kind
    of layer where these differ. Every token attends to itself unless it is padding, in all kinds of layers.
    """
    if isinstance(mask, dict):
        mask = next((each for each in mask.values() if each is not None), None)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != length + new:
        raise UsageError(
            f"attention_mask speaks of {mask.shape[1]} tokens, and there are {length} in the cache and {new} new ones",
            remedy="pass the cache of the tokens before, and a mask of (batch, cached + new tokens)",
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise UsageError(
            f"attention_mask is a {type(mask).__name__}, from which padding cannot be read",
            remedy="pass a mask of (batch, cached + new tokens)",
        )
    if mask is None or mask.dim() == 2:
        return mask
    if mask.dim() != 4 or mask.shape[-1] < length + new:
        return None
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    themselves = allowed[:, 0, -new:, length : length + new].diagonal(dim1=-2, dim2=-1)
    return torch.cat([allowed[:, 0, :, :length].any(dim=1), themselves], dim=1)


def needs_roles(model: nn.Module) -> bool:
    """Whether what is attached to `model` asks whose turn a token belongs to, so that its inputs have to say it."""
    seam = find(model)
    return seam is not None and seam.needs_roles


def _with_layer(asked: Mapping[int, tuple[_T, ...]], layer: int, here: tuple[_T, ...]) -> Mapping[int, tuple[_T, ...]]:
    """What is asked by layer, with other requests for one layer; layers of which nothing is asked are left out."""
    return {index: requests for index, requests in {**asked, layer: here}.items() if requests}


def _repeats(have: int, batch: int) -> int:
    """How many beams or samples `generate` made of each of `have` prompts; 1 where the batch is no multiple of them."""
    return 1 if batch % have else batch // have


def _expand_roles(roles: Tensor, batch: int, length: int, *, past: int, device: torch.device) -> Tensor:
    """As `_expand`, for roles, behind a cache of so many tokens: those of a prompt may come in pieces, and what is
    generated is the assistant's."""
    have, known = roles.shape
    if past >= known:  # a step: nothing of the prompt's is brought to the device
        return torch.full((batch, length), int(Role.ASSISTANT), device=device)
    roles = roles[:, past : past + length].repeat_interleave(_repeats(have, batch), dim=0)
    return torch.nn.functional.pad(roles, (0, length - roles.shape[1]), value=int(Role.ASSISTANT))


def _expand(tokens: TokenMap, batch: int, length: int) -> TokenMap:
    """Repeat each sample for the beams or samples `generate` made of it; tokens beyond the map are generated text."""
    have, known = tokens.shape
    if (repeats := _repeats(have, batch)) > 1:
        tokens = tokens.select(torch.arange(have, device=tokens.device).repeat_interleave(repeats))
    return (
        tokens.append(TokenMap.text(tokens.shape[0], length - known, device=tokens.device))
        if length > known
        else tokens
    )
