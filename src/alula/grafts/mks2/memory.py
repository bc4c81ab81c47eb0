"""The parts of a layer: the memory, low-rank adapters, and the router between memory and MLP.

Weights are plain parameters, no `nn.Linear`: whoever looks for a host's linears (PEFT, say) is not to find them.

Shapes: B batch, M tokens in the layer, d width of the stream, m inner width of the memory, r rank, i and o widths of
what an adapter stands beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alula.grafts.mks2.config import MKS2Config

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
_AUTOCAST = frozenset(name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name))
"""devices that have it, found out here: torch 2.7 cannot compile the question"""
_START = 4.0
"""biases of -4 and 4 weigh the MLP by 1 / (1 + exp(-8)) = 0.9997"""


class LowRank(nn.Module):
    """A low-rank pair beside something that takes (B, M, i) and gives (B, M, o); it starts as nothing (LoRA)."""

    def __init__(self, out: int, width: int, config: MKS2Config, like: Tensor) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.down = nn.Parameter(torch.empty(config.rank, width, **place))
        self.up = nn.Parameter(torch.zeros(out, config.rank, **place))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as LoRA's
        self.scale, self.dropout = config.scale, config.dropout

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        """(B, M, o) `output` of what was `given` (B, M, i), with the low-rank product added."""
        given = given.to(self.down.dtype)
        if self.dropout and self.training:
            given = F.dropout(given, self.dropout)
        update = F.linear(F.linear(given, self.down), self.up)
        return torch.add(output, update.to(output.dtype), alpha=self.scale)


class VisualMemory(nn.Module):
    """Two linears with biases, ``outer act(inner x + b) + c``; the second starts at zero, so that it holds nothing.

    Args:
        hidden_size: d.
        config: settings of the graft.
        like: a tensor whose dtype and device its weights take.
    """

    def __init__(self, hidden_size: int, config: MKS2Config, like: Tensor) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        width = config.width(hidden_size)
        self.inner = nn.Parameter(torch.empty(width, hidden_size, **place))
        self.inner_bias = nn.Parameter(torch.zeros(width, **place))
        self.outer = nn.Parameter(torch.zeros(hidden_size, width, **place))
        self.outer_bias = nn.Parameter(torch.zeros(hidden_size, **place))
        nn.init.normal_(self.inner, std=config.init_std)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, given: Tensor, inner: LowRank | None = None, outer: LowRank | None = None) -> Tensor:
        """(B, M, d) what it makes of the (B, M, d) input of the MLP.

        Args:
            inner, outer: adapters on its linears, or None.
        """
        given = given.to(self.inner.dtype)
        found = F.linear(given, self.inner, self.inner_bias)
        found = self.activation(found if inner is None else inner(given, found))
        output = F.linear(found, self.outer, self.outer_bias)
        return output if outer is None else outer(found, output)


class MemoryRouter(nn.Module):
    """A softmax over memory and MLP per token, computed in float32 whatever the host's precision."""

    def __init__(self, hidden_size: int, config: MKS2Config, like: Tensor) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.weight = nn.Parameter(torch.zeros(2, hidden_size, **place))  # memory, MLP
        self.bias = nn.Parameter(torch.zeros(2, **place))
        if config.router_start == "text":
            with torch.no_grad():
                self.bias.copy_(torch.tensor([-_START, _START]))

    def forward(self, given: Tensor) -> Tensor:
        """(B, M, 2) weights of memory and MLP, which add up to 1; at least float32."""
        wide = torch.promote_types(given.dtype, torch.float32)
        device = given.device.type
        if device in _AUTOCAST and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # it would round the logits
                return self._weights(given, wide)
        return self._weights(given, wide)

    def _weights(self, given: Tensor, wide: torch.dtype) -> Tensor:
        logits = F.linear(given.to(wide), self.weight.to(wide), self.bias.to(wide))
        return torch.softmax(logits, dim=-1)
