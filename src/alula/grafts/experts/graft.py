"""Experts beside the matrices of a host.

Shapes: B batch, S new tokens, M of them in the layer, i and o widths of a linear's input and output, r rank.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alula.errors import UsageError
from alula.grafts.base import Graft
from alula.grafts.experts.config import ExpertsConfig
from alula.grafts.linears import key, named_linears, path_of, trained_like, widths
from alula.seam import ForwardContext, LayerView, OutputOf
from alula.tokens import Role


class Expert(nn.Module):
    """An update of one linear: ``up(down(x))``, or a full matrix. It starts as nothing.

    Where a linear has two experts, that of media and that of text, their factors stand in one matrix, media first: of
    `down` (2r, i) the rows, of `up` (o, 2r) and of `full` (o, 2i) the columns.

    Args:
        widths: (o, i) of the linear.
        config: settings of the graft.
        like: a tensor whose dtype and device its weights take.
    """

    def __init__(self, widths: tuple[int, int], config: ExpertsConfig, like: Tensor) -> None:
        super().__init__()
        out, width = widths
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        if config.rank is None:
            self.full = nn.Parameter(torch.zeros(out, config.count * width, **place))
        else:
            self.down = nn.Parameter(torch.empty(config.count * config.rank, width, **place))
            self.up = nn.Parameter(torch.zeros(out, config.count * config.rank, **place))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as LoRA's
        self.rank, self.scale, self.dropout = config.rank, config.scale, config.dropout

    def forward(self, given: Tensor, output: Tensor, mask: Tensor | None, only_text: bool) -> Tensor:
        """The linear's output with the update added.

        Args:
            given: (B, M, i) what the linear was given.
            output: (B, M, o) what it made of it.
            mask: the scale at tokens that have an expert, 0 at others; None: all have one. (B, M, 1); for two low-rank
                experts (B, M, 2r), for two full ones (B, M, 2).
            only_text: of two experts that of text alone has any tokens.
        """
        weights = (self.full,) if self.rank is None else (self.down, self.up)
        if given.dtype != weights[0].dtype:
            given = given.to(weights[0].dtype)
        if self.dropout and self.training:
            given = F.dropout(given, self.dropout)
        update = (_full if self.rank is None else _low_rank)(given, mask, only_text, *weights)
        if update.dtype != output.dtype:
            update = update.to(output.dtype)
        return output + update if mask is not None else torch.add(output, update, alpha=self.scale)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, in which it computes."""
        return (self.full if self.rank is None else self.down).dtype


def _low_rank(given: Tensor, mask: Tensor | None, only_text: bool, down: Tensor, up: Tensor) -> Tensor:
    if only_text:
        rank = len(down) // 2
        down, up = down[rank:], up[:, rank:]
    inner = F.linear(given, down)
    return F.linear(inner if mask is None else inner * mask, up)


def _full(given: Tensor, mask: Tensor | None, only_text: bool, full: Tensor) -> Tensor:
    if only_text:
        full = full[:, given.shape[-1] :]
    return F.linear(given if mask is None else (given[..., None, :] * mask[..., None]).flatten(-2), full)


class Gate(NamedTuple):
    """Which tokens experts act on.

    Attributes:
        chosen: (B, S, 1) bool, or (B, S, 2) for two experts, at these tokens; None: at all.
        only_text: of two experts that of text alone has any tokens.
    """

    chosen: Tensor | None
    only_text: bool = False


class ExpertPart(NamedTuple):
    """What one expert does in one forward; see `Expert.forward` for `mask` and `only_text`."""

    expert: Expert
    mask: Tensor | None
    only_text: bool

    def add(self, output: Tensor, given: Tensor) -> Tensor:
        """(B, M, o) the linear's output with the expert's update, of `given` (B, M, i)."""
        updated: Tensor = self.expert(given, output, self.mask, self.only_text)
        return updated


class LayerExperts(nn.Module):
    """The experts of one decoder layer.

    Args:
        name: of the graft.
        layer: the host's.
        linears: those in it that get experts, by path.
        config: settings of the graft.
    """

    def __init__(self, name: str, layer: nn.Module, linears: dict[str, nn.Module], config: ExpertsConfig) -> None:
        super().__init__()
        self.graft_name, self.config = name, config
        self._gate = (LayerExperts, name)  # what is kept of a forward for all layers goes by this key
        self.experts = nn.ModuleDict()
        for path, linear in linears.items():
            out_in = widths(linear)
            assert out_in is not None
            like = trained_like(linear, layer, where=f"experts: {path}")
            self.experts[key(path)] = Expert(out_in, config, like)

    def add(self, expert: Expert, view: LayerView, output: Tensor, given: Tensor) -> Tensor | None:
        """At a linear's output: the expert's part for the tokens that are its own."""
        part = self.part(expert, view)
        return None if part is None else part.add(output, given)

    def part(self, expert: Expert, view: LayerView) -> ExpertPart | None:
        """What is added to a linear's output in this forward; None: nothing."""
        memo = view.ctx.memo
        if self._gate not in memo:
            memo[self._gate] = self._made_gate(view.ctx)
        gate: Gate | None = memo[self._gate]
        if gate is None:
            return None
        mask = None if gate.chosen is None else self._mask(view, gate.chosen, expert.dtype)
        return ExpertPart(expert, mask, gate.only_text)

    def _made_gate(self, ctx: ForwardContext) -> Gate | None:
        """The gate of a forward; None: experts have nothing to do."""
        tokens, count = self.config.tokens, ctx.tokens.shape[1]
        if not ctx.any_media or ctx.is_disabled(self.graft_name):
            return None
        if tokens == "image":
            return Gate(ctx.tokens.is_perceptual[..., None]) if ctx.new_media else None
        if tokens == "turn":
            if ctx.new_media and not ctx.has_roles and not (ctx.tokens.role != Role.UNKNOWN).any():
                raise UsageError(
                    'experts: tokens="turn" ends with the turn, and nothing says whose turn a token is',
                    remedy="give the model token_roles, as Collator(processor, roles=True) makes them",
                )
            return Gate(ctx.all_tokens.has_seen_in_turn[:, -count:, None])
        only_text = tokens == "both" and not ctx.new_media
        if tokens == "seen" or only_text:
            if ctx.past is not None and all(ctx.past.has_media()):
                return Gate(None, only_text)  # every sample had seen something before these tokens came
            return Gate(ctx.all_tokens.has_seen[:, -count:, None], only_text)
        is_media, has_seen = ctx.tokens.is_perceptual, ctx.all_tokens.has_seen[:, -count:]
        return Gate(torch.stack([is_media, has_seen & ~is_media], dim=-1))

    def _mask(self, view: LayerView, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        """What experts multiply by (see `Expert.forward`), made once per forward from the tokens chosen."""
        memo, asked = view.ctx.memo, (self._gate, dtype)
        if asked not in memo:
            mask = chosen.to(dtype) * self.config.scale if self.config.scale != 1.0 else chosen.to(dtype)
            each = 1 if self.config.rank is None or mask.shape[-1] == 1 else self.config.rank
            memo[asked] = mask if each == 1 else mask.repeat_interleave(each, dim=-1)
        return view.pick(memo[asked])


class ExpertsGraft(Graft):
    """Experts attached to a host."""

    config: ExpertsConfig

    @property
    def needs_roles(self) -> bool:
        return self.config.tokens == "turn"

    @property
    def leaves_text(self) -> bool:
        return True

    def grow(self, indices: list[int]) -> None:
        linears = {index: named_linears(self.seam.anatomy, index) for index in indices}
        there = {name for each in linears.values() for _, names in each.values() for name in names}
        missing = [name for name in self.config.targets if name not in there]
        if missing:
            raise UsageError(
                f"experts.targets: {', '.join(missing)} names no linear module in any of the {len(indices)} layers",
                remedy=f"there: {', '.join(sorted(there))}",
            )
        targets = {*self.config.targets}
        self._linears: dict[int, dict[str, nn.Module]] = {
            index: {path: linear for path, (linear, names) in each.items() if names & targets}
            for index, each in linears.items()
        }
        super().grow([index for index in indices if self._linears[index]])

    def build_layer(self, index: int) -> nn.Module:
        return LayerExperts(self.name, self.seam.anatomy.layers[index], self._linears[index], self.config)

    def place(self, index: int, module: Any) -> None:
        for name, expert in module.experts.items():
            self.on(OutputOf(path_of(name)), index, partial(module.add, expert), partial(module.part, expert))

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        return {"experts": list(self.parameters())}
