"""Pruning by second order, with an update of the weights that stay (Frantar & Alistarh 2023, arXiv 2301.00774, alg. 1).

Shapes: out, in the widths of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alula.errors import DataError
from alula.weights import keep_of_matrix, keep_pattern

DAMPING, BLOCK = 0.01, 128  # as published


def prune_by_hessian(
    weight: Tensor,
    products: Tensor,
    *,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Go through the columns from the left; what each loses is made up for by those to its right.

    Which weights of a block of columns go is decided when it is reached, by ``w^2 / d^2`` with d the diagonal of the
    Cholesky factor of the inverse Hessian. Of a block exactly ``int(out * columns * sparsity)`` weights go (published
    code takes all up to that order statistic, one more). Channels that no token uses lose all their weights.

    Args:
        weight: (out, in).
        products: (in, in) sums of x x^T over the calibration tokens.
        sparsity: share of each block that goes; None with a pattern.
        pattern: (n, m): of every m columns n stay.
        damping: share of the mean of the diagonal that is added to it.
        block: columns that are compared together.

    Returns:
        The updated weight and which weights stay, (out, in) each.

    Raises:
        DataError: the damped Hessian is not positive definite.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w = weight.detach().to(dtype, copy=True)
    factor = _factor(products.to(w.device, dtype), damping)
    unused = products.diagonal().to(w.device) == 0
    w[:, unused] = 0
    kept = torch.ones_like(w, dtype=torch.bool)
    if pattern is not None:
        block = max(block // pattern[1], 1) * pattern[1]
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        inner, errors, own = w[:, start:end].clone(), w.new_zeros(len(w), end - start), factor[start:end, start:end]
        diagonal = own.diagonal()
        if pattern is None:
            assert sparsity is not None
            kept[:, start:end] = keep_of_matrix((inner / diagonal) ** 2, sparsity)
        for column in range(end - start):
            if pattern is not None and column % pattern[1] == 0:
                group = slice(column, column + pattern[1])
                kept[:, start:end][:, group] = keep_pattern((inner[:, group] / diagonal[group]) ** 2, pattern)
            left = torch.where(kept[:, start + column], inner[:, column], 0)
            errors[:, column] = (inner[:, column] - left) / diagonal[column]
            inner[:, column:] -= errors[:, column, None] * own[column, None, column:]
            inner[:, column] = left
        w[:, start:end] = inner
        w[:, end:] -= errors @ factor[start:end, end:]
    return w.to(weight.dtype), kept


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if not bool(failed):
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if bool(failed):
        raise DataError(
            "the calibration tokens do not determine a second order (the damped Hessian is not positive definite)",
            remedy="calibrate on more tokens, or raise damping",
        )
    return factor
