"""Connectors from tower tokens to decoder tokens, for hosts of alula's own class.

Shapes: N items, S tower tokens of an item, d_in their width, w the connector's width, Q queries, D the decoder's width.

All have the same build. An *entry* per tower, a linear map d_in -> w, takes the tower's tokens in; a vector per frame
(videos only) is added; a *trunk* turns the tokens into decoder tokens:

- ``linear``: w = D, another linear map that starts as the identity, so that a fresh connector is one linear map;
- ``mlp2x_<activation>``: w = D, activation, linear: LLaVA-1.5's perceptron;
- ``queries``: IMA's connector (Shukor and Cord, 2024, after DePALM; ``connector_type: trans`` of the published code): Q
  learned queries behind the tokens, self-attention over both together, the last Q tokens through two linear maps, w to
  d_up to D, without an activation between. No positions are added, so what orders frames is the vector per frame.

A connector that is shared by all media has one entry per tower and one trunk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from alula.errors import UsageError
from alula.hosts.connectors import find_connector
from alula.hosts.multimodal.configuration import AlulaConfig
from alula.media import MEDIA

QUERIES = "queries"
SHARED = "shared"
TOWER_OF = {name: medium.tower for name, medium in MEDIA.items()}


@dataclass(frozen=True)
class ConnectorShape:
    """How the connectors of a host are made. The defaults of ``queries`` are the published ones.

    Args:
        kind: ``linear``, ``mlp2x_<activation>`` or ``queries``.
        num_queries: tokens that ``queries`` hands to the decoder.
        width, layers, heads, feedforward: of its encoder.
        up_width: between its last two linear maps; 0: the width of the widest tower.
    """

    kind: str = "mlp2x_gelu"
    num_queries: int = 10
    width: int = 256
    layers: int = 5
    heads: int = 8
    feedforward: int = 512
    up_width: int = 0

    def __post_init__(self) -> None:
        if self.kind != QUERIES:
            find_connector(self.kind)
        for name in ("num_queries", "width", "layers", "heads", "feedforward"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}", where="connector_options")
        if self.kind == QUERIES and self.width % self.heads:
            raise UsageError(f"{self.heads} heads do not divide a width of {self.width}", where="connector_options")

    @classmethod
    def named(cls, kind: str, options: Mapping[str, Any] | None = None) -> ConnectorShape:
        """The shape a user asked for by name and options.

        Raises:
            UsageError: an unknown name or option, or one that the kind does not have.
        """
        known = [name for name in cls.__dataclass_fields__ if name != "kind"]
        for name in options or {}:
            if name not in known or kind != QUERIES:
                legal = ", ".join(known) if kind == QUERIES else "none"
                raise UsageError(
                    f"{kind!r} has no option {name!r}", where="connector_options", remedy=f"legal: {legal}"
                )
        return cls(kind, **(options or {}))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a configuration."""
        return asdict(self)

    @property
    def keeps_tokens(self) -> bool:
        """Whether every tower token becomes a decoder token."""
        return self.kind != QUERIES


class SelfAttentionLayer(nn.Module):
    """A pre-norm transformer encoder layer: multi-head self-attention, then a ReLU perceptron; no dropout."""

    def __init__(self, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, feedforward), nn.Linear(feedforward, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, S, w) -> (N, S, w)."""
        heads = self.qkv(self.norm_1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.down(F.relu(self.up(self.norm_2(tokens))))


class Queries(nn.Module):
    """The trunk of ``queries``: (N, S, w) -> (N, Q, D)."""

    def __init__(self, shape: ConnectorShape, up_width: int, out_width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(shape.num_queries, shape.width))
        self.layers = nn.ModuleList(
            SelfAttentionLayer(shape.width, shape.heads, shape.feedforward) for _ in range(shape.layers)
        )
        self.up, self.project = nn.Linear(shape.width, up_width), nn.Linear(up_width, out_width)

    def forward(self, tokens: Tensor, shift: Tensor | None = None) -> Tensor:
        """Tokens of the towers (N, S, w) -> tokens for the decoder (N, Q, D).

        Args:
            shift: (N, w) added to all queries of an item.
        """
        queries = self.queries.expand(len(tokens), -1, -1)
        if shift is not None:
            queries = queries + shift[:, None]
        tokens = torch.cat([tokens, queries], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.project(self.up(tokens[:, -len(self.queries) :]))


class Connector(nn.Module):
    """One connector.

    Args:
        shape: how it is made.
        widths: width of each tower it takes tokens of.
        num_frames: frames of the videos it takes; 0 where it takes none.
        out_width: the decoder's width.
    """

    def __init__(self, shape: ConnectorShape, widths: Mapping[str, int], num_frames: int, out_width: int) -> None:
        super().__init__()
        width = shape.width if shape.kind == QUERIES else out_width
        self.shape = shape
        self.entries = nn.ModuleDict({tower: nn.Linear(wide, width) for tower, wide in widths.items()})
        self.times = nn.Parameter(torch.empty(num_frames, width)) if num_frames else None
        self.act = nn.Identity() if not shape.kind.startswith("mlp") else ACT2FN[_activation(shape.kind)]
        self.trunk: nn.Module = (
            Queries(shape, shape.up_width or max(widths.values()), out_width)
            if shape.kind == QUERIES
            else nn.Linear(width, out_width)
        )

    @property
    def shift_width(self) -> int:
        """w, of what a shift is added to."""
        entry: Any = next(iter(self.entries.values()))
        return int(entry.out_features)

    def of_images(self, features: Tensor, shift: Tensor) -> Tensor:
        """(N, T, D) of images, told a shift (see `alula.seam.connectors`)."""
        return self.forward(features, "vision", shift=shift)

    def forward(self, tokens: Tensor, tower: str, frames: int = 0, shift: Tensor | None = None) -> Tensor:
        """Tokens of a tower (N, S, d_in) -> decoder tokens (N, S or Q, D).

        Args:
            frames: the S tokens are those of so many frames, one frame after the other.
            shift: (N, w) added to the queries of an item, or, where the connector has none, to what its activation is
                given.
        """
        tokens = self.entries[tower](tokens)
        if frames:
            assert self.times is not None
            tokens = (tokens.unflatten(1, (frames, -1)) + self.times[:, None]).flatten(1, 2)
        if isinstance(self.trunk, Queries):
            return self.trunk(self.act(tokens), shift)
        return self.trunk(self.act(tokens if shift is None else tokens + shift[:, None]))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill all parameters in place from ``seed`` alone.

        Linear layers start as PyTorch's own (uniform within 1/sqrt(fan_in)), queries from N(0, 1) as published, frames
        as half a sinusoid of their place (Vaswani et al., 2017).
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                for parameter in (module.weight, module.bias):
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Queries):
                module.queries.copy_(torch.empty(module.queries.shape).normal_(generator=generator))
        if self.times is not None:
            self.times.copy_(0.5 * _sinusoid(*self.times.shape))
        if self.shape.kind == "linear":
            trunk = cast(nn.Linear, self.trunk)
            nn.init.eye_(trunk.weight)
            nn.init.zeros_(trunk.bias)


class Connectors(nn.ModuleDict):
    """The connectors of a host: one per medium, named after it, or one named ``shared``."""

    def __init__(self, config: AlulaConfig) -> None:
        shape = ConnectorShape(**config.connector)
        out = config.text_config.hidden_size
        layers = config.vision_feature_layer
        several = 1 if isinstance(layers, int) else len(layers)
        widths = {"vision": config.vision_config.hidden_size * several}
        if config.audio_config is not None:
            widths["audio"] = config.audio_config.hidden_size * config.audio_stack

        def make(media: list[str]) -> Connector:
            towers = {TOWER_OF[medium]: widths[TOWER_OF[medium]] for medium in media}
            return Connector(shape, towers, config.num_frames if "video" in media else 0, out)

        groups = {SHARED: config.media} if config.shared_connector else {medium: [medium] for medium in config.media}
        super().__init__({name: make(media) for name, media in groups.items()})

    def of(self, medium: str) -> Connector:
        """The connector of a medium."""
        return cast(Connector, self[SHARED if SHARED in self else medium])

    def initialise(self, seed: int) -> None:
        """Fill all connectors from ``seed``; two of the same shape start with different weights."""
        for place, connector in enumerate(self.values()):
            cast(Connector, connector).initialise(seed + 7919 * place)


def _activation(kind: str) -> str:
    match = re.fullmatch(r"mlp\dx_(\w+)", kind)
    assert match is not None
    return match[1]


def _sinusoid(places: int, width: int) -> Tensor:
    """(places, width): sines of every place in the first half, cosines in the second."""
    half = (width + 1) // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half) / half)
    angles = torch.arange(places)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
