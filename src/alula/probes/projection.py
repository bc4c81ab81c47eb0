"""Points in the plane for vectors in d dimensions: pure functions."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from alula.errors import UsageError
from alula.stats import Array

Method = Literal["pca", "tsne"]


def to_plane(vectors: Array, method: Method = "pca", *, seed: int = 0) -> Array:
    """Project (n, d) vectors to (n, 2) points.

    Args:
        method: "pca": the two directions of largest variance, each signed so that its largest loading is positive;
            "tsne": t-SNE from a PCA start with perplexity 30 (a third of the points where there are fewer than 91).
        seed: of t-SNE.

    Raises:
        UsageError: an unknown method, or fewer than 3 vectors.
    """
    if method not in get_args(Method):
        raise UsageError(f"a projection cannot be {method!r}", remedy=f"use one of: {', '.join(get_args(Method))}")
    if len(vectors) < 3:
        raise UsageError(f"{len(vectors)} vectors are too few for a projection", remedy="measure more samples")
    centred = vectors - vectors.mean(axis=0)
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(vectors) - 1) / 3)
        return TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(centred)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    directions = np.pad(directions[:2], ((0, max(0, 2 - len(directions))), (0, 0)))
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    return centred @ (directions * np.where(largest < 0, -1, 1)).T
