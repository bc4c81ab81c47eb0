"""The matrices of learners side by side, so that one product serves all learners of a layer, or all layers at once.

Launching a kernel costs a GPU more than most of a learner's products, and a learner has eight small matrices, kept in
float32 whatever the decoder is in. Here they are put together, and brought to the decoder's dtype, in few operators.

Shapes: N layers, L learners, r rank, d stream width, H heads, D their width.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alula.grafts.wings.router import AttentionRouter, looked_up
from alula.tokens import TokenMap


@dataclass(frozen=True)
class LayerWeights:
    """The matrices of one layer's learners.

    Attributes:
        q_down: (L * r, d), for `linear`.
        q_up: (L, r, d), for products of (L, tokens, r).
        kv_down: (L, 2 r, d): of a learner's keys and then of its values, for `linear`.
        kv_up: (L, 2, r, d): likewise.
        o_down: (L, d, r).
        o_up: (L * r, d), for products of (tokens, L * r).
    """

    q_down: Tensor
    q_up: Tensor
    kv_down: Tensor
    kv_up: Tensor
    o_down: Tensor
    o_up: Tensor

    def queries(self, x: Tensor) -> Tensor:
        """(L, B * tokens, d) of the (B, tokens, d) stream: what every learner makes of it, not rotated."""
        (learners, rank, _), flat = self.q_up.shape, x.reshape(1, -1, x.shape[-1])
        low = F.linear(x, self.q_down).view(-1, learners, rank).transpose(0, 1)
        return torch.baddbmm(flat.expand(learners, -1, -1), low, self.q_up)

    def only(self, chosen: slice) -> LayerWeights:
        """Those of some of the learners."""
        count, rank = self.q_up.shape[:2]
        if len(range(count)[chosen]) == count:
            return self
        rows = slice(chosen.start * rank, chosen.stop * rank)
        return LayerWeights(
            self.q_down[rows],
            self.q_up[chosen],
            self.kv_down[chosen],
            self.kv_up[chosen],
            self.o_down[chosen],
            self.o_up[rows],
        )


class ValueOutputs(NamedTuple):
    """What makes of a token, for several layers, what a learner's `o.down` makes of its value: head by head r numbers.

    Attributes:
        of_tokens: (L, H, D, N * r), of the D channels of the input token.
        of_factors: (L, N, r, H * r), of the factors of its value, which go through `v.up` first.
    """

    of_tokens: Tensor
    of_factors: Tensor

    def made(self, learner: int, tokens: Tensor, factors: Tensor) -> Tensor:
        """(B, N * H, K, r) of (B, K, d) input tokens and the (B, K, N, r) factors of their values."""
        of_tokens, of_factors = self.of_tokens[learner], self.of_factors[learner]
        (heads, width, _), (batch, count, layers, rank) = of_tokens.shape, factors.shape
        whole = torch.bmm(tokens.reshape(-1, heads, width).transpose(0, 1), of_tokens)  # (H, B * K, N * r)
        low = torch.bmm(factors.flatten(0, 1).transpose(0, 1), of_factors)  # (N, B * K, H * r)
        whole = whole.view(heads, batch, count, layers, rank).permute(1, 3, 0, 2, 4)
        return (whole + low.view(layers, batch, count, heads, rank).permute(1, 0, 3, 2, 4)).flatten(1, 2)

    def at(self, place: int) -> ValueOutputs:
        """Those of one of the layers."""
        rank = self.of_factors.shape[2]
        columns = slice(place * rank, (place + 1) * rank)
        return ValueOutputs(self.of_tokens[..., columns], self.of_factors[:, place : place + 1])


@dataclass(frozen=True)
class Weights:
    """The matrices of several layers' learners.

    Attributes:
        layers: those of each.
        kv_down: (L, N * 2 r, d): what keys and values of all layers are made of, in one product.
        kv_up: (N, L, 2, r, d): back up, all layers.
        o_down: (N, L, d, r).
    """

    layers: list[LayerWeights]
    kv_down: Tensor
    kv_up: Tensor
    o_down: Tensor
    _by_head: dict[int, Tensor] = field(default_factory=dict)
    _outputs: dict[int, ValueOutputs] = field(default_factory=dict)

    @property
    def k_up(self) -> Tensor:
        """(N, L, r, d), of the keys of all layers."""
        return self.kv_up[:, :, 0]

    def out_of_kept(self, head_dim: int) -> Tensor:
        """(N, L, H * (D + r), r), what `o.down` makes of a learner's attention to what is kept of tokens: head by head
        to their D input channels, and to the r factors of their values, which go through `v.up` first."""
        if head_dim not in self._by_head:
            downs = self.o_down.unflatten(2, (-1, head_dim))  # (N, L, H, D, r)
            ups = self.kv_up[:, :, 1].unflatten(-1, (-1, head_dim)).transpose(2, 3)  # (N, L, H, r, D)
            self._by_head[head_dim] = torch.cat([downs, ups @ downs], dim=3).flatten(2, 3)
        return self._by_head[head_dim]

    def outputs(self, head_dim: int) -> ValueOutputs:
        """What makes of tokens, as they are kept, what `o.down` makes of their values."""
        if head_dim not in self._outputs:
            out = self.out_of_kept(head_dim)
            rank = out.shape[-1]
            by_head = out.unflatten(2, (-1, head_dim + rank))  # (N, L, H, D + r, r)
            of_tokens = by_head[..., :head_dim, :].permute(1, 2, 3, 0, 4).flatten(3)
            of_factors = by_head[..., head_dim:, :].permute(1, 0, 3, 2, 4).flatten(3)
            self._outputs[head_dim] = ValueOutputs(of_tokens, of_factors)
        return self._outputs[head_dim]

    def at(self, place: int) -> Weights:
        """Those of one of the layers."""
        by_head = {head_dim: outs[place : place + 1] for head_dim, outs in self._by_head.items()}
        outputs = {head_dim: of_all.at(place) for head_dim, of_all in self._outputs.items()}
        layer, of_it = self.layers[place], slice(place, place + 1)
        return Weights([layer], layer.kv_down, self.kv_up[of_it], self.o_down[of_it], by_head, outputs)

    @classmethod
    def of(cls, layers: Sequence[Sequence[Any]], dtype: torch.dtype) -> Weights:
        """
        Args:
            layers: the learners (`LoRRA`) of each layer, all of one rank and on one device.
            dtype: of the matrices returned.
        """
        count, learners = len(layers), len(layers[0])
        rank, width = layers[0][0].q.down.shape
        every = [learner for those in layers for learner in those]
        # keys and values by learner: all layers share their tokens
        pairs = [part for index in range(learners) for those in layers for part in (those[index].k, those[index].v)]
        downs = [learner.q.down for learner in every] + [learner.o.down for learner in every]
        down = torch.cat([*downs, *(part.down for part in pairs)]).to(dtype)
        q_down, o_down, kv_down = down.split([len(every) * rank, len(every) * rank, 2 * len(every) * rank])
        ups = [learner.q.up for learner in every] + [up for learner in every for up in (learner.k.up, learner.v.up)]
        q_up, kv_up = torch.stack(ups).to(dtype).split([len(every), 2 * len(every)])
        o_up = torch.cat([learner.o.up for learner in every], dim=1).to(dtype)
        kv_down = kv_down.view(learners, count * 2 * rank, width)
        kv_up = kv_up.view(count, learners, 2, width, rank).transpose(-1, -2)
        o_down = o_down.view(count, learners, rank, width).transpose(-1, -2)
        parts = zip(
            along(q_down.view(count, learners * rank, width)),
            along(q_up.view(count, learners, width, rank).transpose(-1, -2)),
            along(kv_down.view(learners, count, 2 * rank, width), dim=1),
            along(kv_up),
            along(o_down),
            [o_up] if count == 1 else o_up.split(learners * rank, dim=1),
            strict=True,
        )
        return cls(
            [LayerWeights(q, ups, kv, kv_ups, o, last.T) for q, ups, kv, kv_ups, o, last in parts],
            kv_down,
            kv_up,
            o_down,
        )


def along(stacked: Tensor, dim: int = 0) -> Sequence[Tensor]:
    """What lies along a dimension, in as few operators as autograd can undo: none for a single one."""
    return [stacked.squeeze(dim)] if stacked.shape[dim] == 1 else stacked.unbind(dim)


_version = operator.attrgetter("_version")


class _Kept(NamedTuple):
    """Matrices that were put together, and what they were made of.

    Attributes:
        tables, names, there: of every module and parameter of the learners the table it stands in, its name there, and
            itself.
        parameters, versions: each parameter with the version that it had.
    """

    dtype: torch.dtype
    device: torch.device
    weights: Weights
    tables: Sequence[dict[str, Any]]
    names: Sequence[str]
    there: Sequence[Any]
    parameters: list[nn.Parameter]
    versions: list[int]


class Siblings:
    """All layers of one graft, whose matrices are put together once per prompt where nothing is trained.

    What was put together is kept for the steps of decoding behind it, while no parameter is changed or exchanged, and
    while nothing is trained: torch's fused optimizers change parameters uncounted. Only what is written past autograd
    otherwise (``parameter.data``) is not seen before the next prompt.
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self._kept: _Kept | None = None
        self._places: dict[torch.device, list[Tensor]] = {}
        self._turning: dict[tuple[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def share_keys(self) -> bool:
        """Whether keys of all layers can be made when the first is entered: a layer's RoPE angles are known from the
        first of its kind on."""
        config = self.layers[0].config
        return config.cache == "factors" or not config.rope or len({layer.layer_type for layer in self.layers}) == 1

    def place_on(self, device: torch.device, place: int) -> Tensor:
        """(1,) the place of a layer among these, for picking its share of what is made for all inside of a graph, of
        which a number would be a part."""
        if device not in self._places:
            self._places[device] = [torch.tensor([each], device=device) for each in range(len(self.layers))]
        return self._places[device][place]

    def turn(self, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
        """(B, D, D) by which heads of D channels, of one token per sample, are multiplied to rotate the first R: one
        product where `rotate` takes three operators.

        Args:
            cos, sin: (B, 1, R) of these tokens, both halves alike.
        """
        width = cos.shape[-1]
        key = head_dim, width, cos.device, cos.dtype
        if key not in self._turning:
            same = torch.eye(head_dim, device=cos.device, dtype=cos.dtype)
            half, other = width // 2, torch.zeros_like(same)
            other.diagonal(half)[:half].fill_(1)
            other.diagonal(-half)[:half].fill_(-1)
            self._turning[key] = same, other
        same, other = self._turning[key]
        if width < head_dim:
            cos, sin = F.pad(cos, (0, head_dim - width), value=1.0), F.pad(sin, (0, head_dim - width))
        return torch.addcmul(same * cos, other, sin)

    def of_layer(self, layer: Any, like: Tensor) -> Weights:
        """Those of one layer: some that were put together for a prompt, or put together now."""
        kept = self._kept  # no older than this forward, see `weights`
        if torch.is_grad_enabled() or kept is None or kept[:2] != (compute_dtype(like), like.device):
            return Weights.of([layer.learners()], compute_dtype(like))
        return kept.weights.at(layer.place)

    def weights(self, like: Tensor, *, fresh: bool) -> Weights | None:
        """Those of all layers; None where they cannot be put together, since they are spread over devices or processes.

        Args:
            like: hidden states, in whose dtype, or that of autocast, and on whose device they are wanted.
            fresh: put them together anew.
        """
        kept = self._kept
        if not fresh and kept is not None and kept[:2] == (compute_dtype(like), like.device) and _is_unchanged(kept):
            return kept.weights
        self._kept = None
        learners, parameters = [layer.learners() for layer in self.layers], self._parameters()
        if not _are_together(parameters, like.device):
            return None
        weights = Weights.of(learners, compute_dtype(like))
        # of inference, they do not count their versions; with gradients, an optimizer may change them uncounted
        if not any(p.is_inference() or p.grad is not None for p in parameters):
            tables, names, there = zip(*self._tree(), strict=True)
            versions = [*map(_version, parameters)]
            self._kept = _Kept(compute_dtype(like), like.device, weights, tables, names, there, parameters, versions)
        return weights

    def forget(self) -> None:
        """Keep nothing that was put together."""
        self._kept = None

    def router_values(self, tokens: TokenMap, dtype: torch.dtype) -> Sequence[Tensor] | None:
        """By layer (B, K, 2) what its router has sums of attention taken of, where that differs by layer; None also
        where it cannot be made together, see `weights`."""
        routers: list[AttentionRouter] = [layer.router for layer in self.layers]
        if not all(isinstance(router, AttentionRouter) for router in routers):
            return None
        if not _are_together([router.weight for router in routers], tokens.device):
            return None
        return looked_up(routers, tokens, dtype)

    def _parameters(self) -> list[nn.Parameter]:
        """Those of all learners, in an order of their own."""
        return [
            parameter
            for layer in self.layers
            for learner in layer.learners()
            for part in (learner.q, learner.k, learner.v, learner.o)
            for parameter in part._parameters.values()
        ]

    def _tree(self) -> list[tuple[dict[str, Any], str, Any]]:
        """See `_Kept`."""
        modules = [
            (owner._modules, name)
            for layer in self.layers
            for owner, names in ((layer, layer.config.learners), *((each, "qkvo") for each in layer.learners()))
            for name in names
        ]
        parts = [part for table, name in modules for part in (table[name],) if part._parameters]
        parameters = [(part._parameters, name) for part in parts for name in part._parameters]
        return [(table, name, table[name]) for table, name in (*modules, *parameters)]


@torch.compiler.disable  # bookkeeping on the host: nothing in it to fuse
def _is_unchanged(kept: _Kept) -> bool:
    """Whether the parameters are those that what is kept was made of, as they were."""
    # asked in every step: no module is asked for what it holds, and no loop is Python's
    return (
        all(map(operator.is_, map(dict.get, kept.tables, kept.names), kept.there))
        and [*map(_version, kept.parameters)] == kept.versions
    )


def _are_together(parameters: Sequence[nn.Parameter], device: torch.device) -> bool:
    """Whether matrices lie whole on a device: sharded ones are whole only while their own layer runs."""
    return all(type(p) is nn.Parameter and p.dim() == 2 and p.device == device for p in parameters)


def compute_dtype(like: Tensor) -> torch.dtype:
    """What products with these hidden states are computed in."""
    kind = like.device.type
    is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_cast else like.dtype
