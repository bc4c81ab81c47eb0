"""OneLLM's universal projection module: experts that read what an encoder made of any medium (arXiv 2312.03700).

Shapes: N items, L encoder tokens of an item, w their width, Q modality tokens, K experts, D the decoder's width.

For a medium m, with q_m its Q modality tokens, which stand first:

    F = norm(W1_m F);  Z = [q_m ; F];  y = sum over k of weight_k * P_k(Z)[:, :Q];  V = norm(W2_m y)

and the decoder is given [start_m, V, end_m]. P_k, an expert, is a stack of pre-norm blocks without positions and
without a causal mask. Experts are shared by all media, everything else is a medium's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alula.hosts.universal.shapes import ProjectionShape, Shape
from alula.hosts.universal.tokenizing import tokenizer_of

EXPERTS = "shared"
"""name of the experts among the connectors; other names are those of media"""

_EPS = 1e-5


class Block(nn.Module):
    """A Llama block that looks both ways: RMS norms, attention without positions, a SwiGLU perceptron; no biases."""

    def __init__(self, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=_EPS), nn.RMSNorm(width, eps=_EPS)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = (
            nn.Linear(width, 2 * feedforward, bias=False),
            nn.Linear(feedforward, width, bias=False),
        )

    def forward(self, tokens: Tensor, wanted: int | None = None) -> Tensor:
        """(N, S, w) -> (N, S, w), or of the first ``wanted`` tokens alone, which still read all: (N, wanted, w)."""
        normed = self.attention_norm(tokens)
        width = tokens.shape[-1]
        if wanted is None:
            query, key, value = self.qkv(normed).chunk(3, dim=-1)
        else:  # nobody asks for what the others become
            tokens = tokens[:, :wanted]
            query = F.linear(normed[:, :wanted], self.qkv.weight[:width])
            key, value = F.linear(normed, self.qkv.weight[width:]).chunk(2, dim=-1)
        split = [each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (query, key, value)]
        tokens = tokens + self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(tokens)).chunk(2, dim=-1)
        return tokens + self.down(F.silu(gate) * up)


class Expert(nn.ModuleList):
    """A stack of blocks: (N, Q + L, w) -> (N, Q, w), its first Q tokens."""

    def __init__(self, shape: ProjectionShape, width: int) -> None:
        feedforward = shape.feedforward_of(width)
        super().__init__(Block(width, shape.heads, feedforward) for _ in range(shape.depth))

    def forward(self, tokens: Tensor, wanted: int) -> Tensor:
        *before, last = self
        for block in before:
            tokens = block(tokens)
        return last(tokens, wanted)


class Router(nn.Module):
    """The weights of the experts for each modality token: (N, Q, w) -> (N, Q, K).

    By an MLP w -> 4w -> K with a GELU, whose logits become weights in one of these ways:

    - ``soft_sigmoid``: a sigmoid each, divided by their sum (the published code);
    - ``softmax`` (the paper);
    - ``sparse``: the largest weight of the softmax, and zero for the other experts.

    ``constant`` (1 / K) needs none.
    """

    def __init__(self, kind: str, width: int, experts: int) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.logits = nn.Linear(width, 4 * width), nn.Linear(4 * width, experts)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.logits(F.gelu(self.up(tokens)))
        if self.kind == "soft_sigmoid":
            weights = logits.sigmoid()
            return weights / weights.sum(dim=-1, keepdim=True)
        weights = logits.softmax(dim=-1)
        if self.kind == "softmax":
            return weights
        best = weights.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(weights).scatter(-1, best, weights.gather(-1, best))


class ModalityConnector(nn.Module):
    """What a medium has of its own: tokenizer, projections, modality tokens, router and tags.

    Args:
        shape: of the projection module.
        own: sizes of the medium.
        width: w. out_width: D.
        first: whether the encoder has a class token, which stands first.
    """

    def __init__(self, shape: ProjectionShape, own: Shape, width: int, out_width: int, *, first: bool) -> None:
        super().__init__()
        self.shape = shape
        self.tokenizer = tokenizer_of(own, width, first=first)
        self.tokens = nn.Parameter(torch.empty(shape.modality_tokens, width))
        self.entry, self.entry_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=_EPS)
        routed = shape.experts > 1 and shape.router != "constant"
        self.router = Router(shape.router, width, shape.experts) if routed else None
        self.exit, self.exit_norm = nn.Linear(width, out_width), nn.LayerNorm(out_width, eps=_EPS)
        self.start, self.end = nn.Parameter(torch.empty(out_width)), nn.Parameter(torch.empty(out_width))

    def entered(self, features: Tensor) -> Tensor:
        """Encoder tokens (N, L, w) -> Z (N, Q + L, w), the modality tokens in front."""
        tokens = self.tokens.expand(len(features), -1, -1)
        return torch.cat([tokens, self.entry_norm(self.entry(features))], dim=1)

    def mixed(self, read: list[Tensor], entered: Tensor) -> Tensor:
        """What each expert made of Z, (N, Q, w) each -> their weighted sum (N, Q, w)."""
        if self.router is None:
            return torch.stack(read).mean(dim=0) if len(read) > 1 else read[0]
        weights = self.router(entered[:, : self.shape.modality_tokens])
        return torch.stack([weights[..., k, None] * each for k, each in enumerate(read)]).sum(dim=0)

    def handed_over(self, mixed: Tensor) -> Tensor:
        """(N, Q, w) -> decoder tokens (N, Q + 2, D), tags included."""
        tags = (tag.expand(len(mixed), 1, -1) for tag in (self.start, self.end))
        start, end = tags
        return torch.cat([start, self.exit_norm(self.exit(mixed)), end], dim=1)


class UniversalConnectors(nn.ModuleDict):
    """The connectors of a universal host: a `ModalityConnector` per medium, named after it, and the ``shared`` experts.

    Args:
        shape: of the projection module.
        media: sizes by medium.
        width: w. out_width: D. first: whether the encoder has a class token.
    """

    def __init__(
        self, shape: ProjectionShape, media: Mapping[str, Shape], width: int, out_width: int, *, first: bool
    ) -> None:
        super().__init__(
            {
                EXPERTS: nn.ModuleList(Expert(shape, width) for _ in range(shape.experts)),
                **{name: ModalityConnector(shape, own, width, out_width, first=first) for name, own in media.items()},
            }
        )
        self.modality_tokens, self.first = shape.modality_tokens, first

    def of(self, medium: str) -> ModalityConnector:
        """What a medium has of its own."""
        return cast(ModalityConnector, self[medium])

    @property
    def experts(self) -> list[Expert]:
        return list(cast(Any, self[EXPERTS]))

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encoder tokens (N, L, w) by medium -> decoder tokens (N, Q + 2, D) by medium.

        Media with equally many tokens pass the experts together.
        """
        entered = {name: self.of(name).entered(tokens) for name, tokens in features.items()}
        lengths: dict[int, list[str]] = {}
        for name, tokens in entered.items():
            lengths.setdefault(tokens.shape[1], []).append(name)
        found = {}
        for names in lengths.values():
            together = torch.cat([entered[name] for name in names]) if len(names) > 1 else entered[names[0]]
            read = [expert(together, self.modality_tokens) for expert in self.experts]
            counts = [len(entered[name]) for name in names]
            for name, own in zip(names, zip(*(each.split(counts) for each in read), strict=True), strict=True):
                connector = self.of(name)
                found[name] = connector.handed_over(connector.mixed(list(own), entered[name]))
        return {name: found[name] for name in features}

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill all parameters in place from ``seed`` alone.

        Linear layers and convolutions start as PyTorch's own (uniform within 1/sqrt(fan_in)), norms as ones and zeros,
        modality tokens and positions from N(0, 0.02), tags from U(0, 1) as published.
        """
        for place, (_, module) in enumerate(sorted(self.items())):
            initialise(module, seed + 7919 * place)


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fill a part of the connectors in place, see `UniversalConnectors.initialise`."""
    generator = torch.Generator().manual_seed(seed)
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            if isinstance(each, nn.LayerNorm | nn.RMSNorm):
                parameter.fill_(float(name == "weight"))
            elif isinstance(each, nn.Linear | nn.Conv1d | nn.Conv2d):
                bound = each.weight[0].numel() ** -0.5
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
            elif name in ("start", "end"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
