"""Experts beside the matrices of a host.

Shapes: B batch, M tokens in the layer, i and o widths of a linear's input and output, r rank.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from alula.errors import UsageError
from alula.grafts.base import Graft
from alula.grafts.experts.config import ExpertsConfig
from alula.seam import NAME, ForwardContext, LayerView, OutputOf

_ROUTERS = ("gate", "router", "shared_expert_gate")


class Expert(nn.Module):
    """An update of one linear: ``up(down(x))``, or a full matrix. It starts as nothing.

    Args:
        linear: the host's, whose dtype and device it takes.
        config: settings of the graft.
    """

    def __init__(self, linear: Any, config: ExpertsConfig) -> None:
        super().__init__()
        weight: Tensor = linear.weight
        out, width = weight.shape[::-1] if isinstance(linear, Conv1D) else weight.shape
        if config.rank is None:
            self.full = nn.Parameter(weight.new_zeros(out, width))
        else:
            self.down = nn.Parameter(weight.new_empty(config.rank, width))
            self.up = nn.Parameter(weight.new_zeros(out, config.rank))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as LoRA's
        self.scale, self.dropout = config.scale, config.dropout

    def forward(self, given: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
        """(B, M, o) output of the linear with the update added at the tokens of the mask (B, M, 1); all where None."""
        given = F.dropout(given.to(self.dtype), self.dropout, self.training)
        if hasattr(self, "full"):
            return output + F.linear(given if mask is None else given * mask, self.full).to(output.dtype)
        inner = F.linear(given, self.down)
        if mask is not None:
            inner = inner * mask
        return output + F.linear(inner if self.scale == 1.0 else inner * self.scale, self.up).to(output.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, in which it computes."""
        return (self.full if hasattr(self, "full") else self.down).dtype


class LayerExperts(nn.Module):
    """The experts of one decoder layer."""

    def __init__(self, name: str, linears: dict[str, nn.Module], config: ExpertsConfig) -> None:
        super().__init__()
        self.graft_name, self.config = name, config
        self.experts = nn.ModuleDict({key(path): Expert(linear, config) for path, linear in linears.items()})

    def add(self, expert: Expert, view: LayerView, output: Tensor, given: Tensor) -> Tensor | None:
        """At a linear's output: the expert's part for the tokens that are its own."""
        ctx = view.ctx
        if not ctx.any_media or ctx.is_disabled(self.graft_name):
            return None
        mask = _mask(ctx, self.config.tokens, expert.dtype)
        return expert(given, output, None if mask is None else view.pick(mask))


def key(path: str) -> str:
    """The name of a linear's expert among modules."""
    return path.replace(".", "__")


def path_of(key: str) -> str:
    """Inverse of `key`."""
    return key.replace("__", ".")


def _mask(ctx: ForwardContext, tokens: str, dtype: torch.dtype) -> Tensor | None:
    """(B, S, 1) 1 at the new tokens that experts act on, else 0, made once per forward; None: all of them."""
    made = ctx.memo.get((_mask, tokens, dtype))
    if made is None:
        if tokens == "image":
            mask: Tensor | None = ctx.tokens.is_perceptual[..., None]
        elif ctx.past is not None and all(ctx.past.has_media()):
            mask = None  # every sample had seen something before these tokens came
        else:
            mask = ctx.all_tokens.has_seen[:, -ctx.tokens.shape[1] :, None]
        made = ctx.memo[_mask, tokens, dtype] = (None if mask is None else mask.to(dtype),)
    return made[0]


class ExpertsGraft(Graft):
    """Experts attached to a host."""

    config: ExpertsConfig

    def grow(self, indices: list[int]) -> None:
        linears = {index: self._named_linears(index) for index in indices}
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
        return LayerExperts(self.name, self._linears[index], self.config)

    def place(self, index: int, module: Any) -> None:
        for name, expert in module.experts.items():
            self.on(OutputOf(path_of(name)), index, partial(module.add, expert))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"experts": list(self.parameters())}

    def _named_linears(self, index: int) -> dict[str, tuple[nn.Module, set[str]]]:
        """The layer's linears by path, each with the targets that mean it."""
        anatomy, layer = self.seam.anatomy, self.seam.anatomy.layers[index]

        def names(path: str) -> set[str]:
            name = path.rpartition(".")[2]
            if path.startswith(f"{anatomy.family.attention}."):
                return {path, name, "attention"}
            return {path, name} if name in _ROUTERS else {path, name, "mlp"}

        # inside an adapter of PEFT's the linear is called base_layer; the expert stands behind the adapter as a whole
        modules = {path: getattr(each, "base_layer", each) for path, each in layer.named_modules()}
        return {
            path: (each, names(path))
            for path, each in modules.items()
            if isinstance(each, nn.Linear | Conv1D)
            and not {"base_layer", NAME} & {*path.split(".")}
            and "lora_" not in path
        }
