"""The learners of a decoder layer: their modules, which tokens are their keys, and the contract of what computes them.

Shapes: B batch, Q query tokens, S new tokens, P cached tokens, K key tokens of one learner, d stream width, H learner
heads, D their width, R rotated width, r rank.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alula.errors import AlulaError, UsageError
from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.router import ConstantRouter, build_router
from alula.seam import ForwardContext, Seam
from alula.tokens import Role, TokenMap

# -- rotary position embedding ----------------------------------------------------------------------------------------


class Angles(NamedTuple):
    """RoPE angles of some tokens, shaped to be read next to what is rotated: (.., R) cosines, (.., R / 2) sines."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Angles:
        """From a host's (B, tokens, R) tables, for heads of (B, H, tokens, D)."""
        half = sin[..., : sin.shape[-1] // 2]
        return cls(cos[:, None].to(dtype or cos.dtype), half[:, None].to(dtype or sin.dtype))


def rotate(x: Tensor, angles: Angles, out: Tensor | None = None) -> Tensor:
    """Rotate the first R channels of (.., D) heads, half-split, with the host's own angles; the rest pass through.

    Args:
        out: where to write the result, of the shape of `x`; without gradients only.
    """
    if out is None and torch.is_grad_enabled():
        return _Rotation.apply(x, *angles)
    return _rotated(x, *angles, out)


class _Rotation(torch.autograd.Function):
    """Its backward turns back. Autograd's own would copy each half several times over."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _rotated(x, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *of_angles: Tensor | None) -> Tensor:
        return _rotated(tangent, *ctx.saved_tensors)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Writes each half once and copies none: over many tokens this is a good part of what a learner costs."""
    width = cos.shape[-1]
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    if width == x.shape[-1]:
        rotated = torch.mul(x, cos, out=out)
    else:
        rotated = torch.cat([x[..., :width] * cos, x[..., width:]], dim=-1)
    rotated[..., : width // 2].addcmul_(second, sin, value=-1)
    rotated[..., width // 2 : width].addcmul_(first, sin)
    return rotated


def learner_head_dim(width: int, head_dim: int) -> int:
    """Head width of a learner: the host's own where it divides the stream, else the largest common divisor.

    The identity in Q, K and V fixes the learner's total width to d, which need not be heads * head_dim (Qwen3, Gemma).
    """
    return math.gcd(width, head_dim)


def narrow_angles(tables: tuple[Tensor, Tensor], head_dim: int, learner_dim: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) tables for learner heads of width `learner_dim`, a divisor of the host's `head_dim`.

    Frequency i of a D'-wide RoPE is frequency i * D / D' of a D-wide one with the same base, so every (D / D')-th angle
    is exactly the narrower RoPE, any scaling of the host included.
    """
    step = head_dim // learner_dim
    if step == 1:
        return tables
    halves = [table[..., : table.shape[-1] // 2][..., ::step] for table in tables]
    cos, sin = (torch.cat([h, h], dim=-1) for h in halves)
    return cos, sin


# -- one learner ------------------------------------------------------------------------------------------------------


class QueryBlock(NamedTuple):
    """Queries `start` to `stop`: each sees at least the first `min_keys` and at most the first `max_keys`, or none.

    In a causal block the queries are the tokens the keys are made of, and each sees those up to itself.
    """

    start: int
    stop: int
    min_keys: int
    max_keys: int
    is_causal: bool = False


class LowRank(nn.Module):
    """``x -> up down x`` with `down` (rank, d) normal and `up` (d, rank) zero at the start."""

    def __init__(self, width: int, rank: int, *, std: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(width, rank, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.down, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_up(self.apply_down(x))

    def apply_down(self, x: Tensor) -> Tensor:
        """(.., d) -> (.., r)."""
        return F.linear(x, self.down.to(x.dtype))

    def apply_up(self, z: Tensor) -> Tensor:
        """(.., r) -> (.., d)."""
        return F.linear(z, self.up.to(z.dtype))


class LoRRA(nn.Module):
    """The low-rank residual attention learner (Wings, Eq. 4): multi-head attention whose Q, K, V projections are
    identity plus low rank, and whose output is low rank only.

    With `up` zero, the output of a fresh learner is exactly 0.

    What a key token contributes is its input token x, which all layers share, and its factors z (down_k x, down_v x),
    2 r numbers of this layer. While prefilling, keys and values written out (x + up z) and a fused attention kernel are
    cheapest. For few queries (decoding) the values are never made: sum_j p_j (x_j + up_v z_j) = sum_j p_j x_j + up_v
    sum_j p_j z_j.

    Args:
        width: d of the decoder's stream.
        head_dim: D; must divide `width`.
        rank: of every projection.
        dropout: on attention weights, in training.
    """

    def __init__(
        self,
        width: int,
        head_dim: int,
        rank: int,
        *,
        std: float = 0.02,
        dropout: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.head_dim, self.dropout = head_dim, dropout
        self.q, self.k, self.v, self.o = (
            LowRank(width, rank, std=std, device=torch.device(device), dtype=dtype) for _ in range(4)
        )

    def factors(self, tokens: Tensor) -> Tensor:
        """(B, tokens, d) input tokens -> (B, tokens, 2 r): what `k` and `v` project down to."""
        return torch.cat([self.k.apply_down(tokens), self.v.apply_down(tokens)], dim=-1)

    def forward(
        self,
        query: Tensor,
        tokens: Tensor,
        counts: Tensor,
        *,
        query_angles: Angles | None = None,
        key_angles: Angles | None = None,
        blocks: Sequence[QueryBlock] | None = None,
    ) -> Tensor:
        """Attend from the stream to the decoder's input tokens.

        Args:
            query: (B, Q, d).
            tokens: (B, K, d) input tokens, from which keys and values are made, in the order of their positions.
            counts: (B, Q) how many of the tokens, from the first on, each query may see. With none it gets exactly 0.
            query_angles, key_angles: to be read next to (B, H, tokens, D).
            blocks: how to split the queries; `split_queries` of the counts by default.

        Returns:
            (B, Q, d).
        """
        key_factors, value_factors = self.factors(tokens).chunk(2, dim=-1)
        keys = self.expand_keys(tokens, key_factors, key_angles)
        blocks = split_queries(counts) if blocks is None else blocks
        attended = self.attend(query, tokens, keys, value_factors, counts, blocks, query_angles)
        return self.o.apply_up(attended.masked_fill((counts == 0)[..., None], 0.0))

    def expand_keys(self, tokens: Tensor, factors: Tensor, angles: Angles | None) -> Tensor:
        """(B, H, K, D) rotated keys of (B, K, d) tokens and their (B, K, r) factors."""
        keys = self.heads(tokens + self.k.apply_up(factors))
        return keys if angles is None else rotate(keys, angles)

    def attend(
        self,
        query: Tensor,
        tokens: Tensor,
        keys: Tensor,
        value_factors: Tensor,
        counts: Tensor,
        blocks: Sequence[QueryBlock],
        angles: Angles | None,
    ) -> Tensor:
        """`forward` before the output's projection up, which several learners may share: (B, Q, r).

        Queries that see no key get something finite here, for the caller to set to 0.

        Args:
            keys: (B, H, K, D) from `expand_keys`.
            value_factors: (B, K, r).
            blocks: how to split the queries; from `split_queries`.
            angles: of the queries.
        """
        q = self.queries(query, angles)
        dropout = self.dropout if self.training else 0.0
        if query.shape[1] < self.head_dim and not dropout:
            out = self._attend_factors(q, keys, tokens, value_factors, counts, blocks)
        else:
            values = self.heads(tokens + self.v.apply_up(value_factors))
            out = self._attend_values(q, keys, values, counts, blocks, dropout)
        return self.o.apply_down(out.transpose(1, 2).flatten(2))

    def queries(self, query: Tensor, angles: Angles | None) -> Tensor:
        """(B, Q, d) -> (B, H, Q, D), projected and rotated."""
        q = self.heads(query + self.q(query))
        return q if angles is None else rotate(q, angles)

    def heads(self, x: Tensor) -> Tensor:
        """(B, tokens, d) -> (B, H, tokens, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _attend_values(
        self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor, blocks: Sequence[QueryBlock], dropout: float
    ) -> Tensor:
        """(B, H, Q, D), a block of queries at a time: no mask is ever larger than a block."""
        parts = []
        for block in blocks:
            queries = q[:, :, block.start : block.stop]
            # neither causal nor equal queries need a mask, which lets the fastest kernels in
            needs_no_mask = block.is_causal or block.min_keys == block.max_keys
            attended = F.scaled_dot_product_attention(
                queries,
                k[:, :, : block.max_keys],
                v[:, :, : block.max_keys],
                attn_mask=None if needs_no_mask else _mask(counts, block),
                is_causal=block.is_causal,
                dropout_p=dropout,
                scale=self.head_dim**-0.5,
            )
            parts.append(attended if block.max_keys else torch.zeros_like(queries))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _attend_factors(
        self,
        q: Tensor,
        k: Tensor,
        tokens: Tensor,
        value_factors: Tensor,
        counts: Tensor,
        blocks: Sequence[QueryBlock],
    ) -> Tensor:
        """(B, H, Q, D) without values: attended tokens, and `v.up` of attended factors."""
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        if any(block.is_causal or block.min_keys < tokens.shape[1] for block in blocks):
            every = QueryBlock(0, q.shape[2], 0, tokens.shape[1])
            scores = scores.masked_fill(~_mask(counts, every), torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(tokens.dtype)
        value_factors = value_factors.to(weights.dtype)  # what was kept may come from under autocast
        attended = (weights.flatten(1, 2) @ value_factors).unflatten(1, weights.shape[1:3])  # (B, H, Q, r)
        up = self.v.up.to(attended.dtype).unflatten(0, (-1, self.head_dim))  # (H, D, r)
        return weights @ self.heads(tokens) + attended @ up.transpose(-1, -2)


def split_queries(
    counts: Tensor, size: int = 512, *, cuts: Sequence[int] = (), own: slice | None = None
) -> list[QueryBlock]:
    """Blocks of queries, each with the keys it needs. Synchronizes with the device once.

    Args:
        counts: (B, Q) how many keys each query may see.
        size: the most queries in a block that needs a mask.
        cuts: queries in front of which a block shall end.
        own: the queries that the keys are made of, if all keys are among them: a causal block.
    """
    bounds = sorted({0, *cuts, counts.shape[1], *([own.start, own.stop] if own is not None else [])})
    spans: list[tuple[int, int, bool]] = []
    for start, stop in itertools.pairwise(bounds):
        if own is not None and own.start <= start < own.stop:
            if start == own.start:
                spans.append((own.start, own.stop, True))
            continue
        spans += [(at, min(at + size, stop), False) for at in range(start, stop, size)]
    min_and_max = []
    for start, stop, _ in spans:
        chunk = counts[:, start:stop]
        max_keys = chunk.max()
        min_and_max.append(torch.stack([torch.where(chunk > 0, chunk, max_keys).min(), max_keys]))
    extremes = torch.stack(min_and_max).tolist()
    return [
        QueryBlock(start, stop, min_keys, stop - start if is_causal else max_keys, is_causal)
        for (start, stop, is_causal), (min_keys, max_keys) in zip(spans, extremes, strict=True)
    ]


def _mask(counts: Tensor, block: QueryBlock) -> Tensor:
    """(B, 1, block, keys) bool. A query without keys sees the first: its output is zeroed, but must not be NaN."""
    key = torch.arange(block.max_keys, device=counts.device)
    return key < counts[:, None, block.start : block.stop, None].clamp(min=1)


# -- which tokens are keys --------------------------------------------------------------------------------------------

MOST_SEGMENTS = 16
"""tokens are handled segment by segment up to this many of them, else one by one"""


def keys_of(learner: str, tokens: TokenMap, config: WingsConfig) -> Tensor:
    """(B, S) bool: the token is a key of `learner`.

    Raises:
        UsageError: the system prompt is to be left out, and no token has a role.
    """
    if learner == "visual":
        return tokens.is_perceptual
    if config.system_keys:
        return tokens.is_text
    if not bool((tokens.role != Role.UNKNOWN).any()):
        raise UsageError(
            "wings: system_keys=False leaves out the system prompt, but nothing says which tokens it is",
            remedy="give the model token_roles, as Collator(processor, roles=True) makes them, or leave it at True",
        )
    return tokens.is_text & (tokens.role != Role.SYSTEM)


def first_tokens(chosen: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """(B, most) the chosen tokens of (B, S) in their order, filled up with token 0, and (B, most) which are real.

    Args:
        most: the largest number of chosen tokens; found by synchronizing with the device where it is not given.
    """
    most = int(chosen.sum(dim=1).max()) if most is None else most
    index = torch.sort((~chosen).to(torch.int8), dim=1, stable=True).indices[:, :most]
    real = chosen.gather(1, index)
    return index.masked_fill(~real, 0), real


def pick_tokens(x: Tensor, index: Tensor) -> Tensor:
    """(B, S, ..) -> (B, picked, ..)."""
    shape = (*index.shape, *x.shape[2:])
    return x.gather(1, index.reshape(*index.shape, *(1,) * (x.dim() - 2)).expand(shape))


def segment_lengths(labels: Tensor) -> list[int]:
    """Lengths of the segments of equal values in (S,) labels. Synchronizes with the device once."""
    changes = ((labels[1:] != labels[:-1]).nonzero().flatten() + 1).tolist()
    return [stop - start for start, stop in itertools.pairwise([0, *changes, len(labels)])]


def prepared(x: Tensor, config: WingsConfig) -> Tensor:
    """(.., d) stream or input tokens as the learners take them."""
    # an eps of our own: torch's default is the dtype's, which in bfloat16 is larger than an embedding's mean square
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) if config.normalize else x


# -- all learners of a layer, and what computes them ------------------------------------------------------------------


class Engine(abc.ABC):
    """One way to compute learners. Made once per forward, of what its layers share; each layer attends through it."""

    _shared_values: Tensor | None = None

    @abc.abstractmethod
    def attend(self, learners: LayerLearners, ctx: ForwardContext, query: Tensor) -> Tensor | None:
        """The learners' outputs, each times its router weight, summed.

        Args:
            learners: those of one layer.
            query: (B, S, d) of the new tokens.

        Returns:
            (B, S, d); None where no learner has keys.
        """

    def key_values(self, learners: LayerLearners, ctx: ForwardContext) -> Tensor | None:
        """(B, P + S, C) values per key whose sums of attention the layer's router needs, or None."""
        router = learners.router
        if router is None or not router.values_are_shared:
            return None if router is None else router.key_values(ctx.all_tokens)
        if self._shared_values is None:
            self._shared_values = router.key_values(ctx.all_tokens)
        return self._shared_values


@dataclass
class LayerState:
    """What one forward knows of the learners of one layer.

    Attributes:
        engine: what computes them.
        stream: (B, S, d) the layer's input.
        is_differentiable: whether gradients were enabled when the layer was entered.
        sums: (B, S, H, C) of the main attention, for the router.
    """

    engine: Engine | None = None
    stream: Tensor | None = None
    is_differentiable: bool = False
    sums: Tensor | None = None


class LayerLearners(nn.Module):
    """The learners and the router of one decoder layer.

    Attributes:
        index: the decoder layer's.
        graft_name: under which their graft is attached, and what they keep lies in a cache.
        layer_type: the layer's type of attention, which has RoPE angles of its own.
        host_head_dim: head width of the host; head_dim: of the learners.
        router: None for a single learner.
    """

    def __init__(self, seam: Seam, name: str, config: WingsConfig, index: int) -> None:
        super().__init__()
        anatomy = seam.anatomy
        reference = anatomy.layers[index].get_parameter(next(iter(dict(anatomy.layers[index].named_parameters()))))
        # half-precision hosts train their adapters in float32, as PEFT does
        device, dtype = reference.device, torch.float32
        self.index, self.graft_name, self.config = index, name, config
        self.layer_type = anatomy.layer_type(index)
        self.host_head_dim = anatomy.head_dim
        self.head_dim = learner_head_dim(anatomy.hidden_size, anatomy.head_dim)
        for learner in config.learners:
            module = LoRRA(
                anatomy.hidden_size,
                self.head_dim,
                config.rank,
                std=config.init_std,
                dropout=config.dropout,
                device=device,
                dtype=dtype,
            )
            self.add_module(learner, module)
        self.router = build_router(config, anatomy.num_heads, device=device, dtype=dtype)

    def learner(self, name: str) -> LoRRA:
        """The module of a learner."""
        return getattr(self, name)

    def state(self, ctx: ForwardContext) -> LayerState:
        """What `ctx` knows of these learners."""
        states = ctx.layer(self.index)
        state: LayerState | None = states.get(self)
        if state is None:
            state = states[self] = LayerState()
        return state

    def router_weights(self, ctx: ForwardContext) -> Tensor:
        """(B, S, 2) or (2,).

        Raises:
            AlulaError: the sums of attention it needs were not delivered.
        """
        assert self.router is not None
        sums = self.state(ctx).sums
        if sums is None and not isinstance(self.router, ConstantRouter):
            raise AlulaError(
                f"the graft {self.graft_name!r} routes by attention, but the decoder's attention implementation was "
                f"changed to {ctx.anatomy.config._attn_implementation!r} while it is attached",
                remedy='set it to "eager", or detach the graft before changing it',
            )
        return self.router(sums)

    @property
    def must_take_part(self) -> bool:
        """Whether inactive parameters must: sharded training deadlocks when ranks disagree on gradients."""
        return self.training and torch.is_grad_enabled() and torch.distributed.is_initialized()


def zero_of(module: nn.Module) -> Tensor:
    """A zero in which every trainable parameter of ``module`` has a part."""
    return torch.stack([p.sum() * 0.0 for p in module.parameters() if p.requires_grad] or [torch.zeros(())]).sum()
