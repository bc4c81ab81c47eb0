"""The learners of a decoder layer: their modules, which tokens are their keys, and the contract of what computes them.

Shapes: B batch, Q query tokens, S new tokens, P cached tokens, K key tokens of one learner, d stream width, H learner
heads, D their width, R rotated width, r rank.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alula.errors import AlulaError, UsageError
from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.router import ConstantRouter, Router, build_router
from alula.grafts.wings.stacked import Siblings, compute_dtype
from alula.seam import ForwardContext, Part, Seam, Uncompiled
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
    # compiled, what autograd makes of it is fused as it is
    if out is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
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
        return _rotated(gradient, cos, sin, back=True), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *of_angles: Tensor | None) -> Tensor:
        return _rotated(tangent, *ctx.saved_tensors)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None, *, back: bool = False) -> Tensor:
    """Writes each half once and copies none: over many tokens this is a good part of what a learner costs."""
    sign = -1 if back else 1
    width = cos.shape[-1]
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    if width == x.shape[-1]:
        rotated = torch.mul(x, cos, out=out)
    else:
        rotated = torch.cat([x[..., :width] * cos, x[..., width:]], dim=-1)
    rotated[..., : width // 2].addcmul_(second, sin, value=-sign)
    rotated[..., width // 2 : width].addcmul_(first, sin, value=sign)
    return rotated


def keeps_outputs(config: WingsConfig, head_dim: int) -> bool:
    """Whether a cache holds of a token, for each of the learners' heads, the r numbers that `o.down` makes of its value
    (`cache="keys"`): a step then reads no input tokens, which are a head's width wide. Not where that is much to keep:
    at most a quarter of what the keys are."""
    return config.cache == "keys" and 4 * config.rank <= head_dim


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
    2 r numbers of this layer.

    Called by itself it computes one learner from one kind of keys. In a decoder its engines (`prefill`, `decode`)
    compute all learners of a layer together.

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
        q, k, v = (self.heads(x + part(x)) for x, part in ((query, self.q), (tokens, self.k), (tokens, self.v)))
        if query_angles is not None:
            q = rotate(q, query_angles)
        if key_angles is not None:
            k = rotate(k, key_angles)
        blocks = split_queries(counts.cpu().numpy()) if blocks is None else blocks
        parts = attend_blocks(q, k, v, counts, blocks, self.dropout if self.training else 0.0)
        attended = torch.cat(parts, dim=2).transpose(1, 2).flatten(2).masked_fill((counts == 0)[..., None], 0.0)
        return self.o(attended)

    def heads(self, x: Tensor) -> Tensor:
        """(.., tokens, d) -> (.., H, tokens, D)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, blocks: Sequence[QueryBlock], dropout: float
) -> list[Tensor]:
    """Attention of one learner, a block of queries at a time: no mask is ever larger than a block.

    Queries that see no key get something finite, for the caller to set to 0.

    Args:
        q: (B, H, Q, D); k, v: (B, H, K, D).
        counts: (B, Q) how many keys, from the first on, each query may see.
        blocks: from `split_queries`.

    Returns:
        (B, H, block, D) of each block.
    """
    parts = []
    for block, queries in zip(blocks, q.split([block.stop - block.start for block in blocks], dim=2), strict=True):
        if not block.max_keys:
            parts.append(q.new_zeros(()).expand_as(queries))
            continue
        # neither causal nor equal queries need a mask, which lets the fastest kernels in
        needs_no_mask = block.is_causal or block.min_keys == block.max_keys
        every = block.max_keys == k.shape[2]
        parts.append(
            F.scaled_dot_product_attention(
                queries,
                k if every else k[:, :, : block.max_keys],
                v if every else v[:, :, : block.max_keys],
                attn_mask=None if needs_no_mask else _mask(counts, block),
                is_causal=block.is_causal,
                dropout_p=dropout,
                scale=q.shape[-1] ** -0.5,
            )
        )
    return parts


def split_queries(
    counts: np.ndarray, size: int = 512, *, cuts: Sequence[int] = (), own: slice | None = None
) -> list[QueryBlock]:
    """Blocks of queries, each with the keys it needs.

    Args:
        counts: (B, Q) how many keys each query may see.
        size: the most queries in a block that needs a mask.
        cuts: queries in front of which a block shall end.
        own: the queries that the keys are made of, if all keys are among them: a causal block.
    """
    bounds = sorted({0, *cuts, counts.shape[1], *([own.start, own.stop] if own is not None else [])})
    blocks: list[QueryBlock] = []
    for start, stop in itertools.pairwise(bounds):
        if own is not None and own.start <= start < own.stop:
            if start == own.start:
                blocks.append(QueryBlock(start, own.stop, int(counts.min()), own.stop - start, is_causal=True))
            continue
        for first in range(start, stop, size):
            chunk = counts[:, first : min(first + size, stop)]
            most = int(chunk.max())
            least = int(np.where(chunk > 0, chunk, most).min())
            blocks.append(QueryBlock(first, first + chunk.shape[1], least, most))
    return blocks


def _mask(counts: Tensor, block: QueryBlock) -> Tensor:
    """(B, 1, block, keys) bool. A query without keys sees the first: its output is zeroed, but must not be NaN."""
    key = torch.arange(block.max_keys, device=counts.device)
    return key < counts[:, None, block.start : block.stop, None].clamp(min=1)


# -- which tokens are keys --------------------------------------------------------------------------------------------

MOST_SEGMENTS = 16
"""tokens are handled segment by segment up to this many of them, else one by one"""


def keys_of(learner: str, tokens: TokenMap, config: WingsConfig) -> Tensor:
    """(B, S) bool: the token is a key of `learner`."""
    if learner == "visual":
        return tokens.is_perceptual
    return tokens.is_text if config.system_keys else tokens.is_text & (tokens.role != Role.SYSTEM)


def check_roles(roles: np.ndarray) -> None:
    """Refuse to leave out the system prompt where no token has a role.

    Raises:
        UsageError: so it is.
    """
    if not (roles != Role.UNKNOWN).any():
        raise UsageError(
            "wings: system_keys=False leaves out the system prompt, but nothing says which tokens it is",
            remedy="give the model token_roles, as Collator(processor, roles=True) makes them, or leave it at True",
        )


def active_of(learner: str, tokens: TokenMap, config: WingsConfig, keys: Tensor) -> Tensor:
    """(B, S) bool: the token attends to any of the (B, S) `keys` of a learner, those at or before it.

    Under the exact gate the textual learner is inactive at tokens that have seen nothing perceptual.
    """
    sees = keys.cumsum(dim=1).to(torch.bool) & tokens.valid
    return sees & tokens.has_seen if learner == "textual" and config.gate == "exact" else sees


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


def by_owner(is_perceptual: Tensor | None, each: Sequence[Tensor]) -> Tensor:
    """What was made of tokens by the learner whose keys they are.

    Args:
        is_perceptual: bool, to be read next to what was made; of no use for an only one.
        each: by the visual learner and by the textual one; or by the only one.
    """
    if is_perceptual is None or len(each) == 1:
        return each[0]
    return torch.where(is_perceptual, each[0], each[1])


def _values_of(router: Router, tokens: TokenMap) -> Tensor:
    """(B, C, tokens) `key_values` of a router that has them."""
    values = router.key_values(tokens)
    assert values is not None
    return values.transpose(1, 2)


def segment_lengths(labels: np.ndarray) -> list[int]:
    """Lengths of the segments of equal values in (S,) labels."""
    changes = (np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist()
    return [stop - start for start, stop in itertools.pairwise([0, *changes, len(labels)])]


def prepared(x: Tensor, config: WingsConfig) -> Tensor:
    """(.., d) stream or input tokens as the learners take them."""
    # an eps of our own: torch's default is the dtype's, which in bfloat16 is larger than an embedding's mean square
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) if config.normalize else x


# -- all learners of a layer, and what computes them ------------------------------------------------------------------


@dataclass(eq=False)
class Engine(abc.ABC):
    """One way to compute learners. Made once per forward, of what its layers share; each layer attends through it."""

    _shared_values: Tensor | None = field(default=None, init=False)
    _router_values: dict[str, Sequence[Tensor] | None] = field(default_factory=dict, init=False)

    def prepare(self, learners: LayerLearners, ctx: ForwardContext) -> None:
        """Make what all layers of the graft share, when the first of them is entered."""
        name = learners.graft_name
        if name not in self._router_values:
            assert ctx.inputs is not None, "the first decoder layer has not been entered"
            dtype = compute_dtype(ctx.inputs)
            self._router_values[name] = learners.siblings.router_values(ctx.all_tokens, dtype)

    @abc.abstractmethod
    def attend(
        self, learners: LayerLearners, ctx: ForwardContext, query: Tensor, branch: Tensor | None = None
    ) -> Tensor | None:
        """The learners' outputs, each times its router weight and the gain, summed.

        Args:
            learners: those of one layer.
            query: (B, S, d) of the new tokens.
            branch: (B, S, d) to add them to, which saves an operator.

        Returns:
            (B, S, d); None where no learner has keys.
        """

    def key_values(self, learners: LayerLearners, ctx: ForwardContext) -> Tensor | None:
        """(B, P + S, C) values per key whose sums of attention the layer's router needs, or None."""
        router, of_layers = learners.router, self._router_values[learners.graft_name]
        if of_layers is not None:
            return of_layers[learners.place]
        if router is None or not router.values_are_shared:
            return None if router is None else router.key_values(ctx.all_tokens)
        if self._shared_values is None:
            dtype = next(router.parameters()).dtype
            of_all = ctx.facts_of_tokens((type(router), dtype), partial(_values_of, router))
            self._shared_values = of_all.transpose(1, 2)
        return self._shared_values

    def part(self, learners: LayerLearners, ctx: ForwardContext) -> Part | None:
        """What the learners add in a compiled layer; None: nothing.

        Raises:
            Uncompiled: this engine is not compiled.
        """
        raise Uncompiled("the released arithmetic is not compiled")


def project(low: Tensor, o_up: Tensor, branch: Tensor | None, gain: float) -> Tensor:
    """(B, S, d) of (B, S, L * r) outputs, weighed, projected up for all learners at once and added to a branch."""
    batch, count, _ = low.shape
    if branch is None or branch.dtype != o_up.dtype:
        output = low @ o_up
        output = output if gain == 1.0 else output * gain
        return output if branch is None else branch + output
    flat = torch.addmm(branch.reshape(batch * count, -1), low.reshape(batch * count, -1), o_up, alpha=gain)
    return flat.view(batch, count, -1)


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
        keeps_outputs: see there.
        router: None for a single learner.
        siblings: these layers' learners and those of all others of their graft; place: of this layer among them.
    """

    def __init__(self, seam: Seam, name: str, config: WingsConfig, index: int, siblings: Siblings) -> None:
        super().__init__()
        self.siblings, self.place = siblings, len(siblings.layers)
        siblings.layers.append(self)
        anatomy = seam.anatomy
        reference = anatomy.layers[index].get_parameter(next(iter(dict(anatomy.layers[index].named_parameters()))))
        # half-precision hosts train their adapters in float32, as PEFT does
        device, dtype = reference.device, torch.float32
        self.index, self.graft_name, self.config = index, name, config
        self.layer_type = anatomy.layer_type(index)
        self.host_head_dim = anatomy.head_dims[index]
        self.head_dim = learner_head_dim(anatomy.hidden_size, math.gcd(*anatomy.head_dims))  # alike in all layers
        self.keeps_outputs = keeps_outputs(config, self.head_dim)
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

    def learners(self) -> list[LoRRA]:
        """Those of all learners."""
        return [self.learner(name) for name in self.config.learners]

    def query(self, stream: Tensor, branch: Tensor) -> Tensor:
        """(B, S, d) what the learners ask with.

        Args:
            stream: the layer's input.
            branch: what attention adds to it.
        """
        return prepared(stream + branch if self.config.query == "post_attention" else stream, self.config)

    def state(self, ctx: ForwardContext) -> LayerState:
        """What `ctx` knows of these learners."""
        state: LayerState | None = ctx.memo.get(self)
        if state is None:
            state = ctx.memo[self] = LayerState()
        return state

    @property
    def wants_sums(self) -> bool:
        """Whether the router goes by sums of attention."""
        return self.router is not None and not isinstance(self.router, ConstantRouter)

    def router_weights(self, ctx: ForwardContext) -> Tensor | None:
        """(B, S, 2) or (2,); None for a single learner.

        Raises:
            AlulaError: the sums of attention it needs were not delivered.
        """
        router, sums = self.router, self.state(ctx).sums
        if router is None:
            return None
        if sums is None and self.wants_sums:
            raise AlulaError(
                f"the graft {self.graft_name!r} routes by attention, but the decoder's attention implementation was "
                f"changed to {ctx.anatomy.config._attn_implementation!r} while it is attached",
                remedy='set it to "eager", or detach the graft before changing it',
            )
        weights: Tensor = router(sums)
        return weights

    @property
    def must_take_part(self) -> bool:
        """Whether inactive parameters must: sharded training deadlocks when ranks disagree on gradients."""
        return self.training and torch.is_grad_enabled() and torch.distributed.is_initialized()


def zero_of(module: nn.Module) -> Tensor:
    """A zero in which every trainable parameter of ``module`` has a part."""
    return torch.stack([p.sum() * 0.0 for p in module.parameters() if p.requires_grad] or [torch.zeros(())]).sum()
