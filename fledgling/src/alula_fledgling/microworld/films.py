"""Short films: things that move, stay, appear or leave; what happens before any pixel is drawn, and the frames.

A film has an axis. Everything stands in one of three lanes along it (rows of a horizontal film, columns of a vertical
one), one thing to a lane, so nothing ever hides anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from alula.draws import Draw
from alula_fledgling.microworld.render import BACKGROUNDS, CENTRES, IMAGE_SIZE, INK, blend, shape_coverage
from alula_fledgling.microworld.scenes import NUM_BACKGROUNDS, SEEN_PAIRS, SIZES, UNSEEN_PAIRS
from alula_fledgling.microworld.splits import split_of

NUM_FRAMES = 8
FRAME_MS = 125
"""A frame's time on the screen: a film lasts one second."""

DIRECTIONS = ("left", "right", "upwards", "downwards")
SPEEDS = ("slow", "fast")
ACTS = ("moves", "stays", "appears", "leaves")

UNSEEN_MOVES = frozenset(
    {
        ("circle", "left", "fast"),
        ("square", "right", "slow"),
        ("triangle", "upwards", "fast"),
        ("cross", "downwards", "slow"),
        ("ring", "left", "slow"),
        ("heart", "right", "fast"),
    }
)
"""Moves kept out of all training. Each shape is seen at both speeds and in all directions, only not these together."""

_PIXELS = {"slow": 1, "fast": 3}  # a frame
_SIGN = {"left": -1, "right": 1, "upwards": -1, "downwards": 1}
_AXES = {"horizontal": ("left", "right"), "vertical": ("upwards", "downwards")}
_FIRST, _LAST = CENTRES[0], CENTRES[-1]
_EVENT_FRAMES = (2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Actor:
    """One thing and what it does.

    Attributes:
        colour, shape, size: its look.
        lane: 0, 1 or 2, from the top (horizontal films) or from the left.
        act: a member of `ACTS`.
        direction, speed: of a thing that moves; else empty.
        frame: the first frame in which a thing that appears is there, or one that leaves is not; else 0.
        start: pixel along the axis in the first frame.
        shift: pixels across the lane.
    """

    colour: str
    shape: str
    size: str
    lane: int
    act: str
    direction: str = ""
    speed: str = ""
    frame: int = 0
    start: int = 20
    shift: int = 0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def move(self) -> tuple[str, str, str]:
        """Shape, direction and speed, as in `UNSEEN_MOVES`."""
        return self.shape, self.direction, self.speed

    def at(self, frame: int) -> int | None:
        """Pixel along the axis in a frame; None when it is not there."""
        if (self.act == "appears" and frame < self.frame) or (self.act == "leaves" and frame >= self.frame):
            return None
        return self.start + (_SIGN[self.direction] * _PIXELS[self.speed] * frame if self.act == "moves" else 0)


@dataclass(frozen=True)
class Film:
    """Actors in the order of their lanes, before one of four backgrounds."""

    actors: tuple[Actor, ...]
    axis: str
    background: int = 0

    @property
    def content(self) -> str:
        """What happens, without what does not matter (pixels, background)."""
        told = (f"{a.size} {a.name} {a.lane} {a.act} {a.direction} {a.speed} {a.frame}" for a in self.actors)
        return f"{self.axis}: {'; '.join(told)}"

    def present(self, frame: int) -> list[Actor]:
        """Who is there in a frame."""
        return [actor for actor in self.actors if actor.at(frame) is not None]


@dataclass(frozen=True)
class FilmClip:
    """A film that is drawn only when asked for; equal films give equal frames. Cheap to hold, hash and pickle."""

    film: Film

    def load(self) -> np.ndarray:
        """The frames, uint8 (NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)."""
        return render_film(self.film)

    def fingerprint(self) -> str:
        """What decides the frames."""
        return repr(self.film)


def render_film(film: Film) -> np.ndarray:
    """Draw a film as uint8 frames (NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)."""
    frames = np.empty((NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for number in range(NUM_FRAMES):
        canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.int32)
        canvas[:] = BACKGROUNDS[film.background]
        for actor in film.actors:
            along = actor.at(number)
            if along is not None:
                across = CENTRES[actor.lane] + actor.shift
                x, y = (along, across) if film.axis == "horizontal" else (across, along)
                blend(canvas, shape_coverage(actor.shape, actor.size), x, y, INK[actor.colour])
        frames[number] = canvas
    return frames


def draw_film(
    draw: Draw,
    acts: Sequence[str],
    *,
    look: tuple[str, str] | None = None,
    move: tuple[str, str, str] | None = None,
) -> Film:
    """Draw a film with one actor per act, all of different looks.

    Args:
        acts: what is done, in any order of lanes.
        look: a combination of colour and shape that the first actor must have; by default only seen ones occur.
        move: a move that the first actor, who must be one that moves, must make.
    """
    axis = next((axis for axis, ways in _AXES.items() if move and move[1] in ways), None)
    axis = axis or draw.choice(tuple(_AXES))
    pool = [pair for pair in SEEN_PAIRS if move is None or pair[1] != move[0]]
    looks = draw.sample(pool, len(acts))
    if look is not None:
        looks[0] = look
    elif move is not None:
        looks[0] = draw.choice([pair for pair in SEEN_PAIRS if pair[1] == move[0]])
    lanes = draw.sample(range(3), len(acts))
    actors = []
    for place, (act, pair, lane) in enumerate(zip(acts, looks, lanes, strict=True)):
        actor = Actor(*pair, draw.choice(SIZES), lane, act, shift=draw.between(-1, 1))
        if act == "moves":
            way = move if move is not None and place == 0 else _seen_move(draw, pair[1], axis)
            travel = _PIXELS[way[2]] * (NUM_FRAMES - 1)
            start = draw.between(_FIRST, _LAST - travel)
            start = start if _SIGN[way[1]] > 0 else start + travel
            actor = replace(actor, direction=way[1], speed=way[2], start=start)
        else:
            frame = draw.choice(_EVENT_FRAMES) if act in ("appears", "leaves") else 0
            actor = replace(actor, frame=frame, start=draw.between(_FIRST, _LAST))
        actors.append(actor)
    return Film(tuple(sorted(actors, key=lambda actor: actor.lane)), axis, draw.below(NUM_BACKGROUNDS))


def _seen_move(draw: Draw, shape: str, axis: str) -> tuple[str, str, str]:
    moves = [(shape, way, speed) for way in _AXES[axis] for speed in SPEEDS]
    return draw.choice([move for move in moves if move not in UNSEEN_MOVES])


def draw_unseen(draw: Draw, family_moves: bool) -> dict[str, tuple]:
    """Keywords for `draw_film` that make its first actor's look, or its move, one kept out of training.

    Args:
        family_moves: whether the first actor is one that moves.
    """
    if family_moves and draw.chance(0.5):
        return {"move": draw.choice(sorted(UNSEEN_MOVES))}
    return {"look": draw.choice(sorted(UNSEEN_PAIRS))}


def is_unseen(actor: Actor) -> bool:
    """Whether an actor's look or move is one kept out of training."""
    return actor.pair in UNSEEN_PAIRS or actor.move in UNSEEN_MOVES


def split_of_film(film: Film) -> str:
    """``"train"`` or ``"test"`` by what happens."""
    return split_of("film", film.content)
