"""Scenes in space: the things of a scene as flat plates before a wall, each at a distance of its own and facing a way.

The camera sees along -z without perspective; x goes to the right, y up, z towards it, all in meters. What is drawn,
its depth, its surface normals and points on it come from the same plates, so they agree: a plate in front hides what is
behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from alula.draws import Draw
from alula_fledgling.microworld.render import (
    BACKGROUNDS,
    IMAGE_SIZE,
    INK,
    SHAPE_BOX,
    SUB_PIXELS,
    centre_pixels,
    shape_coverage,
    shape_mask,
)
from alula_fledgling.microworld.scenes import Scene, Thing

METERS_PER_PIXEL = 0.05
WALL = 4.0
"""Meters from the camera to the wall."""
DISTANCES = (1.0, 1.6, 2.2, 2.8, 3.4)
"""Meters to the middle of a plate; no two plates of a scene share one."""
NUM_POINTS = 512
"""Points of a cloud."""

FACES = ("left", "right", "upwards", "downwards")
_SLOPE = 0.4  # meters farther per meter: plates of different distances never cross
_SLOPES = {"left": (-_SLOPE, 0.0), "right": (_SLOPE, 0.0), "upwards": (0.0, _SLOPE), "downwards": (0.0, -_SLOPE)}
_TOGETHER = 7, 10  # the grid's cells move together, so that neighbors overlap


@dataclass(frozen=True)
class Plate:
    """Where a thing stands.

    Attributes:
        distance: meters from the camera to its middle.
        faces: the way its front is turned, a member of `FACES`.
    """

    distance: float
    faces: str


@dataclass(frozen=True)
class Relief:
    """A scene in space: one plate for each of its things."""

    scene: Scene
    plates: tuple[Plate, ...]

    def placed(self) -> Iterator[tuple[Thing, Plate, tuple[int, int]]]:
        """Things, their plates, and the column and row of pixels that they are centered at."""
        part, whole = _TOGETHER
        middle = IMAGE_SIZE // 2
        for thing, plate, at in zip(self.scene.things, self.plates, centre_pixels(self.scene), strict=True):
            column, row = (middle + round((place - middle) * part / whole) for place in at)
            yield thing, plate, (column, row)


def draw_relief(draw: Draw, scene: Scene) -> Relief:
    """Put the things of a scene in space."""
    distances = draw.sample(DISTANCES, len(scene.things))
    return Relief(scene, tuple(Plate(distance, draw.choice(FACES)) for distance in distances))


def normal_of(plate: Plate) -> np.ndarray:
    """The unit vector (3,) that stands on a plate."""
    vector = np.array([*_SLOPES[plate.faces], 1.0])
    return vector / np.sqrt((vector * vector).sum())


def depth_of(plate: Plate, right: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Meters along the view to the plane of a plate.

    Args:
        right, up: meters from the plate's middle.
    """
    slope = _SLOPES[plate.faces]
    return plate.distance + slope[0] * right + slope[1] * up


def _fronts(relief: Relief) -> tuple[np.ndarray, np.ndarray]:
    """Depth (H, W) in meters, and the number of the thing that is seen there; -1: the wall."""
    depth = np.full((IMAGE_SIZE, IMAGE_SIZE), WALL)
    seen = np.full(depth.shape, -1)
    offsets = (np.arange(SHAPE_BOX) + 0.5 - SHAPE_BOX / 2) * METERS_PER_PIXEL
    for number, (thing, plate, (column, row)) in enumerate(relief.placed()):
        inside = shape_coverage(thing.shape, thing.size) > SUB_PIXELS**2 // 2
        there = depth_of(plate, offsets[None, :], -offsets[:, None])
        box = np.s_[row - SHAPE_BOX // 2 :, column - SHAPE_BOX // 2 :]
        part, owner = depth[box][:SHAPE_BOX, :SHAPE_BOX], seen[box][:SHAPE_BOX, :SHAPE_BOX]
        nearer = inside & (there < part)
        part[nearer], owner[nearer] = there[nearer], number
    return depth, seen


@dataclass(frozen=True)
class _OfRelief:
    """Something of a relief that is made only when asked for. Cheap to hold, hash and pickle."""

    relief: Relief

    def fingerprint(self) -> str:
        """What decides it."""
        return f"{type(self).__name__} {self.relief!r}"


@dataclass(frozen=True)
class ReliefImage(_OfRelief):
    """The picture of a relief."""

    def load(self) -> Image.Image:
        """RGB, ``IMAGE_SIZE`` pixels square."""
        colors = [INK[thing.colour] for thing in self.relief.scene.things]
        palette = np.array([*colors, BACKGROUNDS[self.relief.scene.background]], np.uint8)
        return Image.fromarray(palette[_fronts(self.relief)[1]])


@dataclass(frozen=True)
class DepthMap(_OfRelief):
    """The depth of a relief."""

    def load(self) -> np.ndarray:
        """float32 (IMAGE_SIZE, IMAGE_SIZE): meters, in whole millimeters."""
        return (np.rint(_fronts(self.relief)[0] * 1000) / 1000).astype(np.float32)


@dataclass(frozen=True)
class NormalMap(_OfRelief):
    """The surface normals of a relief."""

    def load(self) -> np.ndarray:
        """float32 (IMAGE_SIZE, IMAGE_SIZE, 3): unit vectors."""
        vectors = np.array([*map(normal_of, self.relief.plates), [0.0, 0.0, 1.0]])
        return vectors[_fronts(self.relief)[1]].astype(np.float32)


@dataclass(frozen=True)
class Cloud(_OfRelief):
    """Points on the plates of a relief, those that others hide too; none of the wall."""

    def load(self) -> np.ndarray:
        """float32 (NUM_POINTS, 6): x, y, z in meters from the camera, red, green, blue in 0..1."""
        places, colors = [], []
        middle = IMAGE_SIZE / 2
        for thing, plate, (column, row) in self.relief.placed():
            down, right = np.nonzero(shape_mask(thing.shape, thing.size))
            offsets = (np.stack([right, -down]) + np.array([[0.5], [-0.5]])) / SUB_PIXELS
            right, up = (offsets + np.array([[-SHAPE_BOX / 2], [SHAPE_BOX / 2]])) * METERS_PER_PIXEL
            x, y = (column - middle) * METERS_PER_PIXEL + right, (middle - row) * METERS_PER_PIXEL + up
            places.append(np.stack([x, y, -depth_of(plate, right, up)], axis=1))
            colors += [np.array(INK[thing.colour]) / 255] * len(x)
        whole = np.concatenate([np.concatenate(places), np.array(colors)], axis=1)
        draw = Draw("cloud", self.relief)
        return whole[[draw.below(len(whole)) for _ in range(NUM_POINTS)]].astype(np.float32)
