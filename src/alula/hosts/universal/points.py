"""Groups of points: centers chosen far from each other, and the neighbors of each.

Shapes: N clouds, P points, G centers, K neighbors. A point is (x, y, z, red, green, blue). Geometry alone decides who
is a center and who its neighbor; colors travel along.

All is plain PyTorch without a look at the device's values, so that it runs on any device and in any precision:
distances are taken in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def farthest_points(places: Tensor, count: int) -> Tensor:
    """Farthest point sampling (Eldar et al., 1997; PointNet++).

    The first center is the point farthest from the mean of the cloud, so that the order of points plays no part; each
    next one is the point whose nearest center so far is farthest.

    Args:
        places: (N, P, 3).
        count: G, at most P.

    Returns:
        (N, G) int64, indices of the centers in the order in which they were chosen.
    """
    places = places.float()
    chosen = (places - places.mean(dim=1, keepdim=True)).square().sum(dim=-1).argmax(dim=1)
    nearest = places.new_full(places.shape[:2], torch.inf)
    found = [chosen]
    for _ in range(count - 1):
        center = places.take_along_dim(chosen[:, None, None], dim=1)
        nearest = torch.minimum(nearest, (places - center).square().sum(dim=-1))
        chosen = nearest.argmax(dim=1)
        found.append(chosen)
    return torch.stack(found, dim=1)


def neighbors(places: Tensor, centers: Tensor, count: int) -> Tensor:
    """The nearest points of each center, itself among them.

    Args:
        places: (N, P, 3). centers: (N, G, 3). count: K, at most P.

    Returns:
        (N, G, K) int64, nearest first.
    """
    distances = torch.cdist(centers.float(), places.float(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(count, dim=-1, largest=False).indices


def grouped(points: Tensor, groups: int, size: int) -> Tensor:
    """(N, P, C) with x, y, z first -> (N, G, K, C): the neighbors of every center, coordinates as they were."""
    places = points[..., :3]
    centers = places.take_along_dim(farthest_points(places, groups)[..., None], dim=1)
    index = neighbors(places, centers, size)
    return points.take_along_dim(index.flatten(1)[..., None], dim=1).unflatten(1, (groups, size))
