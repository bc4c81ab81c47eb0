"""MKS2 on a host: what its parts do at the points of a layer, and in which mode.

The memory is given what the MLP is given, behind the host's own norm, and its output takes the place of the MLP's, or
joins it, before whatever the host does next (a norm in sandwich layers, the residual everywhere).

Shapes: B batch, S new tokens, M of them in the layer, d width of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.errors import UsageError
from alula.grafts.base import Graft
from alula.grafts.linears import key, named_linears, path_of, trained_like, widths
from alula.grafts.mks2.config import MKS2Config, Mode
from alula.grafts.mks2.memory import LowRank, MemoryRouter, VisualMemory
from alula.grafts.mks2.retrieval import CaptionPairs, RetrievalHead
from alula.seam import ForwardContext, LayerView, OutputOf, Point, marked, marks
from alula.tokens import DESCRIBES

MODES: tuple[Mode, ...] = get_args(Mode)
_MEMORY, _INNER, _OUTER, _MLP = "memory", "memory_inner", "memory_outer", "mlp"


class AdapterPart(NamedTuple):
    """An adapter at the output of one of the MLP's linears."""

    adapter: LowRank

    def add(self, output: Tensor, given: Tensor) -> Tensor:
        """(B, M, o) the linear's output with the adapter's part, of `given` (B, M, i)."""
        added: Tensor = self.adapter(given, output)
        return added


class FeedPart(NamedTuple):
    """What the feed-forward half of a layer is in one forward.

    Attributes:
        layer: whose.
        mode: not "text".
        is_media: (B, M, 1) bool, the tokens that have the memory; None: they do not go by modality.
    """

    layer: MKS2Layer
    mode: Mode
    is_media: Tensor | None

    def add(self, output: Tensor, given: Tensor) -> Tensor:
        """(B, M, d) of the `output` of the MLP and what it was `given`, (B, M, d) each."""
        layer = self.layer
        if self.mode == "store":
            found = layer.memory(given).to(output.dtype)
            return found if layer.config.store == "instead" else output + found
        found = layer.recalled(given).to(output.dtype)
        if self.is_media is not None:
            return torch.where(self.is_media, found, output)
        if _MLP in layer.lora:
            output = layer.lora[_MLP](given, output)
        assert layer.router is not None
        return torch.lerp(output, found, layer.router(given)[..., :1].to(output.dtype))


class Comparing(nn.Module):
    """What compares captions and images, in the last decoder layer."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: of the graft.
        """
        super().__init__()
        self.graft_name = name
        self.retrieval: RetrievalHead | None = None

    def compare(self, view: LayerView, hidden: Tensor) -> None:
        """At the layer's output: keep the pairs of a forward that is told of captions."""
        ctx = view.ctx
        item = ctx.given.get(DESCRIBES)
        if item is None or self.retrieval is None or ctx.is_disabled(self.graft_name):
            return
        hidden = view.spread(hidden)
        batch, count = ctx.tokens.shape
        places = torch.arange(count, device=hidden.device)
        last = (places * ctx.tokens.valid).amax(dim=1)
        states = hidden[torch.arange(batch, device=hidden.device), last]
        features = (ctx.of_tower.get() or {}).get(self.graft_name) if ctx.new_media else None
        ctx.memo[Comparing, self.graft_name] = self.retrieval(states, features, item.to(hidden.device))


class MKS2Layer(Comparing):
    """The parts of one decoder layer.

    Attributes:
        memory: the visual memory.
        lora: adapters by what they stand beside: "memory_inner" and "memory_outer" or "memory", and linears of the MLP
            by path or "mlp".
        router: None where tokens go by modality.
    """

    def __init__(
        self, name: str, config: MKS2Config, hidden_size: int, linears: dict[str, nn.Module], like: Tensor
    ) -> None:
        """
        Args:
            name: of the graft.
            linears: those of the MLP that get adapters, by path.
            like: a tensor whose dtype and device the weights take.
        """
        super().__init__(name)
        self.config = config
        self._key = (MKS2Layer, name)  # what is kept of a forward for all layers goes by this key
        self.memory = VisualMemory(hidden_size, config, like)
        width, d = config.width(hidden_size), hidden_size
        mixes = config.route == "softmax"
        self.lora = nn.ModuleDict()
        if config.lora == "parallel":
            for beside in (_MEMORY, _MLP) if mixes else (_MEMORY,):
                self.lora[beside] = LowRank(d, d, config, like)
        else:
            self.lora[_INNER], self.lora[_OUTER] = LowRank(width, d, config, like), LowRank(d, width, config, like)
            for path, linear in linears.items():
                out_in = widths(linear)
                assert out_in is not None
                self.lora[key(path)] = LowRank(*out_in, config, like)
        self.router = MemoryRouter(hidden_size, config, like) if mixes else None

    def adapt(self, adapter: LowRank, view: LayerView, output: Tensor, given: Tensor) -> Tensor | None:
        """At the output of one of the MLP's linears: with its adapter's part, where memory and MLP are mixed."""
        part = self.adapter_part(adapter, view)
        return None if part is None else part.add(output, given)

    def adapter_part(self, adapter: LowRank, view: LayerView) -> AdapterPart | None:
        """What is added to a linear's output in this forward; None: nothing."""
        return AdapterPart(adapter) if self.mode(view.ctx) == "mix" else None

    def feed(self, view: LayerView, output: Tensor, given: Tensor) -> Tensor | None:
        """At the MLP's output: what the feed-forward half of the layer gives in this mode."""
        part = self.feed_part(view)
        return None if part is None else part.add(output, given)

    def feed_part(self, view: LayerView) -> FeedPart | None:
        """What stands at the MLP's output in this forward; None: nothing."""
        mode = self.mode(view.ctx)
        if mode == "text":
            return None
        if mode == "store" or self.router is not None:
            return FeedPart(self, mode, None)
        # in training parts take part wherever they can: processes that share weights have to agree on gradients
        if not view.ctx.new_media and not self.training:
            return None
        return FeedPart(self, mode, view.pick(self._is_media(view.ctx)))

    def mode(self, ctx: ForwardContext) -> Mode:
        """What the feed-forward half is in this forward."""
        if self._key not in ctx.memo:
            owner = ctx.requests.owner_id(self.graft_name)
            chosen = next((mode for mode in MODES if (owner, mode) in ctx.marks), self.config.mode)
            ctx.memo[self._key] = "text" if ctx.is_disabled(self.graft_name) else chosen
        return ctx.memo[self._key]

    def recalled(self, given: Tensor) -> Tensor:
        """(B, M, d) of the memory with its adapters, in their dtype."""
        found: Tensor
        if self.config.lora == "parallel":
            found = self.lora[_MEMORY](given, self.memory(given))
        else:
            found = self.memory(given, self.lora[_INNER], self.lora[_OUTER])
        return found

    def _is_media(self, ctx: ForwardContext) -> Tensor:
        """(B, S, 1) bool, made once per forward."""
        asked = (*self._key, "media")
        if asked not in ctx.memo:
            ctx.memo[asked] = ctx.tokens.is_perceptual[..., None]
        return ctx.memo[asked]


def adapted_linears(anatomy: Anatomy, index: int, config: MKS2Config) -> dict[str, nn.Module]:
    """The linears of a layer's MLP that get adapters, by path.

    Raises:
        HostError: the layer has no MLP module. UsageError: it holds no linear.
    """
    anatomy.mlp(index)
    if config.lora != "linears" or config.route != "softmax":
        return {}
    found = {path: linear for path, (linear, names) in named_linears(anatomy, index).items() if "mlp" in names}
    if not found:
        raise UsageError(
            f"the MLP of decoder layer {index} holds no linear module",
            where="mks2.lora",
            remedy='lora="parallel" puts one adapter beside the MLP as a whole',
        )
    return found


class MKS2Graft(Graft):
    """MKS2 attached to a host; see `MKS2Config`.

    With `retrieval`, forwards take ``describes``, (B,) int64: for a sample that is a caption alone, which of the
    forward's images it is of; -1 for others. `pairs` has what they come to.
    """

    config: MKS2Config

    @property
    def further_inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.config.retrieval is None else (DESCRIBES,)

    def grow(self, indices: list[int]) -> None:
        self._with_memory = {*indices}
        last = self.seam.anatomy.num_layers - 1
        super().grow(sorted({*indices} | ({last} if self.config.retrieval is not None else set())))

    def build_layer(self, index: int) -> nn.Module:
        anatomy, layer = self.seam.anatomy, self.seam.anatomy.layers[index]
        mlp = anatomy.mlp(index)
        like = trained_like(mlp, layer, where=f"mks2: the MLP of decoder layer {index}")
        built = Comparing(self.name)
        if index in self._with_memory:
            built = MKS2Layer(
                self.name, self.config, anatomy.hidden_size, adapted_linears(anatomy, index, self.config), like
            )
        if self.config.retrieval is not None and index == anatomy.num_layers - 1:
            built.retrieval = RetrievalHead(anatomy.hidden_size, anatomy.feature_size, self.config.retrieval, like)
        return built

    def place(self, index: int, module: Any) -> None:
        if module.retrieval is not None:
            self.hold(self.seam.request_features(owner=self.name))
            self.on(Point.BLOCK_OUTPUT, index, module.compare)
        if not isinstance(module, MKS2Layer):
            return
        layer, mlp = self.seam.anatomy.layers[index], self.seam.anatomy.mlp(index)
        path = next(name for name, each in layer.named_modules() if each is mlp)
        adapter: Any
        for name, adapter in module.lora.items():
            if name not in (_MEMORY, _INNER, _OUTER, _MLP):
                where = OutputOf(path_of(name))
                self.on(where, index, partial(module.adapt, adapter), partial(module.adapter_part, adapter))
        self.on(OutputOf(path), index, module.feed, module.feed_part)

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            part = name.split(".")[2]  # layers.3.memory.inner
            groups.setdefault(f"{self.config.graft_type}.{part}", []).append(parameter)
        return groups

    @contextmanager
    def using(self, mode: Mode) -> Iterator[None]:
        """Have the forwards that this thread (or asyncio task) begins inside the block run in another mode.

        Raises:
            UsageError: no such mode, or a block of another mode stands around it.
        """
        if mode not in MODES:
            raise UsageError(f"there is no mode {mode!r}", where="mks2.mode", remedy=", ".join(MODES))
        others = [each for each in MODES if each != mode and (self.owner_id, each) in marks()]
        if others:
            raise UsageError(f"mode {mode!r} is asked for inside a block of mode {others[0]!r}", where="mks2.mode")
        with marked((self.owner_id, mode)):
            yield

    @property
    def compares(self) -> bool:
        """Whether it has weights to compare captions and images with."""
        return self.config.retrieval is not None

    def pairs(self, ctx: ForwardContext) -> CaptionPairs | None:
        """The captions and images of a forward that was told of captions; None of others."""
        return ctx.memo.get((Comparing, self.name))

    @torch.no_grad()
    def embed_captions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, r) float32 of unit length: captions alone, as stage 1 sees them, in mode "store".

        Args:
            input_ids, attention_mask: (B, S) of captions with the token that ends them, padded on either side.

        Raises:
            UsageError: the graft has no weights to compare them with.
        """
        self._check_compares()
        found: list[CaptionPairs | None] = []
        describes = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)
        mark = object()
        handle = self.seam.at_end(lambda ctx: found.append(self.pairs(ctx)), mark=mark)
        try:
            with marked(mark), self.using("store"):
                given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
                self.seam.anatomy.host(**given, **{DESCRIBES: describes}, logits_to_keep=1)
        finally:
            handle.remove()
        (pairs,) = found
        assert pairs is not None
        return pairs.captions

    @torch.no_grad()
    def embed_images(self, inputs: Mapping[str, Any]) -> Tensor:
        """(N, r) float32 of unit length.

        Args:
            inputs: what the image processor makes of N images.

        Raises:
            UsageError: the graft has no weights to compare them with.
        """
        head = self._check_compares()
        self.seam.anatomy.backbone.get_image_features(**inputs)
        return head.images(self.seam.features_of(self.name))

    def _check_compares(self) -> RetrievalHead:
        head = getattr(self.layers[max(self.layers)], "retrieval", None)
        if head is None:
            raise UsageError(
                "it was made without weights for retrieval", where=self.name, remedy="train stage 1 with mks2.retrieval"
            )
        return head
