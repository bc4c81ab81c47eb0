"""Few queries of all learners of a layer at once: what a step of decoding computes.

Many queries are gathered per learner and go through fused attention (`lorra`). For few, launching operations costs
more than what they compute, and gathering costs more than attending. So all learners attend to one table of keys, in
the order of the rows, in which every row is raised by the learner it is a key of; what a query may not hear is masked.
Masks are (B, learners * Q, rows) with Q below a head's width: nothing grows with the square of the rows.

Shapes: B batch, Q new rows, N = P + Q all rows, d stream width, H heads, D their width, L learners, r rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.keys import prepared
from alula.grafts.wings.lorra import LoRRA
from alula.grafts.wings.order import MOST_RUNS, chosen_rows, run_lengths
from alula.grafts.wings.rope import Angles, rotate
from alula.rows import RowMap
from alula.seam import Forward


class Run(NamedTuple):
    """Rows `start` to `stop` are keys of the learner at `place`; -1: of none."""

    start: int
    stop: int
    place: int


@dataclass(frozen=True)
class Step:
    """What the layers of one forward of few rows share.

    Attributes:
        rows: (B, N, d) input rows.
        runs: of all rows, the same in all samples.
        new_runs: of the new rows, counted from the first of them.
        barred: (B, 1, L * Q, N) bool: the query may not hear the row.
        speaks: (B, Q, L): 1 where a query hears any row, 0 elsewhere; None where all do.
        scratch: two (B, N, d) tensors that every layer writes its keys to: fresh memory of this size costs more in page
            faults than what is computed into it.
    """

    rows: Tensor
    runs: list[Run]
    new_runs: list[Run]
    barred: Tensor
    speaks: Tensor | None
    scratch: tuple[Tensor, Tensor]
    _angles: dict[str, Angles | None] = field(default_factory=dict)

    def angles(self, forward: Forward, layer_type: str, host_dim: int, head_dim: int) -> Angles | None:
        """Cosines (B, N, 1, R) and sines (B, N, 1, R / 2) of all rows; None for hosts without RoPE."""
        if layer_type not in self._angles:
            self._angles[layer_type] = None
            halves = forward.all_half_rope(layer_type)
            if halves is not None:
                # every so many-th angle: see `narrow_angles`
                cos, sin = (half[..., None, :: host_dim // head_dim].to(self.rows.dtype) for half in halves)
                self._angles[layer_type] = Angles(torch.cat([cos, cos], dim=-1), sin.contiguous())
        return self._angles[layer_type]


def plan_step(forward: Forward, config: WingsConfig) -> Step | None:
    """The shared part of a forward of few rows; None where samples differ in layout, or change too often."""
    every, new = forward.all_rows, forward.rows
    runs = _runs(every, config.learners)
    if runs is None:
        return None
    known = every.shape[1] - new.shape[1]
    new_runs = [Run(max(r.start - known, 0), r.stop - known, r.place) for r in runs if r.stop > known]
    # padding stands at -1: as a query it is behind no row, as a key it is chosen by nobody
    behind = every.position[:, None, :] <= new.position[:, :, None]
    legal = []
    for learner in config.learners:
        heard = behind & chosen_rows(every, learner, config)[:, None, :]
        if learner == "textual" and config.gate == "exact":
            heard = heard & every.has_seen[:, known:, None]
        legal.append(heard)
    allowed = torch.stack(legal, dim=1)
    speaks = allowed.any(dim=-1).transpose(1, 2)
    rows = prepared(forward.all_inputs(), config)
    return Step(
        rows=rows,
        runs=runs,
        new_runs=new_runs,
        barred=~allowed.flatten(1, 2)[:, None],
        speaks=None if bool(speaks.all()) else speaks,
        scratch=(torch.empty_like(rows), torch.empty_like(rows)),
    )


def _runs(rows: RowMap, learners: Sequence[str]) -> list[Run] | None:
    """Runs of perceptual and other rows, where they are few and the same in all samples."""
    perceptual = rows.is_perceptual
    if len(perceptual) > 1 and not bool((perceptual == perceptual[:1]).all()):
        return None
    lengths = run_lengths(perceptual[0])
    if len(lengths) > MOST_RUNS:
        return None
    places = [learners.index(name) if name in learners else -1 for name in ("textual", "visual")]
    seeing = bool(perceptual[0, 0])
    bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
    return [Run(start, stop, places[seeing ^ bool(i % 2)]) for i, (start, stop) in enumerate(bounds)]


def new_factors(learners: Sequence[LoRRA], rows: Tensor, runs: Sequence[Run]) -> Tensor:
    """(B, Q, 2 r) factors of the new (B, Q, d) rows, each by the learner it is a key of, or any."""
    if len(runs) == 1:
        return learners[runs[0].place].factors(rows)
    return torch.cat([learners[run.place].factors(rows[:, run.start : run.stop]) for run in runs], dim=1)


def hear(
    learners: Sequence[LoRRA],
    query: Tensor,
    factors: Tensor,
    step: Step,
    angles: Angles | None,
    share: Tensor | None,
) -> Tensor:
    """(B, Q, d) what the learners say together.

    Args:
        query: (B, Q, d).
        factors: (B, N, 2 r) of all rows.
        angles: from `Step.angles`.
        share: (B, Q, L) or (L,) weights of the learners; None = 1.
    """
    head_dim, queries = learners[0].head_dim, query.shape[1]
    key_factors, value_factors = factors.chunk(2, dim=-1)
    asked = torch.stack([query + learner.q(query) for learner in learners], dim=1) * head_dim**-0.5
    q = asked.unflatten(-1, (-1, head_dim))  # (B, L, Q, H, D)
    k = _raised(learners, step, key_factors).unflatten(-1, (-1, head_dim))  # (B, N, H, D)
    if angles is not None:
        q = rotate(q, Angles(*(table[:, None, -queries:] for table in angles)))
        k = rotate(k, angles, out=step.scratch[1].view_as(k))
    scores = q.permute(0, 3, 1, 2, 4).flatten(2, 3) @ k.permute(0, 2, 3, 1)  # (B, H, L * Q, N)
    scores = scores.masked_fill(step.barred, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    heard = weights @ step.rows.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, H, L * Q, D)
    through = (weights.flatten(1, 2) @ value_factors).unflatten(1, weights.shape[1:3])  # (B, H, L * Q, r)
    if step.speaks is not None:
        share = step.speaks if share is None else share * step.speaks
    said = None
    for place, learner in enumerate(learners):
        mine = slice(place * queries, (place + 1) * queries)
        raised = through[:, :, mine] @ learner.v.b.to(query.dtype).unflatten(0, (-1, head_dim)).transpose(-1, -2)
        out = learner.o.lower((heard[:, :, mine] + raised).transpose(1, 2).flatten(2))
        if share is not None:
            out = out * share[..., place : place + 1].to(out.dtype)
        voice = learner.o.raise_(out)
        said = voice if said is None else said + voice
    assert said is not None
    return said


def _raised(learners: Sequence[LoRRA], step: Step, factors: Tensor) -> Tensor:
    """(B, N, d) keys: the input rows plus B_k of their factors; what is nobody's key is left as it is."""
    keys = step.scratch[0].copy_(step.rows)
    for run in step.runs:
        if run.place >= 0:
            low = factors[:, run.start : run.stop].to(keys.dtype)  # under autocast they are half, the rows are not
            second = learners[run.place].k.b.to(keys.dtype).T
            keys[:, run.start : run.stop].baddbmm_(low, second.expand(len(low), -1, -1))
    return keys
