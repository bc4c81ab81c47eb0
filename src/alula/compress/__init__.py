"""Smaller models: weights set to zero, what shares them across tasks, files without the zeros, parts taken out.

    from alula.compress import WeightPruning, prune

    mask = prune(model, WeightPruning(method="wanda", sparsity=0.5), batches)
    mask.save("mask.safetensors")

Weights set to zero make nothing faster; parts taken out do.
"""

from alula.coding import Coded, decode, encode, is_coded
from alula.compress.calibration import Batches, Calibration, Seen
from alula.compress.data import MixtureBatches
from alula.compress.pruning import apply_mask, find_mask, prune
from alula.compress.settings import Removal, WeightPruning
from alula.compress.structured import Removed, check_removal, remove
from alula.compress.subnet import Pooled, pooled_mask, shared_mask, task_masks
from alula.weights import WeightMask

__all__ = [
    "Batches", "Calibration", "Seen", "MixtureBatches",
    "WeightPruning", "prune", "find_mask", "apply_mask", "WeightMask",
    "task_masks", "shared_mask", "Pooled", "pooled_mask",
    "Removal", "Removed", "remove", "check_removal",
    "Coded", "encode", "decode", "is_coded",
]  # fmt: skip
