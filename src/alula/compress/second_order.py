"""Pruning by second order, with an update of the weights that stay (Frantar & Alistarh 2023, arXiv 2301.00774, alg. 1).

Shapes: out, in the widths of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alula.errors import DataError
from alula.weights import keep_of_matrix, keep_pattern

DAMPING, BLOCK = 0.01, 128  # as published


@dataclass(frozen=True)
class Curvature:
    """Of what a matrix is given, all that pruning by second order goes by.

    Attributes:
        factor: (in, in) the upper Cholesky factor of the inverse of the damped Hessian.
        unused: (in,) bool: channels that no token uses.
    """

    factor: Tensor
    unused: Tensor

    @classmethod
    def of(cls, products: Tensor, damping: float = DAMPING) -> Curvature:
        """Of (in, in) sums of x x^T over the calibration tokens, whose memory it takes over: they are gone afterwards.

        Args:
            damping: share of the mean of the diagonal that is added to it.

        Raises:
            DataError: the damped Hessian is not positive definite.
        """
        diagonal = products.diagonal()
        unused = diagonal == 0
        diagonal[unused] = 1
        diagonal += damping * diagonal.mean()
        factor = products.T  # its own transpose, in the order in which LAPACK computes in place
        failed = torch.zeros((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not bool(failed):
            torch.cholesky_inverse(factor, out=factor)
            torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
        if bool(failed):
            raise DataError(
                "the calibration tokens do not determine a second order (the damped Hessian is not positive definite)",
                remedy="calibrate on more tokens, or raise damping",
            )
        return cls(factor, unused)


def prune_by_curvature(
    weight: Tensor,
    curvature: Curvature,
    *,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    block: int = BLOCK,
) -> Tensor:
    """Prune a matrix in place, its columns from the left; what each loses is made up for by those to its right.

    Which weights of a block of columns go is decided when it is reached, by ``w^2 / d^2`` with d the diagonal of the
    Cholesky factor of the inverse Hessian. Of a block exactly ``int(out * columns * sparsity)`` weights go (published
    code takes all up to that order statistic, one more). Channels that no token uses lose all their weights.

    Args:
        weight: (out, in).
        sparsity: share of each block that goes; None with a pattern.
        pattern: (n, m): of every m columns n stay.
        block: columns that are compared together.

    Returns:
        (out, in) bool: which weights stay, none of a channel that no token uses.
    """
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))  # float32 and float64: the weight itself
    factor = curvature.factor.to(w.device, w.dtype)
    unused = curvature.unused.to(w.device)
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
        w[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    if w.data_ptr() != weight.data_ptr():
        weight.copy_(w)
    kept[:, unused] = False
    return kept
