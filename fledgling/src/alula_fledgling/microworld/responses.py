"""Responses to a scene, as of a brain that is read voxel by voxel: fixed, linear in what is to be seen, and noisy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from alula_fledgling.microworld.scenes import COLOURS, SHAPES, Scene
from alula_fledgling.microworld.sounds import noise

NUM_VOXELS = 256
NOISE = 0.5
"""The most that noise adds to a voxel or takes away, where a thing adds one at most by each of its features."""

_PARTS = (*COLOURS, *SHAPES, "there", "large")
NUM_FEATURES = 9 * len(_PARTS)
_WEIGHTS_SEED = 20231206


def features(scene: Scene) -> np.ndarray:
    """What is to be seen, float64 (NUM_FEATURES,) of 0 and 1: for each cell its color, its shape, that something is
    there, and whether that is large."""
    found = np.zeros((9, len(_PARTS)))
    for thing in scene.things:
        said = (thing.colour, thing.shape, "there", *(("large",) if thing.size == "large" else ()))
        found[thing.cell, [_PARTS.index(part) for part in said]] = 1
    return found.reshape(-1)


def weights() -> np.ndarray:
    """What each feature adds to each voxel, (NUM_VOXELS, NUM_FEATURES) in -1..1; the same for everybody, in steps of
    2^-23, so that sums are exact in any order."""
    return noise(_WEIGHTS_SEED, NUM_VOXELS * NUM_FEATURES).reshape(NUM_VOXELS, NUM_FEATURES)


@dataclass(frozen=True)
class Response:
    """A response that is made only when asked for. Cheap to hold, hash and pickle.

    Attributes:
        scene: what is seen.
        repeat: which time it is seen; another time, other noise.
    """

    scene: Scene
    repeat: int = 0

    def load(self) -> np.ndarray:
        """float32 (NUM_VOXELS,)."""
        digest = hashlib.blake2b(f"{self.scene.content}|{self.repeat}".encode(), digest_size=6).digest()
        return (weights() @ features(self.scene) + NOISE * noise(int.from_bytes(digest, "big"), NUM_VOXELS)).astype(
            np.float32
        )

    def fingerprint(self) -> str:
        """What decides the values."""
        return f"{self.scene.content}|{self.repeat}"
