"""Implicit alignment of perceptual tokens with text (IMA, section 2.7), with the contrasts and nulls it needs to mean
something.

Shapes: B samples of a batch, S tokens, d width, N states of a site, K kept samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from alula.errors import UsageError
from alula.probes import token_sets
from alula.probes.registry import register
from alula.probes.similarity import (
    cka,
    mismatched_mean,
    neighbours,
    pair_means,
    shared_neighbours,
    unit_rows,
)
from alula.probes.states import GROUPS, TEXT, StateProbe, groups, refuse_lost, unit, wide
from alula.seam import ForwardContext, LayerView
from alula.stats import DEFAULT, Array, Curve, Estimate, Resampling, Result

Reduction = Literal["mean", "each"]


@dataclass(frozen=True)
class Null(Result):
    """What a measure gives when perceptual tokens are paired with the text of random other samples.

    Attributes:
        mean: over permutations.
        high: their 95th percentile.
        p: one-sided permutation p value of the true pairing, (1 + number at least as high) / (1 + permutations).
    """

    mean: float
    high: float
    p: float


@dataclass(frozen=True)
class SiteAlignment(Result):
    """Alignment at one site; every sequence has one entry per state.

    Attributes:
        all_pairs: mean cosine over all pairs of samples, matched or not: the published IMA curve. It is the inner
            product of two mean directions and cannot see whether an image fits its own text.
        matched: mean cosine of a sample's perceptual tokens with its own text.
        mismatched: the same with the text of other samples.
        contrast: matched - mismatched.
        centred_matched, centred_mismatched, centred_contrast: the same after the mean of either side over samples is
            removed, so that a direction common to all tokens counts for nothing.
        input_prompt: all pairs of the perceptual tokens as they enter the decoder with text at this state (empty
            unless the stream is tapped).
        input_prompt_matched: matched pairs of the same.
        cka, cka_debiased: linear CKA, plain and without its bias for wide vectors.
        mutual_knn: share of nearest neighbours among perceptual tokens that are neighbours among texts too.
        nulls: permutation nulls of "matched", "centred_matched", "cka", "cka_debiased" and "mutual_knn".
    """

    all_pairs: Curve
    matched: Curve
    mismatched: Curve
    contrast: Curve
    centred_matched: Curve
    centred_mismatched: Curve
    centred_contrast: Curve
    input_prompt: Curve
    input_prompt_matched: Curve
    cka: tuple[float, ...]
    cka_debiased: tuple[float, ...]
    mutual_knn: Curve
    nulls: dict[str, tuple[Null, ...]]


@dataclass(frozen=True)
class PairAlignment(Result):
    """Alignment of one perceptual kind with text.

    Attributes:
        samples: samples that have both.
        kept: of these, samples behind what sums cannot give: centred values, CKA, neighbours, nulls and all intervals.
        neighbours: k of the mutual nearest neighbours.
        neighbours_chance: their chance level, k / (kept - 1).
        score: IMA score, same layer: the mean of `all_pairs` over the states of the stream, the output of the last
            block included (the published code leaves that one out).
        score_input_prompt: the same of `input_prompt`.
        contrast_score: the same of `centred_contrast`: what a sample's own text adds.
        sites: by name.
    """

    samples: int
    kept: int
    neighbours: int
    neighbours_chance: float
    score: Estimate | None
    score_input_prompt: Estimate | None
    contrast_score: Estimate | None
    sites: dict[str, SiteAlignment]


@dataclass(frozen=True)
class AlignmentResult(Result):
    """Alignment by pair of kinds ("image-text", ...); `settings` are the options it was measured with."""

    pairs: dict[str, PairAlignment]
    continued_forwards: int
    settings: dict[str, Any]


@register
@dataclass(eq=False, kw_only=True)
class Alignment(StateProbe):
    """How close a sample's perceptual tokens come to its text, state by state.

    Each sample gives one vector per kind and state. Means over all pairs and over matched pairs are exact sums (a
    mean of cosines over all pairs is the inner product of the mean unit vectors); the rest is computed from at most
    `keep` samples, whose vectors take keep * 2 * states * d * 4 bytes (7B decoder, 128 samples: 140 MB). Intervals
    are bootstrap intervals over those samples.

    Attributes:
        text: the token set taken for text; by default all text after the first perceptual token, as in the published
            code.
        tokens: "mean": the vector is the mean of a sample's tokens, scaled to length 1; "each": the mean of its tokens'
            unit vectors, so that products are mean cosines over all pairs of tokens.
        skip_first: leave out a sample's first token, the usual attention sink.
        neighbours: k of the mutual nearest neighbours (fewer where fewer than 2 k + 1 samples were kept).
    """

    name: ClassVar[str] = "alignment"

    keep: int = 128
    text: str = "seen"
    tokens: Reduction = "mean"
    skip_first: bool = True
    neighbours: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        token_sets.check(self.text, "text")
        if self.tokens not in get_args(Reduction):
            raise UsageError(
                f"tokens cannot be {self.tokens!r}", remedy=f"use one of: {', '.join(get_args(Reduction))}"
            )
        if self.neighbours < 1:
            raise UsageError(f"neighbours must be at least 1, not {self.neighbours}")

    def token_sets(self) -> tuple[str, ...]:
        return (self.text,)

    # -- listening ------------------------------------------------------------------------------------------------

    def read(self, view: LayerView, notes: dict[Any, Any], site: str, state: int, hidden: Tensor) -> None:
        if "chosen" not in notes:
            named = groups(view.ctx, self.text, skip_first=self.skip_first)
            notes["groups"], notes["chosen"] = [*named], torch.stack([*named.values()], dim=1)  # (B, G, S)
            notes["share"] = _shares(notes["chosen"])
        if len(notes["groups"]) < 2:
            return
        share: Tensor = notes["share"]
        if view.present is not None:
            named = {f"{name} tokens": notes["chosen"][:, g] for g, name in enumerate(notes["groups"])}
            refuse_lost(named, view.present[None], [view.layer])
            share = _shares(notes["chosen"] & view.present[:, None].to(share.device))
        hidden = hidden.to(wide(hidden.dtype))
        notes[site, state] = share.to(hidden) @ (unit(hidden) if self.tokens == "each" else hidden)  # (B, G, d)

    def update(self, forward: ForwardContext, notes: dict[Any, Any]) -> None:
        names, here = notes["groups"], notes["chosen"].any(dim=-1)  # (B, G)
        if len(names) < 2:
            return
        layers = forward.anatomy.num_layers
        counts = {site: layers + (site == "stream") for site in self.sites}
        states = {
            site: torch.stack([notes[site, state].to(here.device) for state in range(count)], dim=2).double()
            for site, count in counts.items()
        }
        for g, kind in enumerate(names[1:], start=1):
            pair = {site: (x[:, g], x[:, 0]) for site, x in states.items()}
            self._add(f"{kind}-{TEXT}", pair, here[:, g] & here[:, 0])

    def _add(self, pair: str, states: dict[str, tuple[Tensor, Tensor]], both: Tensor | None = None) -> None:
        """Add samples of one pair of kinds.

        Args:
            states: per site their vectors (n, N, d) of either kind, in float64.
            both: (n,) bool, those that have both; None: all.
        """
        first = next(iter(states.values()))[0]
        both = torch.ones(len(first), dtype=torch.bool, device=first.device) if both is None else both
        absent = ~both[:, None, None]
        entries: dict[str, Tensor] = {}
        scaled = {
            site: tuple((unit(x) if self.tokens == "mean" else x).masked_fill(absent, 0) for x in pair_of)
            for site, pair_of in states.items()
        }
        self.tally.add(f"samples/{pair}", both.sum())
        prompt = scaled["stream"][0][:, :1] if "stream" in scaled else None
        for site, (x, y) in scaled.items():
            self.tally.add(f"x/{pair}/{site}", x.sum(dim=0))
            self.tally.add(f"y/{pair}/{site}", y.sum(dim=0))
            self.tally.add(f"matched/{pair}/{site}", (x * y).sum(dim=(0, 2)))
            if prompt is not None:
                self.tally.add(f"prompt/{pair}/{site}", (prompt * y).sum(dim=(0, 2)))
            seen, text = states[site]
            entries |= {f"x/{site}": seen.float(), f"y/{site}": text.float()}
        self.reservoir(pair).offer(entries, both)

    # -- answering ------------------------------------------------------------------------------------------------

    def result(self, how: Resampling = DEFAULT) -> AlignmentResult:
        pairs = [f"{kind}-{TEXT}" for kind in GROUPS[1:] if self.tally.count(f"samples/{kind}-{TEXT}")]
        if not pairs:
            raise UsageError(
                f"no sample with both perceptual tokens and text ({self.text!r}) was measured",
                remedy="run the model on prompts whose images are followed by text, or choose text=",
            )
        return AlignmentResult(
            pairs={pair: self._pair(pair, how) for pair in pairs},
            continued_forwards=self.continued_forwards,
            settings=self.settings,
        )

    def _pair(self, pair: str, how: Resampling) -> PairAlignment:
        samples, kept = self.tally.count(f"samples/{pair}"), len(self.reservoir(pair))
        near = max(1, min(self.neighbours, (kept - 1) // 2))
        sites, scores = {}, {}
        for site in self.sites:
            measured = _Site(self, pair, site, samples, near, how)
            sites[site] = measured.alignment()
            if site == "stream":
                scores = measured.scores()
        return PairAlignment(
            samples=samples,
            kept=kept,
            neighbours=near,
            neighbours_chance=near / (kept - 1) if kept > 1 else math.nan,
            score=scores.get("all_pairs"),
            score_input_prompt=scores.get("input_prompt"),
            contrast_score=scores.get("centred_contrast"),
            sites=sites,
        )


def _shares(chosen: Tensor) -> Tensor:
    """(..., S) shares of the chosen tokens in their mean; 0 where none is chosen."""
    return chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)


class _Site:
    """The answer for one pair of kinds at one site."""

    def __init__(self, probe: Alignment, pair: str, site: str, samples: int, near: int, how: Resampling) -> None:
        self.how, self.samples, self.near = how, samples, near
        sums = {name: value.numpy() for name, value in probe.tally.sums.items()}
        x, y = sums[f"x/{pair}/{site}"] / samples, sums[f"y/{pair}/{site}"] / samples  # (N, d)
        self.exact = {"all_pairs": (x * y).sum(axis=-1), "matched": sums[f"matched/{pair}/{site}"] / samples}
        self.exact["mismatched"] = mismatched_mean(self.exact["all_pairs"], self.exact["matched"], samples)
        self.exact["contrast"] = self.exact["matched"] - self.exact["mismatched"]
        self.prompt: Array | None = None
        entries = {name: value.double().numpy() for name, value in probe.reservoir(pair).entries.items()}
        self.x, self.y = entries[f"x/{site}"], entries[f"y/{site}"]  # (K, N, d)
        self.scale = unit_rows if probe.tokens == "mean" else np.array
        if f"prompt/{pair}/{site}" in sums:
            first = sums[f"x/{pair}/stream"][0] / samples
            self.exact["input_prompt"] = y @ first
            self.exact["input_prompt_matched"] = sums[f"prompt/{pair}/{site}"] / samples
            self.prompt = self.scale(entries["x/stream"][:, 0])
        self.weights = how.weights(len(self.x), samples)
        self.orders = how.shuffles(len(self.x))
        self.replicates: dict[str, Array] = {}

    def alignment(self) -> SiteAlignment:
        columns: dict[str, list[Array]] = {}
        fixed: dict[str, list[float]] = {}
        nulls: dict[str, list[Null]] = {}
        for state in range(self.x.shape[1]):
            x, y = self.x[:, state], self.y[:, state]
            cosines = {"": self.scale(x) @ self.scale(y).T}
            cosines["centred_"] = unit_rows(x - x.mean(axis=0)) @ unit_rows(y - y.mean(axis=0)).T
            for prefix, cosine in cosines.items():
                every, matched, mismatched = pair_means(cosine, self.weights)
                found = {"all_pairs": every, "matched": matched, "mismatched": mismatched}
                found["contrast"] = matched - mismatched
                for name, values in found.items():
                    columns.setdefault(prefix + name, []).append(values)
                random = cosine[np.arange(len(x)), self.orders].mean(axis=1)
                nulls.setdefault(f"{prefix}matched", []).append(_null(matched[0], random))
            if self.prompt is not None:
                every, matched, _ = pair_means(self.prompt @ self.scale(y).T, self.weights)
                columns.setdefault("input_prompt", []).append(every)
                columns.setdefault("input_prompt_matched", []).append(matched)
            for name, debiased in (("cka", False), ("cka_debiased", True)):
                value, random = cka(x @ x.T, y @ y.T, debiased=debiased, orders=self.orders)
                fixed.setdefault(name, []).append(value)
                nulls.setdefault(name, []).append(_null(value, random))
            shared, random = self._neighbours(x, y)
            columns.setdefault("mutual_knn", []).append(shared)
            nulls.setdefault("mutual_knn", []).append(_null(shared[0], random))
        self.replicates = {name: np.stack(values, axis=1) for name, values in columns.items()}
        curves = {name: self._curve(name) for name in _CURVES}
        return SiteAlignment(
            **curves,
            cka=tuple(fixed["cka"]),
            cka_debiased=tuple(fixed["cka_debiased"]),
            nulls={name: tuple(values) for name, values in nulls.items()},
        )

    def scores(self) -> dict[str, Estimate]:
        """Means over states, with the intervals that belong to them."""
        return {
            name: self.how.estimate(values.mean(axis=1), self.exact[name].mean() if name in self.exact else None)
            for name, values in self.replicates.items()
        }

    def _curve(self, name: str) -> Curve:
        return self.how.curve(self.replicates[name], self.exact.get(name)) if name in self.replicates else ()

    def _neighbours(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Mutual nearest neighbours under each token of weights, and under each permutation."""
        if len(x) < 2:
            return np.full(len(self.weights), np.nan), np.full(len(self.orders), np.nan)
        of_x, of_y = (neighbours(unit_rows(z) @ unit_rows(z).T, self.near) for z in (x, y))
        random = [shared_neighbours(of_x, of_y[np.ix_(order, order)]).mean() for order in self.orders]
        return self.weights @ shared_neighbours(of_x, of_y), np.array(random)


_CURVES = (
    "all_pairs", "matched", "mismatched", "contrast", "centred_matched", "centred_mismatched", "centred_contrast",
    "input_prompt", "input_prompt_matched", "mutual_knn",
)  # fmt: skip


def _null(value: float, random: Array) -> Null:
    if not np.isfinite(value) or not np.isfinite(random).all():
        return Null(math.nan, math.nan, math.nan)
    # rounding must not decide between a permutation that equals the true pairing and the true pairing itself
    reached = int((random >= value - 1e-12).sum())
    return Null(float(random.mean()), float(np.quantile(random, 0.95)), (1 + reached) / (1 + len(random)))
