"""Attention shift: where attention goes before, on and after the images, layer by layer (MLLM-LAWS; Wings, section
2.2).

Shapes: B samples, Q query tokens, K key tokens, H heads, C segments, L layers.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from alula.errors import HostError, SeamError, UsageError
from alula.probes import token_sets
from alula.probes.base import Probe
from alula.probes.registry import register
from alula.seam import Branch, BranchReader, ForwardContext, LayerView, Seam, Sums
from alula.stats import DEFAULT, Array, Curve, Estimate, Resampling, Result, means, weighted
from alula.tokens import Role, TokenMap

SEGMENTS = ("system", "before", "image", "between", "after")

Heads = Literal["mean", "each"]
System = Literal["before", "apart"]
Between = Literal["apart", "after"]
Average = Literal["samples", "curves"]
Learners = Literal["routed", "full"]
_OPTIONS = {"heads": Heads, "system": System, "between": Between, "average": Average, "learners": Learners}


@dataclass(frozen=True)
class AttentionShiftResult(Result):
    """Attention shift and the curves behind it.

    Attributes:
        samples: samples behind the curves: those with an image and at least one of the chosen query tokens.
        without_image: samples that hold no image; not measured.
        without_queries: samples with an image and none of the chosen query tokens; not measured.
        undefined: samples whose curve before or after the image does not vary over layers, e.g. because there is no
            text: they are in the curves and not in the shift.
        continued_forwards: forwards that continued a cache; not measured.
        curves: per branch and segment, the mean share of attention mass per layer that has attention; the segments of
            a branch add up to 1. Branches: "main" is the decoder's own attention; "total" has the learners' added
            (absent when none spoke).
        shift: per branch, 1 - Pearson correlation over layers of the "before" and "after" curves, in [0, 2].
        per_head: the same for each head of the main branch; empty unless heads="each".
        settings: the options it was measured with.
    """

    samples: int
    without_image: int
    without_queries: int
    undefined: int
    continued_forwards: int
    curves: dict[str, dict[str, Curve]]
    shift: dict[str, Estimate]
    per_head: tuple[Estimate, ...]
    settings: dict[str, Any]


@register
@dataclass(eq=False, kw_only=True)
class AttentionShift(Probe):
    """Per layer, the share of attention mass on tokens before, of, between and after the images; and attention shift.

    Segments of a sample: "image" = all its perceptual tokens, "before" = text before the first of them, "after" = text
    after the last, "between" = text between images, "system" = the system turn where it is set apart. Samples
    without an image have no shift and are only counted.

    Attention rows are never materialised: indicators of the segments go through the attention kernel as values, in a
    pass of their own. Eager attention hands out its tokens anyway, and is read there. Hosts that run another attention
    than "sdpa", "eager" or "flex_attention" are refused (HostError). Shares carry the rounding of the host's dtype.

    The paper leaves several choices open; each is an option whose default is the nearest to its Eq. 1:

    Attributes:
        queries: tokens whose attention counts, a name of `token_sets.TokenSet`. "all" is Eq. 1; tokens before the image
            cannot see what follows them, which lowers "after" in all layers alike; "after" asks only tokens that see
            every segment.
        heads: "mean" over heads, then correlate; "each": correlate per head, then average over heads. (A sum over
            heads gives the same shift as the mean.)
        system: "before": the system turn is part of "before", the text on that side of the image; "apart": it has a
            segment of its own (the TokenMap must know roles).
        between: "apart": text between images has a segment of its own; "after": it counts as "after".
        average: "samples": correlate per sample, then average the shifts (the paper's expectation over x); "curves":
            average the curves, then correlate.
        learners: how a graft's learners enter "total". The mass on a segment is the main branch's plus, for each
            learner, its own attention (mean over its heads) times: "routed", the weight the graft gives it at that
            token; "full", 1. The sum is divided by the mass of all segments, so that shares add up to 1 again.
        portion: further factor on the learners' attention, for the "portions of" it that Appendix C adds.
    """

    name: ClassVar[str] = "attention_shift"

    queries: str = "all"
    heads: Heads = "mean"
    system: System = "before"
    between: Between = "apart"
    average: Average = "samples"
    learners: Learners = "routed"
    portion: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        token_sets.check(self.queries, "queries")
        for option, legal in _OPTIONS.items():
            if getattr(self, option) not in get_args(legal):
                raise UsageError(
                    f"{option} cannot be {getattr(self, option)!r}", remedy=f"use one of: {', '.join(get_args(legal))}"
                )
        if not 0 <= self.portion < math.inf:
            raise UsageError(f"portion must be a number of at least 0, not {self.portion}")

    def token_sets(self) -> tuple[str, ...]:
        return (self.queries, *(("system",) if self.system == "apart" else ()))

    # -- listening ------------------------------------------------------------------------------------------------

    def watch(self, seam: Seam, stack: ExitStack) -> None:
        listener = _Listener(self)
        for layer in seam.anatomy.attended:
            stack.callback(seam.request_sums(layer, listener, mark=self).remove)
            stack.callback(seam.subscribe(layer, listener, mark=self).remove)

    def segments(self, tokens: TokenMap) -> Tensor:
        """(B, K, C) float indicators of the segments; every valid token is in exactly one."""
        sets = {name: token_sets.select(tokens, name) for name in ("before", "between", "after")}
        sets["image"] = tokens.is_perceptual
        sets["system"] = torch.zeros_like(tokens.valid)
        if self.system == "apart":
            sets["system"] = token_sets.of_role(tokens, Role.SYSTEM)
            sets |= {name: sets[name] & ~sets["system"] for name in ("before", "between", "after")}
        if self.between == "after":
            sets["after"], sets["between"] = sets["after"] | sets["between"], torch.zeros_like(sets["between"])
        return torch.stack([sets[name] for name in SEGMENTS], dim=-1).float()

    def update(self, forward: ForwardContext, notes: dict[Any, Any]) -> None:
        has_image = forward.all_tokens.is_perceptual.any(dim=1)
        asked = token_sets.select(forward.tokens, self.queries).any(dim=1)
        self.tally.add("without_image", (~has_image).sum())
        self.tally.add("without_queries", (has_image & ~asked).sum())
        if not forward.any_media:
            return
        layers = forward.anatomy.attended
        unheard = [layer for layer in layers if ("main", layer) not in notes]
        if unheard:
            raise HostError(
                f"no attention was seen in layer {unheard[0]}",
                remedy="leave the model's attention implementation alone while the probe is on",
            )
        main = torch.stack([notes["main", layer].to(asked.device) for layer in layers], dim=1).double()  # (B, L, H, C)
        if self.heads == "mean":
            main = main.mean(dim=2, keepdim=True)
        total, heard = main, [layer for layer in layers if ("learned", layer) in notes]
        if heard:
            silent = main.new_zeros(len(main), main.shape[-1])
            learned = [notes.get(("learned", layer), silent).to(main) for layer in layers]
            total = main + self.portion * torch.stack(learned, dim=1)[:, :, None]
            self.tally.add("heard_learners", len(heard))
        self._add({"main": main, "total": total / total.sum(dim=-1, keepdim=True)}, has_image & asked)

    def _add(self, curves: dict[str, Tensor], measured: Tensor) -> None:
        """Add the curves (B, L, H, C) of those samples that are `measured`, (B,) bool."""
        self.tally.add("samples", measured.sum())
        self.reservoir("curves").offer({branch: curve.float() for branch, curve in curves.items()}, measured)
        stacked = torch.stack([*curves.values()]).masked_fill(~measured[:, None, None, None], 0)
        of_heads = shifts(stacked)  # (branches, B, H); none is defined of a curve of zeros
        sums = {"curve": stacked.sum(dim=1)}
        for unit, values in (("sample", over_heads(of_heads)), ("head", of_heads)):
            sums[f"{unit}_shift"] = values.nansum(dim=1)
            sums[f"{unit}_defined"] = values.isnan().logical_not().sum(dim=1).double()
        for name, values in sums.items():
            for branch, value in zip(curves, values, strict=True):
                self.tally.add(f"{name}/{branch}", value)

    # -- answering ------------------------------------------------------------------------------------------------

    def result(self, how: Resampling = DEFAULT) -> AttentionShiftResult:
        samples = self.tally.count("samples")
        if not samples:
            raise UsageError(
                "no sample with an image was measured",
                remedy="run the model on prompts with images inside `with probe.on(model):`",
            )
        entries = self.reservoir("curves").entries
        weights = how.weights(len(self.reservoir("curves")), samples)
        curves, shift = {}, {}
        per_head: tuple[Estimate, ...] = ()
        for branch in ("main", "total") if self.tally.count("heard_learners") else ("main",):
            kept = entries[branch].double().numpy()
            curves[branch] = self._curves(branch, kept, weights, how)
            shift[branch] = self._shift(branch, kept, weights, how)
            if branch == "main" and self.heads == "each":
                per_head = self._per_head(kept, weights, how)
        return AttentionShiftResult(
            samples=samples,
            without_image=self.tally.count("without_image"),
            without_queries=self.tally.count("without_queries"),
            undefined=samples - self.tally.count("sample_defined/main"),
            continued_forwards=self.continued_forwards,
            curves=curves,
            shift=shift,
            per_head=per_head,
            settings=self.settings,
        )

    def _mean_curve(self, branch: str) -> Array:
        """(L, H, C) over all samples."""
        return self.tally.sums[f"curve/{branch}"].numpy() / self.tally.count("samples")

    def _curves(self, branch: str, kept: Array, weights: Array, how: Resampling) -> dict[str, Curve]:
        mean, replicates = self._mean_curve(branch).mean(axis=1), means(weights, kept.mean(axis=2))
        empty = {"system": self.system == "before", "between": self.between == "after"}
        return {
            segment: how.curve(replicates[:, :, i], mean[:, i])
            for i, segment in enumerate(SEGMENTS)
            if not empty.get(segment)
        }

    def _shift(self, branch: str, kept: Array, weights: Array, how: Resampling) -> Estimate:
        if self.average == "curves":
            value = over_heads(_shifts(self._mean_curve(branch)))
            return how.estimate(over_heads(_shifts(means(weights, kept))).numpy(), float(value))
        of_samples = over_heads(_shifts(kept)).numpy()
        return how.estimate(weighted(weights, of_samples), float(self._mean_shift("sample", branch)))

    def _per_head(self, kept: Array, weights: Array, how: Resampling) -> tuple[Estimate, ...]:
        if self.average == "curves":
            return how.curve(_shifts(means(weights, kept)).numpy(), _shifts(self._mean_curve("main")).numpy())
        replicates = np.stack([weighted(weights, head) for head in _shifts(kept).numpy().T], axis=1)
        return how.curve(replicates, self._mean_shift("head", "main"))

    def _mean_shift(self, unit: str, branch: str) -> Array:
        with np.errstate(invalid="ignore"):
            sums, counts = (self.tally.sums[f"{unit}_{what}/{branch}"].numpy() for what in ("shift", "defined"))
            return np.divide(sums, counts)


class _Listener(Sums, BranchReader):
    """Receives sums of attention over the segments and writes them down for the probe."""

    separate_pass = True

    def __init__(self, probe: AttentionShift) -> None:
        self.probe = probe

    def key_values(self, view: LayerView) -> Tensor | None:
        forward: ForwardContext = view.ctx
        notes = self.probe.notes(forward)
        if notes is None or ("main", view.layer) in notes or not forward.any_media:
            return None
        if "segments" not in notes:
            chosen = token_sets.select(forward.tokens, self.probe.queries).float()
            notes["queries"] = chosen / chosen.sum(dim=1, keepdim=True).clamp(min=1)
            notes["segments"] = self.probe.segments(forward.all_tokens)
        return notes["segments"]

    def on_sums(self, view: LayerView, sums: Tensor) -> None:
        """Take (B, Q, H, C) sums of the main branch."""
        notes = self.probe.notes(view.ctx)
        assert notes is not None
        notes["main", view.layer] = _over_queries(self._queries(view, notes), sums, notes)

    def _queries(self, view: LayerView, notes: dict[Any, Any]) -> Tensor:
        """(B, M) shares of the chosen queries among the tokens that stand in this layer."""
        queries: Tensor = notes["queries"]
        if view.index is None:
            return queries
        left = view.pick_real(queries)
        if bool(((queries.sum(dim=1) > 0) & (left.sum(dim=1) == 0)).any()):
            raise SeamError(
                f"none of the tokens whose attention is measured ({self.probe.queries!r}) is left in layer "
                f"{view.layer}",
                remedy='measure queries that are, e.g. AttentionShift(queries="after")',
            )
        return left / left.sum(dim=1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)

    def on_branch(self, view: LayerView, branch: Branch) -> None:
        """Add one learner's attention to what is known of this layer."""
        notes = self.probe.notes(view.ctx)
        if notes is None or "segments" not in notes:
            return
        sums = branch.sums(notes["segments"])
        if self.probe.learners == "routed":
            sums = sums * branch.weight[..., None]
        share = _over_queries(view.spread(self._queries(view, notes)), sums, notes).mean(dim=1)
        notes["learned", view.layer] = notes.get(("learned", view.layer), 0) + share


def _over_queries(share: Tensor, sums: Tensor, notes: dict[Any, Any]) -> Tensor:
    """(B, H, C) mean of (B, Q, H, C) over the chosen queries, in float32 or float64."""
    known = notes.get("unasked")
    if known is None or known[0] is not share or known[1].device != sums.device:
        share_there = share.to(sums.device)
        # the zero has one dimension, with which it makes products with half precision float32
        known = share, share_there, (share_there == 0)[..., None, None], share_there.new_zeros(1)
        notes["unasked"] = known
    _, weights, unasked, zero = known
    # what a kernel leaves at a padding query that may attend to nothing can be NaN, which a share of 0 would not undo
    sums = torch.where(unasked, zero, sums.detach())
    return (weights[:, None].to(sums.dtype) @ sums.flatten(2)).view(len(sums), *sums.shape[2:])


def shifts(curves: Tensor) -> Tensor:
    """1 - Pearson correlation over layers of the "before" and "after" curves: (..., L, H, C) -> (..., H).

    NaN where a curve does not vary over layers beyond rounding.
    """
    pair = torch.stack([curves[..., SEGMENTS.index(name)] for name in ("before", "after")], dim=-1)
    centred = pair - pair.mean(dim=-3, keepdim=True)
    spread = centred.square().mean(dim=-3).sqrt()  # (..., H, 2)
    varies = spread > 1e-6 * pair.abs().mean(dim=-3)
    covariance = (centred[..., 0] * centred[..., 1]).mean(dim=-2)
    return (1 - covariance / spread.prod(dim=-1)).masked_fill(~varies.all(dim=-1), math.nan)


def _shifts(curves: Array) -> Tensor:
    return shifts(torch.from_numpy(curves))


def over_heads(values: Tensor) -> Tensor:
    """(..., H) -> (...): the mean of the defined ones, NaN where none is."""
    return values.nanmean(dim=-1)
