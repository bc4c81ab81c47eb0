"""The geometry of tokens by kind: narrow cones, norms and sinks, and how fast tokens change from block to block (IMA,
2.2-2.6).

Shapes: B samples of a batch, S tokens, d width, N states of a site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from alula.errors import SeamError, UsageError
from alula.probes import token_sets
from alula.probes.projection import Method, to_plane
from alula.probes.registry import register
from alula.probes.states import GROUPS, StateProbe, groups, standing, unit
from alula.seam import ForwardContext, LayerView
from alula.stats import DEFAULT, Curve, Resampling, Result, means
from alula.tokens import TokenMap

Of = Literal["samples", "tokens"]
Change = Literal["same_token", "all_pairs"]
NORMS = ("median", "mean", "max", "of_mean")


@dataclass(frozen=True)
class KindGeometry(Result):
    """Tokens of one kind at one site; sequences have one entry per state.

    First tokens and sinks are left out of `norms`, `within` and `change`.

    Attributes:
        samples: samples with tokens of this kind.
        norms: "median", "mean" and "max" of the norms of a sample's tokens, and "of_mean", the norm of their mean;
            averaged over samples.
        highest: the largest norm of any token of the kind, sinks and first tokens included.
        sink_share: share of the kind's tokens (first tokens apart) that are sinks.
        sink_norm: mean norm of those sinks (NaN where there are none).
        within: mean cosine of two different members of the kind.
        change: per offset n, similarity of state l with state l + n (N - n entries).
    """

    samples: int
    norms: dict[str, Curve]
    highest: tuple[float, ...]
    sink_share: tuple[float, ...]
    sink_norm: tuple[float, ...]
    within: tuple[float, ...]
    change: dict[int, Curve]


@dataclass(frozen=True)
class SiteGeometry(Result):
    """One site: geometry by kind, and by pair of kinds ("image-text") the mean cosine of members of different samples.

    `first_norm` is the mean norm of the samples' first tokens, which usually are the attention sink.
    """

    kinds: dict[str, KindGeometry]
    between: dict[str, tuple[float, ...]]
    first_norm: tuple[float, ...]


@dataclass(frozen=True)
class Projection(Result):
    """Sample means of one state of the stream in the plane: point i is of kind `kinds[i]`, of kept sample
    `samples[i]`."""

    state: int
    kinds: tuple[str, ...]
    samples: tuple[int, ...]
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class GeometryResult(Result):
    """Geometry by site.

    Attributes:
        samples: samples measured.
        perceptual_first: share of samples whose first token is perceptual.
        projections: of the chosen states (empty with fewer than 3 points).
    """

    samples: int
    perceptual_first: float
    sites: dict[str, SiteGeometry]
    projections: tuple[Projection, ...]
    continued_forwards: int
    settings: dict[str, Any]


@register
@dataclass(eq=False, kw_only=True)
class Geometry(StateProbe):
    """Where tokens of each kind lie: similarity within and between kinds, norms, and change between blocks.

    Similarities are exact: a mean of cosines over all pairs is the inner product of mean unit vectors, from which
    pairs of a member with itself (and, between kinds, pairs from one sample) are taken out again. Intervals of norms
    and changes are bootstrap intervals over at most `keep` samples.

    Attributes:
        text: the token set taken for text.
        of: members of a kind are "samples" (the mean of their tokens, as published) or single "tokens".
        offsets: n of the changes. States are held for the largest of them during a forward.
        change: "same_token": mean cosine of a token with itself n blocks later; "all_pairs": the published form, the
            mean over all pairs of samples of the cosine of their k-th tokens, which shows a change where nothing
            changes as soon as tokens differ between samples. It is over the tokens every sample has, at most `slots`.
        slots: most tokens per sample and kind of the published form.
        sink_factor: a token is a sink when its norm exceeds this many times the median norm of its sample at that
            state.
        projected: states of the stream whose sample means are kept for the projection; five evenly spaced ones when
            None.
        projection: "pca" or "tsne".
    """

    name: ClassVar[str] = "geometry"
    earlier: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "of": {"rows": "tokens"},
        "change": {"same_row": "same_token"},
    }

    keep: int = 128
    text: str = "text"
    of: Of = "samples"
    offsets: tuple[int, ...] = (1,)
    change: Change = "same_token"
    slots: int = 64
    sink_factor: float = 10.0
    projected: tuple[int, ...] | None = None
    projection: Method = "pca"

    def __post_init__(self) -> None:
        super().__post_init__()
        token_sets.check(self.text, "text")
        if any(offset < 1 for offset in self.offsets) or self.slots < 1 or not self.sink_factor > 1:
            raise UsageError("offsets and slots must be at least 1, and sink_factor above 1")

    def token_sets(self) -> tuple[str, ...]:
        return (self.text,)

    # -- listening ------------------------------------------------------------------------------------------------

    def read(self, view: LayerView, notes: dict[Any, Any], site: str, state: int, hidden: Tensor) -> None:
        tokens: TokenMap = view.ctx.tokens
        if "groups" not in notes:
            notes["groups"] = groups(tokens, self.text, skip_first=True)
            notes["first"] = tokens.position == 0
        valid, first = tokens.valid.to(hidden.device), standing(notes["first"], view, "first token").to(hidden.device)
        if view.present is not None:
            valid = valid & view.present.to(hidden.device)
        length = hidden.norm(dim=-1)  # (B, S)
        sink = valid & ~first & (length > self.sink_factor * _median(length, valid)[:, None])
        directions = unit(hidden)
        if self.change == "same_token" and self.offsets:
            notes[site, state, "change"] = self._same_token(notes, site, state, directions)
            notes[site, state, "valid"] = valid
        notes[site, state, "first"] = (length * first).sum(dim=1)
        for kind, chosen in notes["groups"].items():
            every, of_kind = chosen.to(hidden.device), token_sets.select(tokens, kind).to(hidden.device)
            chosen = standing(every, view, f"{kind} tokens")
            plain = chosen & ~sink
            plain = torch.where(plain.any(dim=1, keepdim=True), plain, chosen)
            count = plain.sum(dim=1).clamp(min=1).to(hidden)
            centre = (plain.to(hidden)[:, None] @ hidden)[:, 0] / count[:, None]
            notes[site, state, kind] = {
                "norms": torch.stack(
                    [
                        _median(length, plain),
                        (length * plain).sum(dim=1) / count,
                        length.masked_fill(~plain, 0).amax(dim=1),
                        centre.norm(dim=-1),
                    ],
                    dim=1,
                ),
                "sums": unit(centre) if self.of == "samples" else (plain.to(hidden)[:, None] @ directions)[:, 0],
                "members": torch.ones_like(count) if self.of == "samples" else plain.sum(dim=1).to(hidden),
                "centre": centre,
                "highest": length.masked_fill(~(chosen | (first & of_kind)), 0).amax(),
                "sinks": torch.stack([(chosen & sink).sum(dim=1).to(hidden), (length * (chosen & sink)).sum(dim=1)], 1),
                "rows": chosen.sum(dim=1).to(hidden),
            }
            if self.change == "all_pairs":
                notes[site, state, kind]["slots"] = self._slots(every, chosen, directions)

    def _same_token(self, notes: dict[Any, Any], site: str, state: int, directions: Tensor) -> dict[int, Tensor]:
        """(B, S) cosine of every token with itself n states earlier, for each offset n that reaches back far enough."""
        held = notes.setdefault((site, "held"), {})
        held[state] = directions
        found = {n: (held[state - n].to(directions) * directions).sum(-1) for n in self.offsets if state - n in held}
        held.pop(state - max(self.offsets), None)
        return found

    def _slots(self, every: Tensor, chosen: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over samples of the unit vectors of their k-th tokens (K, d), and how many samples have a k-th token
        (K,), of those of `every` that are `chosen`."""
        place = torch.where(chosen, every.cumsum(dim=1) - 1, self.slots).clamp(max=self.slots).flatten()
        sums = directions.new_zeros(self.slots + 1, directions.shape[-1]).index_add_(0, place, directions.flatten(0, 1))
        return sums[:-1], torch.bincount(place, minlength=self.slots + 1)[:-1]

    def update(self, forward: ForwardContext, notes: dict[Any, Any]) -> None:
        tokens = forward.tokens
        valid = tokens.valid.any(dim=1)
        self.tally.add("samples", int(valid.sum()))
        self.tally.add("perceptual_first", int((tokens.is_perceptual & (tokens.position == 0)).sum()))
        states = {site: forward.anatomy.num_layers + (site == "stream") for site in self.sites}
        present = {kind: chosen.any(dim=1).cpu() for kind, chosen in notes["groups"].items()}
        for site, count in states.items():
            firsts = torch.stack([notes[site, state, "first"] for state in range(count)], dim=1).double().cpu()
            self.tally.add(f"first/{site}", firsts[valid.cpu()].sum(dim=0))
            sums = {kind: self._add_kind(notes, site, count, kind, present[kind]) for kind in present}
            for a, b in combinations(sorted(sums, key=GROUPS.index, reverse=True), 2):
                self._add_between(f"{a}-{b}/{site}", sums[a], sums[b])
        self._add_summaries(notes, states, present)
        if "stream" in states:
            self._add_centres(notes, states["stream"], present, valid.cpu())

    def _add_kind(self, notes: dict[Any, Any], site: str, count: int, kind: str, here: Tensor) -> tuple[Tensor, Tensor]:
        """Add one kind's sums; returns per sample its sum of unit vectors (B, N, d) and number of members (B, N)."""

        def gather(name: str) -> Tensor:
            stacked = torch.stack([notes[site, state, kind][name].cpu() for state in range(count)], dim=1)
            return stacked.double() * here.view(-1, *[1] * (stacked.dim() - 1))

        key = f"{kind}/{site}"
        sums, members = gather("sums"), gather("members")
        self.tally.add(f"sum/{key}", sums.sum(dim=0))
        self.tally.add(f"members/{key}", members.sum(dim=0))
        self.tally.add(f"sinks/{key}", gather("sinks").sum(dim=0))
        self.tally.add(f"rows/{key}", gather("rows").sum(dim=0))
        highest = [notes[site, state, kind]["highest"].double().cpu() for state in range(count)]
        self.tally.raise_peak(f"highest/{key}", torch.stack(highest))
        if self.change == "all_pairs":
            slots = [notes[site, state, kind]["slots"] for state in range(count)]
            self.tally.add(f"slots/{key}", torch.stack([s.double().cpu() for s, _ in slots]))
            if site == self.sites[0]:  # a slot is used where every sample has a token in all states
                self.tally.add(f"slot_counts/{kind}", torch.stack([count.cpu() for _, count in slots]).amin(dim=0))
        return sums, members

    def _add_between(self, key: str, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
        """Add what pairs of one sample contribute, to be taken out of all pairs."""
        self.tally.add(f"own/{key}", (a[0] * b[0]).sum(dim=(0, 2)))
        self.tally.add(f"own_pairs/{key}", (a[1] * b[1]).sum(dim=0))

    def _add_summaries(self, notes: dict[Any, Any], states: dict[str, int], present: dict[str, Tensor]) -> None:
        """Add norms and changes per sample: to the sums, and to the samples kept for intervals."""
        for kind, here in present.items():
            entries = {}
            for site, count in states.items():
                norms = torch.stack([notes[site, state, kind]["norms"] for state in range(count)], dim=1)
                entries[f"norms/{site}"] = norms.double().cpu()[here]
                if self.change == "same_token":
                    for n in self.offsets:
                        if n < count:
                            entries[f"change{n}/{site}"] = self._changes(notes, site, count, kind, n)[here]
            self.tally.add(f"samples/{kind}", int(here.sum()))
            for name, values in entries.items():
                self.tally.add(f"summary/{kind}/{name}", values.sum(dim=0))
            if bool(here.any()):
                self.reservoir(f"summary/{kind}").offer({name: values.float() for name, values in entries.items()})

    def _changes(self, notes: dict[Any, Any], site: str, count: int, kind: str, n: int) -> Tensor:
        """(B, N - n) mean over a sample's tokens of their cosine with themselves n states later."""
        chosen = notes["groups"][kind]
        cosines = torch.stack([notes[site, state, "change"][n] for state in range(n, count)], dim=1)  # (B, N - n, S)
        both = [notes[site, state, "valid"] & notes[site, state - n, "valid"] for state in range(n, count)]
        chosen = chosen.to(cosines)[:, None] * torch.stack([there.to(cosines) for there in both], dim=1)
        found = chosen.sum(dim=-1)
        if bool(((found == 0) & (notes["groups"][kind].to(found.device).any(dim=1, keepdim=True))).any()):
            raise SeamError(f"a sample has no {kind} token that stands in two states of {site} {n} blocks apart")
        return ((cosines * chosen).sum(dim=-1) / found.clamp(min=1)).double().cpu()

    def _add_centres(self, notes: dict[Any, Any], count: int, present: dict[str, Tensor], valid: Tensor) -> None:
        """Keep sample means (B, kinds, states, d) for the projection; NaN where a sample lacks the kind."""
        if not present:  # a prompt of one token, and first tokens are left out
            return
        chosen = self._projected(count)
        any_kind = next(kind for kind in present)
        blank = torch.full_like(torch.stack([notes["stream", 0, any_kind]["centre"]] * len(chosen), 1).cpu(), math.nan)
        centres = []
        for kind in GROUPS:
            if kind in present:
                here = torch.stack([notes["stream", state, kind]["centre"].cpu() for state in chosen], dim=1)
                centres.append(torch.where(present[kind][:, None, None], here, math.nan))
            else:
                centres.append(blank)
        self.reservoir("centres").offer({"centres": torch.stack(centres, dim=1)[valid].float()})

    def _projected(self, count: int) -> list[int]:
        if self.projected is None:
            return sorted({round(i * (count - 1) / 4) for i in range(5)})
        if any(not -count <= state < count for state in self.projected):
            raise UsageError(f"the stream has states 0 to {count - 1}, not {self.projected}")
        return [state % count for state in self.projected]

    # -- answering ------------------------------------------------------------------------------------------------

    def result(self, how: Resampling = DEFAULT) -> GeometryResult:
        samples = self.tally.count("samples")
        if not samples:
            raise UsageError("no sample was measured", remedy="run the model inside `with probe.on(model):`")
        return GeometryResult(
            samples=samples,
            perceptual_first=self.tally.count("perceptual_first") / samples,
            sites={site: self._site(site, samples, how) for site in self.sites},
            projections=self._projections(how.seed),
            continued_forwards=self.continued_forwards,
            settings=self.settings,
        )

    def _site(self, site: str, samples: int, how: Resampling) -> SiteGeometry:
        kinds = [kind for kind in GROUPS if self.tally.count(f"samples/{kind}")]
        return SiteGeometry(
            kinds={kind: self._kind(kind, site, how) for kind in kinds},
            between={f"{a}-{b}": tuple(self._between(a, b, site)) for a, b in combinations(reversed(kinds), 2)},
            first_norm=tuple((self.tally.sums[f"first/{site}"].numpy() / samples).tolist()),
        )

    def _kind(self, kind: str, site: str, how: Resampling) -> KindGeometry:
        key, samples = f"{kind}/{site}", self.tally.count(f"samples/{kind}")
        kept = self.reservoir(f"summary/{kind}")
        weights = how.weights(len(kept), samples)

        def curve(name: str, column: int | None = None) -> Curve:
            exact = self.tally.sums[f"summary/{kind}/{name}"].numpy() / samples
            replicates = means(weights, kept.entries[name].double().numpy())
            return how.curve(*((x if column is None else x[..., column]) for x in (replicates, exact)))

        sinks, tokens = self.tally.sums[f"sinks/{key}"].numpy(), self.tally.sums[f"rows/{key}"].numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            sink_norm = np.where(sinks[:, 0] > 0, sinks[:, 1] / sinks[:, 0], math.nan)
        changes: dict[int, Curve] = {}
        for n in self.offsets:
            if self.change == "all_pairs":
                changes[n] = self._all_pairs_change(kind, site, n, how)
            elif f"change{n}/{site}" in kept.entries:
                changes[n] = curve(f"change{n}/{site}")
        return KindGeometry(
            samples=samples,
            norms={name: curve(f"norms/{site}", i) for i, name in enumerate(NORMS)},
            highest=tuple(self.tally.peaks[f"highest/{key}"].tolist()),
            sink_share=tuple((sinks[:, 0] / tokens).tolist()),
            sink_norm=tuple(sink_norm.tolist()),
            within=tuple(self._within(key)),
            change=changes,
        )

    def _within(self, key: str) -> list[float]:
        total, count = self.tally.sums[f"sum/{key}"].numpy(), self.tally.sums[f"members/{key}"].numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            return (((total**2).sum(axis=-1) - count) / (count * (count - 1))).tolist()

    def _between(self, a: str, b: str, site: str) -> list[float]:
        sums = self.tally.sums
        every = (sums[f"sum/{a}/{site}"] * sums[f"sum/{b}/{site}"]).sum(dim=-1).numpy()
        pairs = (sums[f"members/{a}/{site}"] * sums[f"members/{b}/{site}"]).numpy()
        if f"own/{a}-{b}/{site}" in sums:
            every, pairs = (
                every - sums[f"own/{a}-{b}/{site}"].numpy(),
                pairs - sums[f"own_pairs/{a}-{b}/{site}"].numpy(),
            )
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(pairs > 0, every / pairs, math.nan).tolist()

    def _all_pairs_change(self, kind: str, site: str, n: int, how: Resampling) -> Curve:
        """The published form; no interval."""
        samples = self.tally.count(f"samples/{kind}")
        shared = self.tally.sums[f"slot_counts/{kind}"].numpy() == samples
        mean = self.tally.sums[f"slots/{kind}/{site}"].numpy()[:, shared] / samples  # (N, slots, d)
        values = (mean[:-n] * mean[n:]).sum(axis=-1)
        values = values.mean(axis=-1) if shared.any() else np.full(len(values), math.nan)
        return how.curve(np.stack([values]), values)

    def _projections(self, seed: int) -> tuple[Projection, ...]:
        kept = self.reservoir("centres").entries.get("centres")
        if kept is None:
            return ()
        found = []
        layers = self.tally.sums["first/stream"].shape[0]
        for i, state in enumerate(self._projected(layers)):
            centres = kept[:, :, i].double().numpy()  # (K, kinds, d)
            sample, kind = np.nonzero(np.isfinite(centres).all(axis=-1))
            if len(sample) >= 3:
                points = to_plane(centres[sample, kind], self.projection, seed=seed)
                found.append(
                    Projection(
                        state=state,
                        kinds=tuple(GROUPS[k] for k in kind),
                        samples=tuple(sample.tolist()),
                        points=tuple((float(x), float(y)) for x, y in points),
                    )
                )
        return tuple(found)


def _median(values: Tensor, chosen: Tensor) -> Tensor:
    """(B,) medians of the chosen entries of (B, S); 0 where none is chosen."""
    ordered = values.masked_fill(~chosen, math.inf).sort(dim=1).values
    count = chosen.sum(dim=1, keepdim=True)
    low, high = (ordered.gather(1, index.clamp(min=0))[:, 0] for index in ((count - 1) // 2, count // 2))
    return torch.where(count[:, 0] > 0, (low + high) / 2, 0.0)
