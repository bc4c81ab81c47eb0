"""Do tokens of different kinds use the same weights? Overlap of Wanda masks per stream of tokens (IMA, sections 2.8 and
3.4).

Shapes: B samples of a batch, S tokens, G streams, in and out the widths of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.errors import HostError, UsageError
from alula.probes import token_sets
from alula.probes.base import Probe
from alula.probes.registry import register
from alula.seam import ForwardContext, InputOf, LayerView, Phase, Seam
from alula.stats import DEFAULT, Resampling, Result
from alula.tokens import TokenMap
from alula.weights import WeightMask, channel_squares, keep_highest, linears, other_matrices, wanda_scores

_HALVES = 2
_WITHDRAWN = "measure without the hook that takes tokens out of that layer"


@dataclass(frozen=True)
class MatrixOverlap(Result):
    """Overlap of two streams' masks on one matrix.

    Attributes:
        iou: weights kept for both streams over weights kept for either.
        chance: iou of two independent random masks with as many weights in every token.
        shared_magnitude: iou when only |W| is shared: the activation norms of one stream are permuted over its
            channels (mean over permutations). What `iou` has above this is shared *use*.
        ceiling: iou of a stream with itself on other samples (the lower of the two streams'): what `iou` cannot be
            expected to exceed. NaN with fewer than two samples.
        beyond_magnitude: iou after the weights that magnitude pruning keeps as well are taken out of both masks.
    """

    iou: float
    chance: float
    shared_magnitude: float
    ceiling: float
    beyond_magnitude: float


_UNDEFINED = MatrixOverlap(*(float("nan"),) * 5)


@dataclass(frozen=True)
class PairOverlap(Result):
    """Overlap of two streams: per matrix by name, and the unweighted mean over the matrices of each layer."""

    matrices: dict[str, MatrixOverlap]
    layers: tuple[MatrixOverlap, ...]


@dataclass(frozen=True)
class OverlapResult(Result):
    """Overlap by pair of streams.

    Attributes:
        sparsity: share of each token's weights that the masks prune.
        tokens: tokens measured per stream.
        pairs: by "image-text", ...
    """

    sparsity: float
    samples: int
    tokens: dict[str, int]
    pairs: dict[str, PairOverlap]
    continued_forwards: int
    settings: dict[str, Any]


@register
@dataclass(eq=False, kw_only=True)
class Overlap(Probe):
    """Scores every weight of the decoder's blocks by |W| * norm of its input channel, over the tokens of each stream.

    One forward serves all streams: tokens of either kind are measured in the context they have. (Streams of separate
    prompts, as the published code uses: one probe per set of prompts, and `mask`.) Padding is never a live token. Where
    hooks take tokens out of a layer, those left count there; where none of a stream is, its overlaps are NaN.
    Scores come from the unpruned model, not from blocks pruned one after another. Sums take streams * 2 * in * 8 bytes
    per matrix; `result` works through the matrices one at a time.

    Attributes:
        streams: token sets to compare.
        skip_first: leave out each sample's first token, whose massive activations would rule the norms.
        sparsity: share of each token's weights that is pruned.
        permutations: of the shared-magnitude null.
    """

    name: ClassVar[str] = "overlap"

    streams: tuple[str, ...] = ("image", "text", "all")
    skip_first: bool = True
    sparsity: float = 0.5
    permutations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for stream in self.streams:
            token_sets.check(stream, "streams")
        if not 0 < self.sparsity < 1:
            raise UsageError(f"sparsity must lie between 0 and 1, not {self.sparsity}")
        if self.permutations < 1:
            raise UsageError("permutations must be at least 1")
        self._anatomy: Anatomy | None = None

    def token_sets(self) -> tuple[str, ...]:
        return self.streams

    # -- listening ------------------------------------------------------------------------------------------------

    def watch(self, seam: Seam, stack: ExitStack) -> None:
        self._anatomy = seam.anatomy
        for index in range(seam.anatomy.num_layers):
            layer = seam.anatomy.layers[index]
            refuse_other_matrices(layer, index)
            paths = {module: path for path, module in layer.named_modules()}
            for name, matrix in linears(layer):
                point, read = InputOf(paths[matrix]), partial(self._read, f"layers.{index}.{name}")
                stack.callback(seam.on(point, index, read, phase=Phase.READ, owner=self.name, mark=self).remove)

    @torch.no_grad()
    def _read(self, name: str, view: LayerView, inputs: Tensor) -> None:
        """Note the (B, M, in) inputs of one matrix."""
        notes = self.notes(view.ctx)
        if notes is None:
            return
        if "read" not in notes:
            notes["chosen"], notes["read"] = self.chosen(view.ctx.tokens), []
            notes["zero"] = notes["chosen"].new_zeros(1)
        # query, key and value matrices read one tensor, and so do gate and up
        last = notes.get("last")
        if last is not None and last[0] is inputs:
            last[1].append(name)
            return
        x = inputs.detach().flatten(0, 1)
        names, here = [name], self._weights_of(view, notes, x)
        notes["last"] = inputs, names
        notes["read"].append((names, channel_squares(x, here, notes["zero"].to(x.device, here.dtype))))

    @staticmethod
    def _weights_of(view: LayerView, notes: dict[Any, Any], x: Tensor) -> Tensor:
        """(2 G, B * M) which tokens of a layer count for what, in the dtype in which (B * M, in) inputs are squared."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if view.index is not None:
            here: Tensor = view.pick_real(notes["chosen"].permute(1, 2, 0)).permute(2, 0, 1).flatten(1)
            return here.to(x.device, dtype)
        if "here" not in notes or notes["here"].dtype != dtype or notes["here"].device != x.device:
            notes["here"] = notes["chosen"].flatten(1).to(x.device, dtype)
        return notes["here"]

    def chosen(self, tokens: TokenMap) -> Tensor:
        """(2 G, B, S) float: which tokens count for which stream, apart for the two halves of the samples."""
        streams = torch.stack([token_sets.select(tokens, stream) for stream in self.streams])  # (G, B, S)
        if self.skip_first:
            streams = streams & (tokens.position != 0)
        parity = (self.tally.count("samples") + torch.arange(tokens.shape[0], device=tokens.device)) % _HALVES
        halves = torch.stack([streams & (parity == half)[:, None] for half in range(_HALVES)])
        return halves.flatten(0, 1).float()

    def update(self, forward: ForwardContext, notes: dict[Any, Any]) -> None:
        self.tally.add("samples", forward.tokens.shape[0])
        self.tally.add("rows", notes["chosen"].sum(dim=(1, 2)).view(_HALVES, -1))
        alike: dict[Any, list[tuple[list[str], Tensor]]] = {}
        for names, squares in notes["read"]:
            alike.setdefault((squares.shape[1], squares.dtype, squares.device), []).append((names, squares))
        for read in alike.values():
            stacked = torch.stack([squares for _, squares in read]).unflatten(1, (_HALVES, -1))
            self.tally.add_each([tuple(f"squares/{name}" for name in names) for names, _ in read], stacked)

    # -- answering ------------------------------------------------------------------------------------------------

    def mask(self, stream: str, *, model: nn.Module | None = None, sparsity: float | None = None) -> WeightMask:
        """The weights that matter most to one stream, as a set to combine with others.

        Args:
            stream: one of `streams`.
            model: the host; the one measured last when None.
            sparsity: share of each token that is pruned; the probe's own when None.

        Raises:
            UsageError: an unknown stream, one without tokens, or no model.
        """
        if stream not in self.streams:
            raise UsageError(f"{stream!r} was not measured", remedy=f"streams: {', '.join(self.streams)}")
        self._tokens(stream)
        index, share = self.streams.index(stream), self.sparsity if sparsity is None else sparsity
        weights = dict(self._weights(model))
        norms = {name: self.tally.sums[f"squares/{name}"].sum(dim=0)[index].sqrt() for name in weights}
        if empty := [name for name, channels in norms.items() if not bool(channels.any())]:
            raise UsageError(f"no token of {stream!r} was measured in {empty[0]}", remedy=_WITHDRAWN)
        return WeightMask.of({n: keep_highest(wanda_scores(w, norms[n]), share) for n, w in weights.items()})

    def result(self, how: Resampling = DEFAULT, *, model: nn.Module | None = None) -> OverlapResult:
        """Overlap of all pairs of streams.

        Args:
            how: its seed draws the permutations of the null.
            model: the host; the one measured last when None.
        """
        if not self.tally.count("samples"):
            raise UsageError("no sample was measured", remedy="run the model inside `with probe.on(model):`")
        tokens = {stream: self._tokens(stream, needed=False) for stream in self.streams}
        used = [stream for stream in self.streams if tokens[stream]]
        found: dict[str, dict[str, MatrixOverlap]] = {f"{a}-{b}": {} for a, b in combinations(used, 2)}
        rng = np.random.default_rng(how.seed)
        for name, weight in self._weights(model):
            for pair, overlap in self._matrix(name, weight, used, rng).items():
                found[pair][name] = overlap
        return OverlapResult(
            sparsity=self.sparsity,
            samples=self.tally.count("samples"),
            tokens=tokens,
            pairs={pair: PairOverlap(matrices, _by_layer(matrices)) for pair, matrices in found.items()},
            continued_forwards=self.continued_forwards,
            settings=self.settings,
        )

    def _tokens(self, stream: str, *, needed: bool = True) -> int:
        tokens = int(self.tally.sums["rows"].sum(dim=0)[self.streams.index(stream)]) if "rows" in self.tally.sums else 0
        if needed and not tokens:
            raise UsageError(f"no token of {stream!r} was measured", remedy="measure prompts that have such tokens")
        return tokens

    def _weights(self, model: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
        anatomy = self._anatomy if model is None else Anatomy.of(model)
        if anatomy is None:
            raise UsageError("this probe was read from a file and has no model", remedy="pass model=")
        for index in range(anatomy.num_layers):
            for name, matrix in linears(anatomy.layers[index]):
                if f"squares/layers.{index}.{name}" in self.tally.sums:
                    yield f"layers.{index}.{name}", matrix.weight.detach()

    def _matrix(self, name: str, weight: Tensor, used: list[str], rng: np.random.Generator) -> dict[str, MatrixOverlap]:
        squares = self.tally.sums[f"squares/{name}"].to(weight.device)  # (2, G, in)

        def keep(channels: Tensor) -> Tensor:
            return keep_highest(wanda_scores(weight, channels.sqrt()), self.sparsity)

        norms = {stream: squares.sum(dim=0)[self.streams.index(stream)] for stream in used}
        masks = {stream: keep(norms[stream]) for stream in used}
        ceilings = {stream: self._ceiling(squares[:, self.streams.index(stream)], keep) for stream in used}
        large = keep_highest(weight.abs(), self.sparsity)
        orders = [
            torch.from_numpy(rng.permutation(weight.shape[1])).to(weight.device) for _ in range(self.permutations)
        ]
        permuted = {stream: [keep(norms[stream][order]) for order in orders] for stream in used[1:]}
        kept, columns = int(masks[used[0]][0].sum()) if used else 0, weight.shape[1]
        return {
            f"{a}-{b}": MatrixOverlap(
                iou=_iou(masks[a], masks[b]),
                chance=kept / (2 * columns - kept),
                shared_magnitude=float(np.mean([_iou(masks[a], other) for other in permuted[b]])),
                ceiling=float(np.minimum(ceilings[a], ceilings[b])),
                beyond_magnitude=_iou(masks[a] & ~large, masks[b] & ~large),
            )
            if bool(norms[a].any() and norms[b].any())
            else _UNDEFINED  # no token of one of them is in this layer
            for a, b in combinations(used, 2)
        }

    @staticmethod
    def _ceiling(halves: Tensor, keep: Any) -> float:
        """Overlap of a stream's two halves (2, in); NaN where one is empty."""
        if not bool((halves.sum(dim=1) > 0).all()):
            return float("nan")
        return _iou(keep(halves[0]), keep(halves[1]))


def refuse_other_matrices(layer: nn.Module, index: int) -> None:
    """Raise a HostError where a layer has matrices that are no linear layers: what they weigh would not be counted."""
    for path, module in other_matrices(layer):
        raise HostError(
            f"{path} of layer {index} is a {type(module).__name__}, whose matrices are no linear layers",
            where="overlap",
            remedy="measure a decoder of linear layers; fused experts and Conv1D are not read",
        )


def _iou(a: Tensor, b: Tensor) -> float:
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else float("nan")


def _by_layer(matrices: dict[str, MatrixOverlap]) -> tuple[MatrixOverlap, ...]:
    layers: dict[str, list[MatrixOverlap]] = {}
    for name, overlap in matrices.items():
        layers.setdefault(name.split(".")[1], []).append(overlap)
    fields = ("iou", "chance", "shared_magnitude", "ceiling", "beyond_magnitude")
    return tuple(
        MatrixOverlap(*(float(np.mean([getattr(m, field) for m in found])) for field in fields))
        for found in layers.values()
    )
