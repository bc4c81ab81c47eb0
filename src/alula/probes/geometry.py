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
from alula.probes.states import GROUPS, StateProbe, groups, refuse_lost, room, unit, wide
from alula.seam import ForwardContext, LayerView
from alula.stats import DEFAULT, Curve, Resampling, Result, means

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

    During a forward the states of a site are copied, and computed together once they take 256 MiB (on a CPU 1 MiB); of
    those before, as many are held as the largest offset reaches back.

    Attributes:
        text: the token set taken for text.
        of: members of a kind are "samples" (the mean of their tokens, as published) or single "tokens".
        offsets: n of the changes.
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
        if "groups" not in notes:
            tokens = view.ctx.tokens
            notes["groups"] = groups(view.ctx, self.text, skip_first=True)
            notes["first"] = tokens.position == 0
            of_kind = [token_sets.select(tokens, kind) for kind in notes["groups"]]
            notes["first of kind"] = torch.stack(of_kind, dim=1) & notes["first"][:, None]  # (B, G, S)
            notes["chosen"] = torch.stack([*notes["groups"].values()], dim=1)  # (B, G, S)
        block: _Block | None = notes.get((site, "block"))
        if block is None or not block.fits(hidden):
            self._finish_block(view.ctx, notes, site)
            block = notes[site, "block"] = _Block(hidden, state, self._count(view.ctx, site) - state)
        block.put(hidden, view)

    @staticmethod
    def _count(forward: ForwardContext, site: str) -> int:
        """N, how many states a site has."""
        return forward.anatomy.num_layers + (site == "stream")

    def _finish_block(self, forward: ForwardContext, notes: dict[Any, Any], site: str) -> None:
        """Compute what is wanted of the states that were held, and let go of them."""
        block: _Block | None = notes.pop((site, "block"), None)
        if block is not None:
            notes.setdefault((site, "parts"), []).append(self._measure(forward, notes, site, block))

    def _measure(self, forward: ForwardContext, notes: dict[Any, Any], site: str, block: _Block) -> dict[str, Tensor]:
        """What is wanted of n states, each (n, ...)."""
        x, present = block.states, block.present()  # (n, B, S, d), (n, B, S)
        valid, first = (tokens.to(x.device)[None] for tokens in (forward.tokens.valid, notes["first"]))
        chosen, of_first = (notes[name].to(x.device)[None] for name in ("chosen", "first of kind"))  # (1, B, G, S)
        if present is not None:
            named = {"first token": notes["first"], **{f"{kind} tokens": of for kind, of in notes["groups"].items()}}
            refuse_lost(named, present, block.layers)
            valid, first = valid & present, first & present
            chosen, of_first = chosen & present[:, :, None], of_first & present[:, :, None]
        length = x.norm(dim=-1)  # (n, B, S)
        ordered, order = length.sort(dim=-1)
        typical = _medians(ordered, order, valid[:, :, None])[..., 0]
        sink = valid & ~first & (length > self.sink_factor * typical[..., None])
        plain = chosen & ~sink[:, :, None]  # (n, B, G, S)
        plain = torch.where(plain.any(dim=-1, keepdim=True), plain, chosen)
        members, lengths = plain.sum(dim=-1), length[:, :, None] * plain
        count = members.clamp(min=1).to(x)
        centre = (plain.to(x) @ x) / count[..., None]  # (n, B, G, d)
        sinks = chosen & sink[:, :, None]
        found = {
            "first": (length * first).sum(dim=-1),
            "norms": torch.stack(
                [
                    _medians(ordered, order, plain),
                    lengths.sum(dim=-1) / count,
                    lengths.amax(dim=-1),
                    centre.norm(dim=-1),
                ],
                dim=-1,
            ),
            "centre": centre,
            "highest": (length[:, :, None] * (chosen | of_first)).amax(dim=(1, 3)),
            "sinks": torch.stack([sinks.sum(dim=-1).to(x), (length[:, :, None] * sinks).sum(dim=-1)], dim=-1),
            "rows": chosen.sum(dim=-1).expand(len(x), -1, -1),
        }
        if self.of == "samples":
            found |= {"sums": unit(centre), "members": members.clamp(max=1)}
        else:
            found |= {"sums": (plain / _safe(length)[:, :, None]) @ x, "members": members}
        if self.change == "same_token":
            self._change(notes, site, block, found, length, chosen)
        elif self.offsets:
            every = notes["chosen"].to(x.device)
            found["slots"], found["slot counts"] = self._slots(every, chosen, x / _safe(length)[..., None])
        return found

    def _change(
        self,
        notes: dict[Any, Any],
        site: str,
        block: _Block,
        found: dict[str, Tensor],
        length: Tensor,
        chosen: Tensor,
    ) -> None:
        """Find for each offset n the (m, B, G) means over each sample's tokens of their cosine with themselves n states
        earlier, of those of the states that have one so much earlier."""
        if not self.offsets:
            return
        x, safe = block.states, _safe(length)
        held: dict[int, tuple[Tensor, Tensor, Tensor]] = notes.setdefault((site, "held"), {})
        chosen = chosen.expand(len(x), -1, -1, -1)
        for n in self.offsets:
            cosines, both = [], []
            for i in range(min(n, len(x))):  # the first of them look back to blocks before
                if block.first + i - n in held:
                    other, its_length, its_chosen = (each.to(x.device) for each in held[block.first + i - n])
                    cosines.append(((other * x[i]).sum(dim=-1) / (its_length * safe[i]))[None])
                    both.append((its_chosen & chosen[i])[None])
            if len(x) > n:
                cosines.append((x[:-n] * x[n:]).sum(dim=-1) / (safe[:-n] * safe[n:]))
                both.append(chosen[:-n] & chosen[n:])
            if cosines:
                weights = torch.cat(both).to(x)  # (m, B, G, S)
                shares = weights.sum(dim=-1)
                if block.is_partial:
                    self._refuse_unpaired(notes, site, shares, n)
                found[f"change{n}"] = (torch.cat(cosines)[:, :, None] * weights).sum(dim=-1) / shares.clamp(min=1)
        reach = max(self.offsets)
        for state in [state for state in held if state < block.first + len(x) - reach]:
            del held[state]
        for i in range(max(0, len(x) - reach), len(x)):
            # copied, so that it does not keep a block that is done with
            kept = x[i] if len(x) == 1 else x[i].clone()
            held[block.first + i] = kept, safe[i], chosen[i]

    @staticmethod
    def _refuse_unpaired(notes: dict[Any, Any], site: str, shares: Tensor, n: int) -> None:
        """Raise a SeamError where a sample has tokens of a kind, and none that stands in both of two states."""
        unpaired = ((shares == 0) & notes["chosen"].any(dim=-1).to(shares.device)).any(dim=1).any(dim=0)  # (G,)
        for group in unpaired.nonzero()[:, 0].tolist():
            kind = list(notes["groups"])[group]
            raise SeamError(f"a sample has no {kind} token that stands in two states of {site} {n} blocks apart")

    def _slots(self, every: Tensor, chosen: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over samples of the unit vectors of their k-th tokens (n, G, K, d), and how many samples have a k-th
        token (n, G, K), of those of (B, G, S) `every` that are `chosen`, from (n, B, S, d)."""
        states, (_, kinds, _) = len(directions), every.shape
        place = torch.where(chosen, every.cumsum(dim=-1) - 1, self.slots).clamp(max=self.slots)  # (1 or n, B, G, S)
        place = place.expand(states, -1, -1, -1).movedim(2, 1)  # (n, G, B, S)
        rows = torch.arange(states * kinds, device=place.device).view(states, kinds, 1, 1) * (self.slots + 1)
        place = (place + rows).flatten()
        counts = directions.new_zeros(states * kinds * (self.slots + 1))
        sums = directions.new_zeros(len(counts), directions.shape[-1])
        sums.index_add_(0, place, directions[:, None].expand(-1, kinds, -1, -1, -1).flatten(0, 3))
        counts.index_add_(0, place, torch.ones_like(place, dtype=counts.dtype))
        return (
            sums.view(states, kinds, self.slots + 1, -1)[:, :, :-1],
            counts.view(states, kinds, self.slots + 1)[:, :, :-1],
        )

    def update(self, forward: ForwardContext, notes: dict[Any, Any]) -> None:
        tokens, kinds = forward.tokens, [*notes["groups"]]
        here = notes["chosen"].any(dim=-1)  # (B, G)
        self.tally.add("samples", tokens.valid.any(dim=1).sum())
        self.tally.add("perceptual_first", (tokens.is_perceptual & notes["first"]).sum())
        entries: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for site in self.sites:
            self._finish_block(forward, notes, site)
            found, count = _joined(notes[site, "parts"], here.device), self._count(forward, site)
            if len(found["first"]) != count:
                raise SeamError(
                    f"{site} was seen in {len(found['first'])} of {count} states",
                    remedy="measure without what leaves parts of layers out",
                )
            self.tally.add(f"first/{site}", found["first"].sum(dim=1, dtype=torch.float64))
            self._add_site(site, kinds, found)
            names = ("norms", *(f"change{n}" for n in self.offsets if f"change{n}" in found))
            for name in names:
                total = found[name].sum(dim=1, dtype=torch.float64)
                for g, kind in enumerate(kinds):
                    self.tally.add(f"summary/{kind}/{name}/{site}", total[:, g])
                    entries[kind][f"{name}/{site}"] = found[name][:, :, g].transpose(0, 1).float().contiguous()
            if site == "stream":
                self._add_centres(kinds, found["centre"], here)
        for g, (kind, samples) in enumerate(zip(kinds, here.sum(dim=0), strict=True)):
            self.tally.add(f"samples/{kind}", samples)
            self.reservoir(f"summary/{kind}").offer(entries[kind], here[:, g])

    def _add_site(self, site: str, kinds: list[str], found: dict[str, Tensor]) -> None:
        """Add the sums of all kinds at one site."""
        sums, members = found["sums"].double(), found["members"].double()  # (N, B, G, d), (N, B, G)
        totals = {
            "sum": sums.sum(dim=1),
            "members": members.sum(dim=1),
            "sinks": found["sinks"].sum(dim=1, dtype=torch.float64),
            "rows": found["rows"].sum(dim=1),
        }
        for g, kind in enumerate(kinds):
            for name, total in totals.items():
                self.tally.add(f"{name}/{kind}/{site}", total[:, g])
            self.tally.raise_peak(f"highest/{kind}/{site}", found["highest"][:, g])
            if "slots" in found:
                self.tally.add(f"slots/{kind}/{site}", found["slots"][:, g])
                if site == self.sites[0]:  # a slot is used where every sample has a token in all states
                    self.tally.add(f"slot_counts/{kind}", found["slot counts"][:, g].amin(dim=0))
        for b, a in combinations(range(len(kinds)), 2):
            # what pairs of one sample contribute, to be taken out of all pairs
            key = f"{kinds[a]}-{kinds[b]}/{site}"
            self.tally.add(f"own/{key}", (sums[:, :, a] * sums[:, :, b]).sum(dim=(1, 2)))
            self.tally.add(f"own_pairs/{key}", (members[:, :, a] * members[:, :, b]).sum(dim=1))

    def _add_centres(self, kinds: list[str], centre: Tensor, here: Tensor) -> None:
        """Keep sample means (B, kinds, states, d) for the projection; NaN where a sample lacks the kind.

        Args:
            centre: (N, B, G, d). here: (B, G) bool.
        """
        chosen = torch.stack([centre[state] for state in self._projected(len(centre))], dim=2).float()  # (B, G, n, d)
        chosen = chosen.masked_fill(~here[:, :, None, None], math.nan)
        blank = chosen.new_full((len(chosen), 1, *chosen.shape[2:]), math.nan)
        by_kind = dict(zip(kinds, chosen.split(1, dim=1), strict=True))
        centres = torch.cat([by_kind.get(kind, blank) for kind in GROUPS], dim=1)
        self.reservoir("centres").offer({"centres": centres}, here.any(dim=1))

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


class _Block:
    """States of one site in a row, held to be computed in one go: copies, since hosts may go on to write into theirs.

    Attributes:
        first: number of the first of them.
        layers: the decoder layers they were seen in.
    """

    def __init__(self, like: Tensor, first: int, left: int) -> None:
        """
        Args:
            like: (B, S, d) the first of them. left: how many there are from it on.
        """
        dtype = wide(like.dtype)
        size = max(1, min(left, room(like.device) // max(1, like.numel() * dtype.itemsize)))
        self._room = like.new_empty((size, *like.shape), dtype=dtype)
        self.first, self.layers = first, list[int]()
        self._present: list[Tensor | None] = []

    def fits(self, hidden: Tensor) -> bool:
        """Whether there is room for one more."""
        return len(self.layers) < len(self._room) and hidden.device == self._room.device

    def put(self, hidden: Tensor, view: LayerView) -> None:
        """Hold one more."""
        self._room[len(self.layers)].copy_(hidden)
        self.layers.append(view.layer)
        self._present.append(view.present)

    @property
    def states(self) -> Tensor:
        """(n, B, S, d) in float32 or float64."""
        return self._room[: len(self.layers)]

    @property
    def is_partial(self) -> bool:
        """Whether some of them lack tokens."""
        return any(present is not None for present in self._present)

    def present(self) -> Tensor | None:
        """(n, B, S) bool: the token stands in the state; None where all do."""
        if not self.is_partial:
            return None
        every = torch.ones(self._room.shape[1:3], dtype=torch.bool, device=self._room.device)
        return torch.stack([every if each is None else each.to(every.device) for each in self._present])


def _joined(parts: list[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """The states of all blocks in a row."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name].to(device) for part in parts if name in part]) for name in names}


def _safe(length: Tensor) -> Tensor:
    """Lengths to divide by: the product of two is not 0."""
    return length.clamp(min=math.sqrt(torch.finfo(length.dtype).tiny))


def _medians(ordered: Tensor, order: Tensor, chosen: Tensor) -> Tensor:
    """(n, B, G) medians of the chosen ones of n * B rows of S values; 0 where none is chosen.

    Args:
        ordered, order: (n, B, S) the values as `sort` orders them, and where each stood.
        chosen: (1 or n, B, G, S) bool.
    """
    chosen = chosen.expand(len(order), -1, -1, -1)
    order, ordered = (each[:, :, None].expand_as(chosen) for each in (order, ordered))
    rank = chosen.gather(-1, order).cumsum(dim=-1)  # how many of the chosen stand here or before
    count = rank[..., -1:]
    middle = torch.cat([(count + 1) // 2, count // 2 + 1], dim=-1)
    place = torch.searchsorted(rank, middle).clamp(max=rank.shape[-1] - 1)
    return ordered.gather(-1, place).mean(dim=-1).masked_fill(count[..., 0] == 0, 0)
