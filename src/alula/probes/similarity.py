"""Similarity of two sets of paired vectors, from their Gram matrices: pure functions.

Shapes: K samples, d width, P permutations, R resamples. Rows of X and Y with the same index form a pair.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alula.stats import Array

Order = NDArray[np.intp]


def unit_rows(x: Array) -> Array:
    """Rows of (K, d) scaled to length 1; zero rows stay zero."""
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)


def mismatched_mean(total: Array, matched: Array, count: int) -> Array:
    """The mean over pairs of different samples, from the mean over all pairs and the mean over matched ones."""
    return (count * total - matched) / (count - 1) if count > 1 else np.full_like(total, np.nan)


def pair_means(cross: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Means of a matrix of similarities under weights on the samples.

    Args:
        cross: (K, K) similarity of sample i's x with sample j's y.
        weights: (R, K), rows add to 1.

    Returns:
        (R,) each: over all pairs, over matched pairs (i = i), and over mismatched pairs (i != j).
    """
    matched = weights @ np.diagonal(cross)
    every = np.einsum("rk,rk->r", weights @ cross, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        own = (weights**2) @ np.diagonal(cross)
        mismatched = (every - own) / (1 - (weights**2).sum(axis=1))
    return every, matched, mismatched


def centre_gram(gram: Array) -> Array:
    """H K H: the Gram matrix (K, K) of the mean-removed rows."""
    return gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()


def u_centre_gram(gram: Array) -> Array:
    """The centring behind the unbiased HSIC estimate (Song et al. 2012; Szekely and Rizzo 2014); needs K > 3."""
    count = len(gram)
    hollow = gram - np.diag(np.diagonal(gram))
    rows = hollow.sum(axis=0) / (count - 2)
    centred = hollow - rows - rows[:, None] + hollow.sum() / ((count - 1) * (count - 2))
    np.fill_diagonal(centred, 0)
    return centred


def cka(x_gram: Array, y_gram: Array, *, debiased: bool, orders: Order | None = None) -> tuple[float, Array]:
    """Linear centred kernel alignment (Kornblith et al. 2019), and the same with y's samples in other orders.

    Args:
        x_gram, y_gram: (K, K) inner products within X and within Y.
        debiased: use the unbiased estimate of HSIC, whose expectation is 0 for unrelated sets of any width; the
            plain one grows towards 1 when d is larger than K.
        orders: (P, K) permutations.

    Returns:
        The value (NaN where undefined: fewer than 2, or debiased 4, samples, or no variance) and (P,) permuted values.
    """
    if len(x_gram) < (4 if debiased else 2):
        return np.nan, np.full(0 if orders is None else len(orders), np.nan)
    centre = u_centre_gram if debiased else centre_gram
    x, y = centre(x_gram), centre(y_gram)
    scale = (x * x).sum() * (y * y).sum()
    if scale <= 0:
        return np.nan, np.full(0 if orders is None else len(orders), np.nan)
    permuted = [(x * y[np.ix_(order, order)]).sum() for order in ([] if orders is None else orders)]
    return float((x * y).sum() / np.sqrt(scale)), np.array(permuted) / np.sqrt(scale)


def neighbours(similarity: Array, count: int) -> NDArray[np.bool_]:
    """(K, K) bool: j is one of the `count` most similar others of i (ties go to the lower index)."""
    hollow = similarity.copy()
    np.fill_diagonal(hollow, -np.inf)
    nearest = np.argsort(-hollow, axis=1, kind="stable")[:, :count]
    chosen = np.zeros(similarity.shape, dtype=bool)
    np.put_along_axis(chosen, nearest, True, axis=1)
    return chosen


def shared_neighbours(of_x: NDArray[np.bool_], of_y: NDArray[np.bool_]) -> Array:
    """(K,) share of each sample's neighbours among the x that are its neighbours among the y too.

    Their mean is the mutual k-nearest-neighbour alignment (Huh et al. 2024); k / (K - 1) is its chance level.
    """
    return (of_x & of_y).sum(axis=1) / of_x.sum(axis=1)
