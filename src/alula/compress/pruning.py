"""Pruning of single weights: layer by layer, each calibrated on what the pruned layers before it give."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from alula._version import __version__
from alula.anatomy import Anatomy
from alula.compress.calibration import Batches, Calibration
from alula.compress.originals import Originals
from alula.compress.second_order import BLOCK, DAMPING, Curvature, prune_by_curvature
from alula.compress.settings import PATTERNS, WeightPruning
from alula.compress.targets import Matrices, matrices, name_of
from alula.errors import DataError, UsageError
from alula.grafts.storage import fingerprint
from alula.weights import (
    Bits,
    WeightMask,
    keep_count,
    keep_highest,
    keep_of_matrix,
    keep_pattern,
    pack,
    wanda_scores,
)

_PIECE = 1 << 18
"""weights that are scored at a time where rows are compared apart"""


def prune(
    model: nn.Module, settings: WeightPruning, batches: Batches | None = None, *, like: WeightMask | None = None
) -> WeightMask:
    """Set weights of a model to zero, in place, one decoder layer after the other.

    The data run through the host once per layer, up to that layer and with all layers before it pruned. Above the model
    memory holds the sums of one layer and one batch; what weights were is on disk meanwhile. This makes nothing faster
    (see `WeightPruning`); `remove` does.

    Args:
        model: a host, in whatever precision; scores are computed in float32 at least.
        settings: what is pruned, and how much.
        batches: model inputs, as processors and `alula.data.Collator` make them; none for magnitude.
        like: keep exactly as many weights of each matrix as this mask does, in place of a sparsity or a pattern: by
            output and as evenly as can be, or the highest of the whole matrix where that is compared (`per`).

    Returns:
        The weights that were kept, and in `WeightMask.made` what they were chosen by.

    Raises:
        UsageError: settings that mean nothing on this model or prune nothing, data that are missing, empty, of no use
            or can be gone through only once. HostError: matrices that cannot be pruned, by name. DataError: calibration
            gives numbers that are not finite, or other data in each pass. The model is left as it was then.
    """
    with Originals() as originals:
        return _pruned(model, settings, batches, like, originals)


def find_mask(
    model: nn.Module, settings: WeightPruning, batches: Batches | None = None, *, like: WeightMask | None = None
) -> WeightMask:
    """The mask that `prune` would leave. The model is what it was afterwards, bit for bit."""
    with Originals() as originals:
        mask = _pruned(model, settings, batches, like, originals)
        originals.restore()
    return mask


@torch.no_grad()
def apply_mask(model: nn.Module, mask: WeightMask, *, check_model: bool = True) -> None:
    """Set the weights to zero that a mask does not keep, in place.

    Args:
        model: the host the mask was made on.
        check_model: refuse a decoder whose weights are not those it was made on, where the mask says which; without,
            names and shapes are enough (a model that was tuned since).

    Raises:
        UsageError: a mask of another model, or of matrices that this one does not have. HostError: matrices that cannot
            be pruned. Nothing is changed then.
    """
    made_on = mask.made.get("model")
    if check_model and made_on is not None and made_on != fingerprint(model):
        raise UsageError(
            "the mask was made on a model with other weights",
            remedy="load that model; or pass check_model=False, if this one was tuned from it",
        )
    for name, linear in _named(model, mask).items():
        linear.weight.masked_fill_(~mask.unpack(name).to(linear.weight.device), 0)


# -- the walk ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _pruned(
    model: nn.Module,
    settings: WeightPruning,
    batches: Batches | None,
    like: WeightMask | None,
    originals: Originals,
) -> WeightMask:
    _check_asked(settings, batches, like)
    found = matrices(model, settings.targets, settings.layers)
    _check_amount(found, settings, like)
    made = {"model": fingerprint(model), **_versions(), "settings": settings.model_dump(mode="json")}
    calibration = None
    if batches is not None:
        calibration = Calibration(model, batches, tokens=settings.tokens, skip_first=settings.skip_first)
    bits: dict[str, Bits] = {}
    for index, each in found.items():
        bits |= _prune_layer(index, each, settings, calibration, like, originals)
    shapes = _shapes(found)
    if calibration is not None and calibration.seen is not None:
        made["data"] = dataclasses.asdict(calibration.seen)
    if like is not None:
        made["like"] = dict(like.made)
    mask = WeightMask(bits, shapes, made)
    return dataclasses.replace(mask, made={**made, "sparsity": round(mask.sparsity, 6)})


def _prune_layer(
    index: int,
    own: Mapping[str, nn.Linear],
    settings: WeightPruning,
    calibration: Calibration | None,
    like: WeightMask | None,
    originals: Originals,
) -> dict[str, Bits]:
    """Prune one layer in place; nothing of it but its mask, one bit a weight, is left in memory."""
    sums: Mapping[str, Tensor] = {}
    if calibration is not None:
        sums = calibration.sums({index: list(own)}, "products" if settings.method == "sparsegpt" else "squares")
    curvatures: dict[int, Curvature] = {}  # matrices that are given the same have one
    kept: dict[str, Bits] = {}
    for path, linear in own.items():
        name, weight = name_of(index, path), linear.weight
        originals.keep(weight)
        if settings.method == "sparsegpt":
            products = sums[name]
            if id(products) not in curvatures:
                curvatures[id(products)] = Curvature.of(products, settings.damping or DAMPING)
            kept[name] = pack(_prune_by_curvature(weight, curvatures[id(products)], settings))
        elif like is not None or (settings.by_matrix and settings.pattern is None):
            kept[name] = pack(_prune_whole(name, weight, sums.get(name), settings, like))
        else:
            kept[name] = _prune_rows(name, weight, sums.get(name), settings)
    return kept


def _prune_by_curvature(weight: Tensor, curvature: Curvature, settings: WeightPruning) -> Tensor:
    pattern, block = _pattern(settings), settings.block or BLOCK
    return prune_by_curvature(weight, curvature, sparsity=settings.sparsity, pattern=pattern, block=block)


def _prune_whole(
    name: str, weight: Tensor, sums: Tensor | None, settings: WeightPruning, like: WeightMask | None
) -> Tensor:
    """Prune one matrix in place and return (out, in) bool which weights stay, all of them compared at once."""
    scores = _scores(name, weight, sums)
    if like is not None:
        compared = scores.reshape(1, -1) if settings.by_matrix else scores
        kept = keep_count(compared, like.count(name)).view_as(scores)
    else:
        assert settings.sparsity is not None
        kept = keep_of_matrix(scores, settings.sparsity)
    weight.masked_fill_(~kept, 0)
    return kept


def _prune_rows(name: str, weight: Tensor, sums: Tensor | None, settings: WeightPruning) -> Bits:
    """Prune one matrix in place, some rows at a time, so that scores take little memory."""
    pattern, packed = _pattern(settings), list[Bits]()
    for rows in weight.split(max(1, _PIECE // weight.shape[1])):
        scores = _scores(name, rows, sums)
        if pattern is not None:
            kept = keep_pattern(scores, pattern)
        else:
            assert settings.sparsity is not None
            kept = keep_highest(scores, settings.sparsity)
        rows.masked_fill_(~kept, 0)
        packed.append(pack(kept))
    return np.concatenate(packed)


def _scores(name: str, weight: Tensor, sums: Tensor | None) -> Tensor:
    if sums is None:
        scores = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    else:
        scores = wanda_scores(weight, sums.sqrt())
    if not bool(scores.isfinite().all()):
        raise DataError(f"{name} has weights that are not finite", remedy="load the model again")
    return scores


def _pattern(settings: WeightPruning) -> tuple[int, int] | None:
    return PATTERNS[settings.pattern] if settings.pattern is not None else None


# -- what is refused --------------------------------------------------------------------------------------------------


def _check_asked(settings: WeightPruning, batches: Batches | None, like: WeightMask | None) -> None:
    ways = [settings.sparsity is not None, settings.pattern is not None, like is not None]
    if sum(ways) != 1:
        raise UsageError(
            "nothing says how much is pruned" if not any(ways) else "more than one thing says how much is pruned",
            where="WeightPruning",
            remedy="give one of sparsity, pattern, and a mask to be like",
        )
    if like is not None and settings.method == "sparsegpt":
        raise UsageError("like has no effect on SparseGPT", remedy="use Wanda or magnitude")
    if settings.needs_data and batches is None:
        raise UsageError(f"{settings.method} needs calibration data", remedy='pass batches, or method="magnitude"')
    if not settings.needs_data and batches is not None:
        raise UsageError("magnitude looks at no data", remedy="leave batches out")


def _check_amount(found: Matrices, settings: WeightPruning, like: WeightMask | None) -> None:
    """Refuse what prunes nothing, or cannot be."""
    shapes = _shapes(found)
    if like is not None and shapes != dict(like.shapes):
        raise UsageError(
            "the mask to be like is of other matrices than are pruned",
            remedy="name its targets and layers, on its model",
        )
    group = PATTERNS[settings.pattern][1] if settings.pattern is not None else 1
    for name, (rows, columns) in shapes.items():
        if columns % group:
            raise UsageError(
                f"{name} has {columns} columns, which a pattern of {settings.pattern} does not divide",
                remedy="name targets without it, or give a sparsity",
            )
        compared = rows * columns if settings.by_matrix else columns
        if settings.method == "sparsegpt":
            compared = rows * min(columns, settings.block or BLOCK)
        if settings.sparsity is not None and int(compared * settings.sparsity) == 0:
            raise UsageError(
                f"a sparsity of {settings.sparsity} prunes nothing of {name}, in which {compared} weights are compared",
                remedy="give a larger one",
            )


def _shapes(found: Matrices) -> dict[str, tuple[int, int]]:
    return {
        name_of(i, path): (linear.out_features, linear.in_features)
        for i, each in found.items()
        for path, linear in each.items()
    }


def _named(model: nn.Module, mask: WeightMask) -> dict[str, nn.Linear]:
    """The matrices of a mask by its names."""
    places = {name: _place(name) for name in mask.shapes}
    anatomy = Anatomy.of(model)
    lost = [name for name, (index, _) in places.items() if not 0 <= index < anatomy.num_layers]
    found: dict[str, nn.Linear] = {}
    if not lost and places:
        paths = tuple(dict.fromkeys(path for _, path in places.values()))
        layers = sorted({index for index, _ in places.values()})
        try:
            each = matrices(model, paths, layers)
        except UsageError as error:
            raise UsageError(f"a mask of another model: {error.message}") from error
        found = {name_of(i, path): linear for i, there in each.items() for path, linear in there.items()}
        lost = [name for name in places if name not in found]
    if lost:
        raise UsageError(f"a mask of another model: this one has no {lost[0]}", remedy="load the model it was made on")
    for name, shape in mask.shapes.items():
        if tuple(found[name].weight.shape) != shape:
            own = " x ".join(map(str, found[name].weight.shape))
            raise UsageError(
                f"a mask of another model: its {name} is {shape[0]} x {shape[1]}, here it is {own}",
                remedy="load the model it was made on",
            )
    return {name: found[name] for name in mask.shapes}


def _place(name: str) -> tuple[int, str]:
    """The layer and the path below it that a name of a mask means; layer -1 where it means none."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (-1, name)


def _versions() -> dict[str, Any]:
    return {"alula": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
