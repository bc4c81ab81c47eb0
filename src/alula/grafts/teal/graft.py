"""TEAL on a host: embeddings and logits of codes, and what of the layers is opened for them.

    x      = E[i] of text, W_in E_nt[i - V] of codes           logits = [ O h ; O_nt (W_out h) ]

with E and O the host's own, frozen; E_nt and O_nt (codes and marks, width of the codebook); W_in, W_out the two
projections. Each kind of codes has all four of its own, since codebooks differ in width. W_out starts at zero: every id
of a code then has the logit 0.

Shapes: B batch, S new tokens, d width of the stream, V text ids, N ids of codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from alula.codes import CodeTokenizer, JointVocabulary
from alula.codes.vocabulary import MARKS
from alula.errors import UsageError
from alula.grafts.base import Graft
from alula.grafts.embeddings import embedding_length
from alula.grafts.linears import key, named_linears, path_of, trained_like, widths
from alula.grafts.teal.config import CodesSpec, TealConfig
from alula.grafts.teal.constraint import CodeConstraint
from alula.seam import ByThread, ForwardContext, LayerView, OutputOf, Point

GENERATES, INTERLEAVED = "generates", "interleaved"
"""inputs of `generation_extras`: see `CodeConstraint` (plan, interleaved)"""
_NORMS = {"attention": Point.ATTENTION_INPUT, "mlp": Point.MLP_INPUT}
"""what is given to attention and MLP, which is what the norms in front of them give"""


class KindOfCodes(nn.Module):
    """Embeddings, logits and projections of one kind of codes; begin and end stand in front of the codes.

    Attributes:
        embeddings: E_nt, (MARKS + size, c).
        outputs: O_nt, the same shape; None: told by E_nt.
        inward: W_in, (d, c).
        outward: W_out, (c, d).
    """

    def __init__(self, spec: CodesSpec, hidden_size: int, length: float, tied: bool, like: Tensor) -> None:
        """
        Args:
            length: root mean square of the host's embeddings, which those of codes have at the start.
            like: a tensor whose dtype and device the weights take.
        """
        super().__init__()
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        shape = (MARKS + spec.size, spec.width)
        self.length = length
        self.embeddings = nn.Parameter(torch.randn(shape, **place))
        self.outputs = None if tied else nn.Parameter(torch.randn(shape, **place))
        self.inward = nn.Parameter(torch.randn(hidden_size, spec.width, **place) * (length / spec.width**0.5))
        self.outward = nn.Parameter(torch.zeros(spec.width, hidden_size, **place))

    @torch.no_grad()
    def start_from(self, codebook: Tensor) -> None:
        """Take the rows of a (size, c) codebook; marks are drawn at their length."""
        book = codebook.to(self.embeddings)
        if book.shape != self.embeddings[MARKS:].shape:
            raise UsageError(
                f"a codebook of the shape {tuple(book.shape)}, where there are {tuple(self.embeddings[MARKS:].shape)}",
                where="teal",
                remedy="attach with TealConfig.of(codes)",
            )
        spread = book.float().square().mean().sqrt().clamp_min(1e-12)
        for table in (self.embeddings, self.outputs):
            if table is not None:
                table[MARKS:] = book
                table[:MARKS] = torch.randn_like(table[:MARKS]) * spread
        width = book.shape[1]
        self.inward.copy_(torch.randn_like(self.inward) * (self.length / (width**0.5 * spread)))

    def embedded(self, ids: Tensor) -> Tensor:
        """(..., d) of ids counted from begin."""
        return nn.functional.linear(nn.functional.embedding(ids, self.embeddings), self.inward)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., MARKS + size) of (..., d)."""
        table = self.embeddings if self.outputs is None else self.outputs
        return nn.functional.linear(nn.functional.linear(hidden.to(self.outward.dtype), self.outward), table)


class BiasNorm(nn.Module):
    """Scale and bias behind the linears of a layer, gains behind the norms in front of attention and MLP."""

    def __init__(self, graft: TealGraft, index: int, like: Tensor) -> None:
        super().__init__()
        self.graft_name, self.reach = graft.name, graft.config.reach
        self.first = graft.first_layer
        self._key = (BiasNorm, graft.name)
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        anatomy = graft.seam.anatomy
        self.scales, self.biases, self.gains = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for path, (linear, _) in named_linears(anatomy, index).items():
            shape = widths(linear)
            assert shape is not None
            self.scales[key(path)] = nn.Parameter(torch.ones(shape[0], **place))
            self.biases[key(path)] = nn.Parameter(torch.zeros(shape[0], **place))
        for name in _NORMS:
            self.gains[name] = nn.Parameter(torch.ones(anatomy.hidden_size, **place))

    def behind_linear(self, name: str, view: LayerView, output: Tensor, given: Tensor) -> Tensor | None:
        """``s * (output + b)``, where it reaches."""
        return self._where(view, output, lambda: self.scales[name] * (output + self.biases[name]))

    def behind_norm(self, name: str, view: LayerView, output: Tensor) -> Tensor | None:
        """The norm's output times gains, where it reaches."""
        return self._where(view, output, lambda: self.gains[name] * output)

    def _where(self, view: LayerView, output: Tensor, changed: Any) -> Tensor | None:
        if view.ctx.is_disabled(self.graft_name):
            return None
        if self.reach == "all":
            return changed().to(output.dtype)
        reached = self._reached(view.ctx)
        return None if reached is None else torch.where(view.pick(reached), changed().to(output.dtype), output)

    def _reached(self, ctx: ForwardContext) -> Tensor | None:
        """(B, S, 1) bool: a code stands at or before the token; None: nobody said which tokens are codes. Once per
        forward."""
        if self._key not in ctx.memo:
            owner: Any = ctx.requests.owners[self.graft_name]
            is_code = owner.take_codes()
            reached = None
            if is_code is not None and is_code.shape == ctx.tokens.shape:
                flags = is_code[:, None, :, None].to(torch.float16)
                flags, _ = ctx.to_cache(self.graft_name, [self.first], flags, flags)
                reached = flags.cummax(dim=2).values[:, 0, -is_code.shape[1] :] > 0
            ctx.memo[self._key] = reached
        return ctx.memo[self._key]


class TealGraft(Graft):
    """TEAL attached to a host; see `TealConfig`.

    The host takes ids of the joint vocabulary (`vocabulary`) and gives logits of all of it. With labels the loss is the
    caller's to take (`alula train` does). `generate` within `alula.seam.generation_extras` gives text alone, unless it
    is told by ``generates`` (B, n) int64 which items to give, and by ``interleaved`` (B,) bool that words may stand
    between.
    """

    config: TealConfig
    further_inputs = (GENERATES, INTERLEAVED)

    def grow(self, indices: list[int]) -> None:
        anatomy = self.seam.anatomy
        embeddings: Any = anatomy.embeddings
        like = trained_like(embeddings, embeddings, where="teal: the embeddings")
        length = embedding_length(anatomy)
        width = int(embeddings.weight.shape[1])
        kinds = {
            name: KindOfCodes(spec, width, length, self.config.tied, like) for name, spec in self.config.codes.items()
        }
        if width != anatomy.hidden_size:
            raise UsageError(
                f"embeddings of width {width} before a stream of {anatomy.hidden_size}",
                where="teal",
                remedy="take a host whose embeddings are as wide as its stream",
            )
        self._codes: ByThread[Tensor] = ByThread()
        self.first_layer = min(indices)
        self.grow_whole(nn.ModuleDict(kinds))
        self.hold(self.seam.request_wider(self))
        if self.config.bias_norm:
            super().grow(indices)

    def build_layer(self, index: int) -> nn.Module:
        layer = self.seam.anatomy.layers[index]
        return BiasNorm(self, index, trained_like(layer, layer, where=f"teal: decoder layer {index}"))

    def place(self, index: int, module: Any) -> None:
        for name in module.scales:
            self.on(OutputOf(path_of(name)), index, partial(module.behind_linear, name))
        for name, point in _NORMS.items():
            self.on(point, index, partial(module.behind_norm, name))

    def parameters_by_part(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {"teal.projections": [], "teal.embeddings": []}
        for kind in self.kinds.values():
            groups["teal.projections"] += [kind.inward, kind.outward]
            groups["teal.embeddings"] += [each for each in (kind.embeddings, kind.outputs) if each is not None]
        layered = [each for module in self.layers.values() for each in module.parameters()]
        return {**groups, "teal.bias_norm": layered} if layered else groups

    @property
    def kinds(self) -> dict[str, KindOfCodes]:
        """The parts of each kind of codes by name."""
        whole: Any = self.whole
        return dict(whole.items())

    @cached_property
    def vocabulary(self) -> JointVocabulary:
        """Of the host's text and the codes."""
        embeddings: Any = self.seam.anatomy.embeddings
        specs = {name: (spec.size, spec.tokens, spec.streams) for name, spec in self.config.codes.items()}
        return JointVocabulary.of(int(embeddings.weight.shape[0]), specs)

    @property
    def further_tokens(self) -> int:
        return self.vocabulary.size - self.vocabulary.text

    def start_from(self, codes: Mapping[str, CodeTokenizer]) -> None:
        """Have embeddings and outputs begin as the tokenizers' codebooks, row by row.

        Raises:
            UsageError: other names, or a codebook of another shape.
        """
        if codes.keys() != self.config.codes.keys():
            raise UsageError(f"codebooks of {sorted(codes)}, where there are {sorted(self.config.codes)}", where="teal")
        for name, kind in self.kinds.items():
            kind.start_from(codes[name].codebook())

    # -- what the seam asks -------------------------------------------------------------------------------------------

    def embedded(self, ids: Tensor, embeds: Tensor) -> Tensor:
        """See `alula.seam.vocabulary.Wider`."""
        self._codes.put(self.vocabulary.is_code(ids))
        for (_, kind), its in zip(self.kinds.items(), self.vocabulary.ranges, strict=True):
            mine = (ids >= its.start) & (ids < its.stop)
            found = kind.embedded((ids - its.start).clamp(0, its.stop - its.start - 1))
            embeds = torch.where(mine[..., None], found.to(embeds.dtype), embeds)
        return embeds

    def further_logits(self, hidden: Tensor) -> Tensor:
        """See `alula.seam.vocabulary.Wider`."""
        return torch.cat([kind.logits(hidden) for kind in self.kinds.values()], dim=-1)

    def take_codes(self) -> Tensor | None:
        """(B, S) which of the tokens that this thread embedded last are codes; asked for once."""
        found = self._codes.get()
        self._codes.drop()
        return found

    def logits_processors(self, inputs: Mapping[str, Any]) -> Sequence[LogitsProcessor]:
        ids = inputs.get("input_ids")
        prompt = 0 if ids is None else int(ids.shape[1])
        plan, interleaved = inputs.get(GENERATES), inputs.get(INTERLEAVED)
        host: Any = self.seam.anatomy.host
        settings = inputs.get("generation_config") or host.generation_config
        stops = inputs.get("eos_token_id", settings.eos_token_id)
        stops = stops.tolist() if isinstance(stops, Tensor) else stops
        stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        return [CodeConstraint(self.vocabulary, prompt, plan, interleaved, stops)]
