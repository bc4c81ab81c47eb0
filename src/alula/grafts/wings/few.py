"""Few queries of all learners of a layer at once: what a step of decoding computes.

Many queries are asked learner by learner and go through fused attention (`lorra`). For few, launching operations costs
more than what they compute, and gathering costs more than attending. So all learners attend to one table of keys, in
the order of the tokens, in which every token is raised by the learner it is a key of; what a query may not hear is
masked. Masks are (B, learners * Q, tokens) with Q below a head's width: nothing grows with the square of the tokens.

Shapes: B batch, Q new tokens, N = P + Q all tokens, d stream width, H heads, D their width, L learners, r rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.keys import prepared
from alula.grafts.wings.lorra import LoRRA
from alula.grafts.wings.order import MOST_RUNS, chosen_tokens, run_lengths
from alula.grafts.wings.rope import Angles, rotate
from alula.seam import ForwardContext

Whose = Literal["new", "all", "asked"]


class Run(NamedTuple):
    """Tokens `start` to `stop` are keys of the learner at `place`; -1: of none."""

    start: int
    stop: int
    place: int


@dataclass(frozen=True)
class Step:
    """What the layers of one forward of few tokens share.

    Attributes:
        tokens: (B, N, d) input tokens.
        head_dim: D.
        runs: of all tokens, where they are few and the same in all samples.
        new_runs: of the new tokens, counted from the first of them; likewise.
        bar: (B, 1, L * Q, N) additive: 0, or the lowest number where the query may not hear the token.
        speaks: (B, Q, L): 1 where a query hears any token, 0 elsewhere; None where all do.
    """

    tokens: Tensor
    head_dim: int
    runs: list[Run] | None
    new_runs: list[Run] | None
    bar: Tensor
    speaks: Tensor | None
    _angles: dict[tuple[str, Whose], Angles | None] = field(default_factory=dict)

    def angles(self, forward: ForwardContext, layer_type: str, dims: tuple[int, int], whose: Whose) -> Angles | None:
        """Angles for heads of (B, H, tokens, D); None for hosts without RoPE.

        Args:
            dims: head widths of the host and of the learners.
            whose: of the new tokens, of all, or of what is asked: the new tokens once for every learner.
        """
        if (layer_type, whose) not in self._angles:
            halves = forward.all_half_rope(layer_type) if whose == "all" else forward.new_half_rope(layer_type)
            angles = None
            if halves is not None:
                # every so many-th angle: see `narrow_angles`
                cos, sin = (half[:, None, :, :: dims[0] // dims[1]].to(self.tokens.dtype) for half in halves)
                times = self.bar.shape[2] // cos.shape[2] if whose == "asked" else 1
                angles = Angles(torch.cat([cos, cos], dim=-1).repeat(1, 1, times, 1), sin.repeat(1, 1, times, 1))
            self._angles[layer_type, whose] = angles
        return self._angles[layer_type, whose]

    @cached_property
    def heads(self) -> Tensor:
        """(B, H, N, D) the input tokens, each head's side by side: every layer reads all of them."""
        return self.tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).contiguous()

    @cached_property
    def scratch(self) -> tuple[Tensor, Tensor]:
        """Two (B, N, d) tensors for every layer to write its keys to: fresh memory of this size costs more in page
        faults than what is computed into it."""
        return torch.empty_like(self.tokens), torch.empty_like(self.tokens)


def plan_step(forward: ForwardContext, config: WingsConfig, head_dim: int) -> Step | None:
    """The shared part of a forward of few tokens.

    None where learners have to be asked one by one: samples differ in where their images stand, or these are many, and
    tokens have to be raised for that.
    """
    every, new = forward.all_tokens, forward.tokens
    known = every.shape[1] - new.shape[1]
    if config.cache == "keys":
        new_runs, runs = _runs(new.is_perceptual, config.learners), None
        if known == 0:
            runs = new_runs
    else:
        runs = _runs(every.is_perceptual, config.learners)
        new_runs = runs and [Run(max(r.start - known, 0), r.stop - known, r.place) for r in runs if r.stop > known]
    if new_runs is None:
        return None
    # padding stands at -1: as a query it is behind no token, as a key it is chosen by nobody
    behind = every.position[:, None, :] <= new.position[:, :, None]
    legal = []
    for learner in config.learners:
        heard = behind & chosen_tokens(every, learner, config)[:, None, :]
        if learner == "textual" and config.gate == "exact":
            heard = heard & every.has_seen[:, known:, None]
        legal.append(heard)
    allowed = torch.stack(legal, dim=1)
    speaks = allowed.any(dim=-1).transpose(1, 2)
    tokens = prepared(forward.all_inputs(), config)
    wide = torch.promote_types(tokens.dtype, torch.float32)  # in half precision the lowest number and a score overflow
    return Step(
        tokens=tokens,
        head_dim=head_dim,
        runs=runs,
        new_runs=new_runs,
        bar=tokens.new_zeros(allowed.shape, dtype=wide)
        .masked_fill_(~allowed, torch.finfo(wide).min)
        .flatten(1, 2)[:, None],
        speaks=None if bool(speaks.all()) else speaks,
    )


def _runs(perceptual: Tensor, learners: Sequence[str]) -> list[Run] | None:
    """Runs of perceptual and other tokens in (B, tokens), where they are few and the same in all samples."""
    if len(perceptual) > 1 and not bool((perceptual == perceptual[:1]).all()):
        return None
    lengths = run_lengths(perceptual[0])
    if len(lengths) > MOST_RUNS:
        return None
    places = [learners.index(name) if name in learners else -1 for name in ("textual", "visual")]
    seeing = bool(perceptual[0, 0])
    bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
    return [Run(start, stop, places[seeing ^ bool(i % 2)]) for i, (start, stop) in enumerate(bounds)]


def new_factors(learners: Sequence[LoRRA], tokens: Tensor, runs: Sequence[Run]) -> Tensor:
    """(B, tokens, 2 r) factors of (B, tokens, d), each by the learner it is a key of, or any."""
    if len(runs) == 1:
        return learners[runs[0].place].factors(tokens)
    return torch.cat([learners[run.place].factors(tokens[:, run.start : run.stop]) for run in runs], dim=1)


def expand_keys(
    learners: Sequence[LoRRA],
    tokens: Tensor,
    factors: Tensor,
    runs: Sequence[Run],
    angles: Angles | None,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(B, H, tokens, D) keys, ready to be asked: input tokens plus `k.up` of their factors, rotated.

    Args:
        tokens: (B, tokens, d); what is nobody's key is left as it is.
        factors: (B, tokens, r).
        scratch: two tensors like `tokens` that may be written to.
    """
    keys = tokens.clone() if scratch is None else scratch[0].copy_(tokens)
    for run in runs:
        if run.place >= 0:
            low = factors[:, run.start : run.stop].to(keys.dtype)  # under autocast they are half, the tokens are not
            second = learners[run.place].k.up.to(keys.dtype).T
            keys[:, run.start : run.stop].baddbmm_(low, second.expand(len(low), -1, -1))
    heads = learners[0].heads(keys)
    if angles is None:
        return heads
    return rotate(heads, angles, out=None if scratch is None else learners[0].heads(scratch[1]))


def hear(
    learners: Sequence[LoRRA],
    query: Tensor,
    keys: Tensor,
    value_factors: Tensor,
    step: Step,
    angles: Angles | None,
    share: Tensor | None,
) -> Tensor:
    """(B, Q, d) what the learners say together.

    Args:
        query: (B, Q, d).
        keys: (B, H, N, D) of all tokens, from `expand_keys`.
        value_factors: (B, N, r) of all tokens.
        angles: of what is asked.
        share: (B, Q, L) or (L,) weights of the learners; None = 1.
    """
    head_dim, queries = step.head_dim, query.shape[1]
    asked = torch.cat([query + learner.q(query) for learner in learners], dim=1) * head_dim**-0.5
    q = learners[0].heads(asked)  # (B, H, L * Q, D)
    if angles is not None:
        q = rotate(q, angles)
    scores = q @ keys.to(q.dtype).transpose(-1, -2) + step.bar
    weights = torch.softmax(scores, dim=-1).to(query.dtype)  # (B, H, L * Q, N)
    heard = weights @ step.heads  # (B, H, L * Q, D)
    value_factors = value_factors.to(weights.dtype)  # what was kept may come from under autocast
    through = (weights.flatten(1, 2) @ value_factors).unflatten(1, weights.shape[1:3])  # (B, H, L * Q, r)
    if step.speaks is not None:
        share = step.speaks if share is None else share * step.speaks
    said = None
    for place, learner in enumerate(learners):
        mine = slice(place * queries, (place + 1) * queries)
        raised = through[:, :, mine] @ learner.v.up.to(query.dtype).unflatten(0, (-1, head_dim)).transpose(-1, -2)
        out = learner.o.apply_down((heard[:, :, mine] + raised).transpose(1, 2).flatten(2))
        if share is not None:
            out = out * share[..., place : place + 1].to(out.dtype)
        voice = learner.o.apply_up(out)
        said = voice if said is None else said + voice
    assert said is not None
    return said
