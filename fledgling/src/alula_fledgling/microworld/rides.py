"""Motion: what an accelerometer and a gyroscope feel that ride on the thing that moves in a film.

The film's plane is a table seen from above: x to the right, y up the picture, z towards the viewer, so that at rest
the accelerometer feels gravity's reaction along z. Before the film the thing rests, sets off within a quarter of a
second, is where the film has it in each of its frames, and comes to rest behind it. On the way it may turn, and the
sensor with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from alula.draws import Draw
from alula_fledgling.microworld.films import FRAME_MS, NUM_FRAMES, Actor, Film, draw_film
from alula_fledgling.microworld.reliefs import METERS_PER_PIXEL
from alula_fledgling.microworld.sounds import noise
from alula_fledgling.microworld.splits import split_of

RATE = 200
"""Samples per second."""
NUM_SAMPLES = 400
GRAVITY = 9.81
"""m/s^2"""
TURNS = ("left", "right", "")
"""Which way a thing turns while it moves; left is against the clock. Empty: not at all."""

_TURN = 2.0  # rad/s
_START = 0.25  # seconds from rest to speed, and back
_WHILE = (NUM_FRAMES - 1) * FRAME_MS / 1000  # seconds at speed
_EARLIEST = 60  # samples at rest, at least
_NOISE = (0.03, 0.005)  # m/s^2, rad/s: the most of it
_STEPS = 10_000  # a sensor's smallest steps in 1 m/s^2 or rad/s; no math library can change a value


@dataclass(frozen=True)
class Ride:
    """A thing's move in a film, and what the film does not tell.

    Attributes:
        film: of one actor, who moves.
        turn: a member of `TURNS`.
        late: samples it sets off late.
        hiss: seed of the sensors' noise.
    """

    film: Film
    turn: str
    late: int = 0
    hiss: int = 0

    @property
    def actor(self) -> Actor:
        """Who moves."""
        return self.film.actors[0]

    @property
    def first_frame(self) -> float:
        """Seconds from the first sample to the film's first frame."""
        return (_EARLIEST + self.late) / RATE + _START


def draw_ride(draw: Draw) -> Ride:
    """Draw a film of one thing that moves, and a ride on it."""
    return Ride(draw_film(draw, ["moves"]), draw.choice(TURNS), draw.below(40), draw.below(1 << 20))


def split_of_ride(ride: Ride) -> str:
    """``"train"`` or ``"test"``: there are only 24 kinds of rides, so they are told apart by what varies as well."""
    return split_of("ride", ride)


@dataclass(frozen=True)
class Recording:
    """A recording that is made only when asked for. Cheap to hold, hash and pickle."""

    ride: Ride

    @property
    def rate(self) -> int:
        """Samples per second."""
        return RATE

    def load(self) -> np.ndarray:
        """float32 (NUM_SAMPLES, 6): acceleration in m/s^2, angular rate in rad/s, in the sensor's axes."""
        return record(self.ride)

    def fingerprint(self) -> str:
        """What decides the samples."""
        return repr(self.ride)


def record(ride: Ride) -> np.ndarray:
    """What the sensors feel, float32 (NUM_SAMPLES, 6)."""
    time = np.arange(NUM_SAMPLES) / RATE - ride.first_frame + _START  # since it sets off
    begin, end = time.clip(0, _START) / _START, (time - _START - _WHILE).clip(0, _START) / _START
    pace = (1 - np.cos(math.pi * begin)) / 2 - (1 - np.cos(math.pi * end)) / 2  # of the film's speed
    gain = math.pi / (2 * _START) * (np.sin(math.pi * begin) - np.sin(math.pi * end))
    way = (
        _START * (_ramp(begin) - _ramp(end))
        + (time - _START).clip(0, None)
        - (time - 2 * _START - _WHILE).clip(0, None)
    )

    sign = {"left": 1, "right": -1, "": 0}[ride.turn]
    angle = sign * _TURN * way
    along = gain * _speed(ride)
    east, north = (along, 0 * along) if ride.film.axis == "horizontal" else (0 * along, along)
    felt = np.zeros((NUM_SAMPLES, 6))
    # the sensor's axes have turned by the angle, so what it feels has turned the other way
    felt[:, 0] = np.cos(angle) * east + np.sin(angle) * north
    felt[:, 1] = np.cos(angle) * north - np.sin(angle) * east
    felt[:, 2] = GRAVITY
    felt[:, 5] = sign * _TURN * pace
    hiss = noise(ride.hiss, felt.size).reshape(felt.shape) * np.repeat(_NOISE, 3)
    return (np.rint((felt + hiss) * _STEPS) / _STEPS).astype(np.float32)


def _ramp(part: np.ndarray) -> np.ndarray:
    """The integral of half a cosine's rise from 0 to ``part`` of it."""
    return part / 2 - np.sin(math.pi * part) / (2 * math.pi)


def _speed(ride: Ride) -> float:
    """Meters per second along the film's axis, to the right or up."""
    first, second = ride.actor.at(0), ride.actor.at(1)
    assert first is not None
    assert second is not None
    pixels = second - first
    return pixels * METERS_PER_PIXEL / (FRAME_MS / 1000) * (1 if ride.film.axis == "horizontal" else -1)
