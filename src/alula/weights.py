"""Weights of a decoder: its matrices, their Wanda scores, and sets of weights, one bit each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alula.anatomy import Anatomy
from alula.errors import DataError, UsageError
from alula.files import atomic_file, regular
from alula.seam import NAME

Bits = NDArray[np.uint8]

_ROUTERS = ("gate", "router", "shared_expert_gate")

_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class WeightMask:
    """A set of weights of named matrices, packed eight to a byte row by row: 0.8 GB for a 7B decoder.

    Masks of the same matrices combine as sets: ``a & b``, ``a | b``, ``a ^ b``, ``a - b``, ``~a``.

    Attributes:
        bits: (rows, ceil(columns / 8)) uint8 per matrix; a set bit is a kept weight, bits behind the last column are
            0.
        shapes: (rows, columns) per matrix.
        made: JSON values that say what made it; "model" is the fingerprint of the model it is of, where one is said.
    """

    bits: Mapping[str, Bits]
    shapes: Mapping[str, tuple[int, int]]
    made: Mapping[str, Any] = field(default_factory=dict)

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, kept: Mapping[str, Tensor], made: Mapping[str, Any] | None = None) -> WeightMask:
        """Pack (rows, columns) bool tensors."""
        bits = {name: pack(mask) for name, mask in kept.items()}
        shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in kept.items()}
        return cls(bits=bits, shapes=shapes, made=made or {})

    @classmethod
    def random(cls, shapes: Mapping[str, tuple[int, int]], sparsity: float, *, seed: int = 0) -> WeightMask:
        """In every row of every matrix, all but int(columns * sparsity) weights, drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        draws = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
        made = {"method": "random", "sparsity": sparsity, "seed": seed}
        return cls.of({name: keep_highest(draw, sparsity) for name, draw in draws.items()}, made)

    @classmethod
    def kept_by(cls, masks: Sequence[WeightMask], least: int) -> WeightMask:
        """The weights that at least so many of some masks keep: all of them for the intersection, 1 for the union.

        Raises:
            UsageError: no mask, more than there are, or masks of different matrices.
        """
        if not 1 <= least <= len(masks):
            raise UsageError(f"of {len(masks)} masks, {least} cannot be asked to keep a weight")
        for mask in masks[1:]:
            masks[0]._check_same(mask)
        votes = (sum(mask.unpack(name).to(torch.int32) for mask in masks) for name in masks[0].bits)
        kept = dict(zip(masks[0].bits, (torch.as_tensor(vote) >= least for vote in votes), strict=True))
        return cls.of(kept, _made(f"kept by at least {least}", *masks))

    # -- reading --------------------------------------------------------------------------------------------------

    def unpack(self, name: str) -> Tensor:
        """(rows, columns) bool of one matrix."""
        return torch.from_numpy(np.unpackbits(self.bits[name], axis=1, count=self.shapes[name][1]).astype(bool))

    def count(self, name: str) -> int:
        """Weights kept of one matrix."""
        return int(_ONES[self.bits[name]].sum())

    @property
    def density(self) -> float:
        """Share of all weights that is kept."""
        total = sum(rows * columns for rows, columns in self.shapes.values())
        return sum(self.count(name) for name in self.bits) / total

    @property
    def sparsity(self) -> float:
        """Share of all weights that is not kept: the effective one, whatever was asked for."""
        return 1.0 - self.density

    def iou(self, other: WeightMask) -> dict[str, float]:
        """Per matrix, weights kept by both over weights kept by either; NaN where neither keeps any."""
        both, either = self & other, self | other
        return {n: both.count(n) / either.count(n) if either.count(n) else float("nan") for n in self.bits}

    def iou_by_chance(self, other: WeightMask) -> dict[str, float]:
        """Per matrix, what `iou` comes to where as many weights are drawn independently; NaN where neither keeps any.

        It is ``(1 - s) / (1 + s)`` for two masks of sparsity s. |W|, which scores share, raises what can be expected of
        unrelated data far above it (`alula.probes.Overlap` measures that).
        """
        self._check_same(other)
        found = {}
        for name, (rows, columns) in self.shapes.items():
            a, b = (mask.count(name) / (rows * columns) for mask in (self, other))
            found[name] = a * b / (a + b - a * b) if a or b else float("nan")
        return found

    # -- set algebra ----------------------------------------------------------------------------------------------

    def __and__(self, other: WeightMask) -> WeightMask:
        return self._combine(other, np.bitwise_and)

    def __or__(self, other: WeightMask) -> WeightMask:
        return self._combine(other, np.bitwise_or)

    def __xor__(self, other: WeightMask) -> WeightMask:
        return self._combine(other, np.bitwise_xor)

    def __sub__(self, other: WeightMask) -> WeightMask:
        return self & ~other

    def __invert__(self) -> WeightMask:
        full = {name: np.packbits(np.ones((1, columns), bool), axis=1) for name, (_, columns) in self.shapes.items()}
        bits = {name: ~bits & full[name] for name, bits in self.bits.items()}
        return WeightMask(bits, self.shapes, _made("not", self))

    def _combine(self, other: WeightMask, operation: Callable[[Bits, Bits], Bits]) -> WeightMask:
        self._check_same(other)
        bits = {n: operation(bits, other.bits[n]) for n, bits in self.bits.items()}
        return WeightMask(bits, self.shapes, _made(getattr(operation, "__name__", ""), self, other))

    def _check_same(self, other: WeightMask) -> None:
        if dict(self.shapes) != dict(other.shapes):
            raise UsageError("masks of different matrices cannot be combined", remedy="use masks of the same model")

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the mask to one safetensors file, atomically; `load` reads it back."""
        target = Path(file)
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        facts = {"shapes": json.dumps(shapes), "made": json.dumps(self.made)}
        with atomic_file(target) as partial:
            safetensors.numpy.save_file(dict(self.bits), partial, facts)
        return target

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> WeightMask:
        """Read a mask written by `save`.

        Raises:
            DataError: not such a file, or one whose bits are not those of the matrices it names.
        """
        try:
            with safetensors.safe_open(regular(file), framework="np") as opened:
                facts = opened.metadata() or {}
                shapes = {name: (rows, columns) for name, (rows, columns) in json.loads(facts["shapes"]).items()}
                made = json.loads(facts.get("made", "{}"))
                bits = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, KeyError, ValueError, AttributeError, TypeError, safetensors.SafetensorError) as error:
            raise DataError(f"not a mask file: {error}", where=str(file)) from error
        if bits.keys() != shapes.keys() or not isinstance(made, dict):
            raise DataError("not a mask file: it names other matrices than it holds", where=str(file))
        for name, (rows, columns) in shapes.items():
            packed = bits[name]
            if packed.dtype != np.uint8 or packed.shape != (rows, -(-columns // 8)):
                raise DataError(f"{name} is not the mask of a matrix of {rows} x {columns}", where=str(file))
            if columns % 8 and bool((packed[:, -1] & (0xFF >> columns % 8)).any()):
                raise DataError(f"{name} keeps weights behind its last column, {columns}", where=str(file))
        return cls(bits=bits, shapes=shapes, made=made)


def _made(operation: str, *masks: WeightMask) -> dict[str, Any]:
    """What made a mask that was computed from others."""
    models = {mask.made.get("model") for mask in masks}
    of = {"model": model} if len(models) == 1 and (model := models.pop()) is not None else {}
    return {**of, "operation": operation, "of": [dict(mask.made) for mask in masks]}


def pack(kept: Tensor) -> Bits:
    """(rows, ceil(columns / 8)) uint8 of (rows, columns) bool, as a `WeightMask` holds them."""
    return np.packbits(kept.cpu().numpy(), axis=1)


def keep_highest(scores: Tensor, sparsity: float) -> Tensor:
    """(rows, columns) bool: in each row all but the int(columns * sparsity) lowest scores; of equal ones the first go.

    Raises:
        UsageError: sparsity outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity must lie in [0, 1), not {sparsity}")
    return _without_lowest(scores, int(scores.shape[1] * sparsity))


def _without_lowest(scores: Tensor, pruned: int) -> Tensor:
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    highest_pruned = _order_statistic(scores, pruned)[:, None]
    kept = scores > highest_pruned
    # rows in which several weights share the highest pruned score: the last of them stay
    tied = (kept.sum(dim=1) < scores.shape[1] - pruned).nonzero()[:, 0]
    if len(tied):
        order = torch.sort(scores[tied], dim=1, stable=True).indices[:, pruned:]
        kept[tied] = torch.zeros_like(kept[tied]).scatter_(1, order, True)
    return kept


def keep_of_matrix(scores: Tensor, sparsity: float) -> Tensor:
    """(rows, columns) bool: all but the int(rows * columns * sparsity) lowest scores of the matrix as a whole."""
    return keep_highest(scores.reshape(1, -1), sparsity).view_as(scores)


def keep_pattern(scores: Tensor, pattern: tuple[int, int]) -> Tensor:
    """(rows, columns) bool: of every m columns one behind the other, the n highest scores; (n, m) is the pattern.

    Raises:
        UsageError: the columns cannot be divided so.
    """
    kept, group = pattern
    if scores.shape[1] % group:
        raise UsageError(f"{scores.shape[1]} columns cannot be divided into groups of {group}")
    return _without_lowest(scores.reshape(-1, group), group - kept).view_as(scores)


def keep_count(scores: Tensor, kept: int) -> Tensor:
    """(rows, columns) bool of exactly `kept` weights: each row loses its lowest scores, as many as every other, and the
    rows whose next one is lowest lose one more."""
    rows, columns = scores.shape
    each, more = divmod(rows * columns - kept, rows)
    found = _without_lowest(scores, each)
    if more:
        rest = scores.masked_fill(~found, float("inf"))
        following = rest.argmin(dim=1)  # of equal ones the first
        chosen = torch.sort(rest.gather(1, following[:, None])[:, 0], stable=True).indices[:more]
        found[chosen, following[chosen]] = False
    return found


def _order_statistic(values: Tensor, k: int) -> Tensor:
    """(rows,) the k-th smallest value of each row. NumPy's partition is forty times faster than sorting on a CPU."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=1)[:, k - 1].copy())
    return torch.kthvalue(values, k, dim=1).values


def linears(layer: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """The decoder's own matrices in one layer with their paths; grafts and adapters are looked past."""
    for name, child in layer.named_children():
        inner = getattr(child, "base_layer", child)  # PEFT wraps a matrix together with its adapters
        if isinstance(inner, nn.Linear):
            yield prefix + name, inner
        elif name != NAME:
            yield from linears(child, f"{prefix}{name}.")


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| * norm of input channel j (Sun et al. 2023): (out, in) from a weight (out, in) and norms (in,)."""
    return weight.abs() * norms.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def channel_squares(x: Tensor, counts: Tensor, zero: Tensor) -> Tensor:
    """(G, in) sums over tokens of the squares of (N, in) inputs of a matrix, each as often as (G, N) `counts` says.

    Args:
        zero: (1,) of 0 in the dtype of `counts`, in which squares are taken: those of half precision would be rounded.
    """
    # the first term has the products in its dtype
    return counts @ (x.square() if x.dtype == counts.dtype else torch.addcmul(zero, x, x))


def target_names(anatomy: Anatomy, path: str) -> set[str]:
    """What a module of a decoder layer is called where matrices are named: its path, its own name, and "attention" or
    "mlp". Routers of a mixture of experts are no "mlp", and what a hybrid decoder has in the place of attention or
    beside it is neither: they are meant only by name."""
    name = path.rpartition(".")[2]
    if path.partition(".")[0] in anatomy.mixers or name in _ROUTERS:
        return {path, name}
    return {path, name, "attention" if path.startswith(f"{anatomy.family.attention}.") else "mlp"}


def other_matrices(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a layer, with their paths, that hold matrices and are no linear layers: fused experts, Conv1D."""
    for path, module in layer.named_modules():
        own = {NAME, "lora_A", "lora_B"} & set(path.split("."))
        if own or isinstance(module, nn.Linear | nn.Embedding):
            continue
        if any(weight.dim() > 1 for weight in module.parameters(recurse=False)):
            yield path, module
