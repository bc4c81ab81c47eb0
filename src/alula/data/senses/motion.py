"""Motion as references: what an accelerometer and a gyroscope felt, read where it is needed at the rate a model wants.

A recording is CSV whose first line names the columns, or NPY (samples, 6). Names of columns are those people give them
(`ax`, `acc_x`, `accel_x`, `accelerometer_x`; `gx`, `gyro_x`, `wx` ...), a unit in brackets or behind a space included
(`ax (g)`). Rates come from a column of times or are said.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from alula.data.errors import BadSampleError, MotionError
from alula.data.media import LoadableArray, MediaRef
from alula.data.senses.arrays import is_npy, open_npy
from alula.data.senses.axes import check_axes, handedness, turned
from alula.errors import quoted

ACCELERATIONS = {"m/s^2": 1.0, "g": 9.80665, "mg": 0.00980665}
ROTATIONS = {"rad/s": 1.0, "deg/s": math.pi / 180}
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}

MOST_SAMPLES = 2_000_000
"""Longest recording, or stretch of one, that is read: nearly three hours at 200 a second."""
RATES = 5.0, 20_000.0
"""Fewest and most samples per second of a recording."""
MOST_ACCELERATION = 5000.0
"""Largest acceleration that is taken for one, in m/s^2: sensors of impacts end there"""
MOST_ROTATION = 150.0
"""Fastest rotation that is taken for one, in rad/s: gyroscopes end at 4,000 deg/s, which is 70"""

_LOST = 0.05
"""Share of samples that may be missing; they are drawn in between the others"""
_GAP = 1.0
"""Longest time without a sample, or with samples that are missing, in seconds"""
_JITTER = 0.2
"""How far from the mean the time between two samples may be, as a share of it, before all are put on an even grid"""
_AGREES = 0.02
_SNAPS = 0.001

_ACCELEROMETER = ("a", "acc", "accel", "acceleration", "accelerometer", "linear acceleration")
_GYROSCOPE = ("g", "gyr", "gyro", "gyroscope", "w", "omega", "angular velocity", "rotation")
# before a name there may be those of what it is a field of: field.linear_acceleration.x, /imu/angular_velocity/x
_AXIS = re.compile(f"^(?:[%a-z0-9 ./]*[./])?({'|'.join((*_ACCELEROMETER, *_GYROSCOPE))})([ ./-]*)([xyz])$")
_TIME = re.compile(r"^[%_]{0,2}(t|time|times|timestamp|timestamps|seconds|elapsed)$")
_ROS = {"linear acceleration": "m/s^2", "angular velocity": "rad/s"}
"""units of fields of ROS's sensor_msgs/Imu, which has no others"""
_UNIT = re.compile(r"[ _]*[\[(]([^\])]*)[\])]\s*$|[ _](m/s\^?2|m/s²|mg|g|rad/s|deg/s|°/s|dps|s|ms|us|µs|ns)$")
_SAME = {
    "m/s2": "m/s^2", "m/s²": "m/s^2", "°/s": "deg/s", "dps": "deg/s", "deg/sec": "deg/s", "rad/sec": "rad/s",
    "µs": "us", "sec": "s", "seconds": "s",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MotionRef(MediaRef):
    """A motion recording not yet read. Make one with ``from_path``, ``from_bytes`` or ``from_object``.

    Attributes:
        rate: samples per second of what is stored; None: a column of times says it.
        acceleration, rotation: units of what is stored, keys of `ACCELERATIONS` and `ROTATIONS`; None: the names of
            columns say it.
        time: unit of the times, a key of `TIMES`; None: as a column's name says, or seconds.
        axes: where x, y and z are in the file, of both sensors.
        start, seconds: the stretch that is meant; None: from the beginning, to the end.
    """

    noun: ClassVar[str] = "motion recording"
    error: ClassVar[type[BadSampleError]] = MotionError
    decoding: ClassVar[str] = "1"
    options: ClassVar[tuple[str, ...]] = ("rate", "acceleration", "rotation", "time", "axes", "start", "seconds")

    rate: float | None = None
    acceleration: str | None = None
    rotation: str | None = None
    time: str | None = None
    axes: str = "xyz"
    start: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_axes(self.axes, MotionError)
        for name, value, least in (("rate", self.rate, 0), ("start", self.start, None), ("seconds", self.seconds, 0)):
            if value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or value == least:
                raise MotionError(f"{name}: {quoted(value, 40)} is no number above 0")
        if self.rate is not None and not RATES[0] <= self.rate <= RATES[1]:
            raise MotionError(f"rate: {self.rate:g} is not between {RATES[0]:g} and {RATES[1]:,.0f} samples a second")
        for name, unit, known in (
            ("acceleration", self.acceleration, ACCELERATIONS),
            ("rotation", self.rotation, ROTATIONS),
            ("time", self.time, TIMES),
        ):
            if unit is not None and unit not in known:
                raise MotionError(f"{name}: {quoted(unit, 40)} is no unit of it", remedy=f"one of {', '.join(known)}")

    @classmethod
    def from_object(cls, value: Any) -> MotionRef:
        """A ``MotionRef`` (returned as it is), or anything with ``load()`` and ``rate``: (samples, 6) in m/s^2, rad/s.

        Raises:
            MotionError: ``value`` is neither.
        """
        if isinstance(value, MotionRef):
            return value
        if isinstance(value, LoadableArray) and isinstance(getattr(value, "rate", None), int | float):
            units = {"acceleration": "m/s^2", "rotation": "rad/s"}
            return cls._from_loadable(value, rate=value.rate, **units)  # type: ignore[attr-defined]
        raise MotionError(
            f"a motion recording cannot be made from {type(value).__name__}", remedy="give an alula.data.MotionRef"
        )

    def load(self, rate: float | None = None) -> np.ndarray:
        """Read the recording. Few samples that are lost (NaN, empty) are drawn in between their neighbors.

        Args:
            rate: samples per second of the result; None: as stored.

        Returns:
            float32 (samples, 6): acceleration in m/s^2, angular rate in rad/s.

        Raises:
            MotionError: missing, empty, of a format that is not read or without names of its columns; without a rate,
                or with one that its times contradict; times that do not rise; without units; many samples lost; more
                acceleration or rotation than there is, or a recording that is too long.
        """
        values, stored = self._stored()
        values = self._filled(values, stored)
        for name, part, most, unit in (
            ("acceleration", values[:, :3], MOST_ACCELERATION, "m/s^2"),
            ("rotation", values[:, 3:], MOST_ROTATION, "rad/s"),
        ):
            peak = np.abs(part).max()
            if peak > most:
                raise MotionError(
                    f"{self.told} holds {name} of {peak:,.0f} {unit}, more than {most:,.0f}",
                    remedy=f"say in which unit it is stored: {name}: {'mg' if name == 'acceleration' else 'deg/s'}",
                )
        if rate is not None and rate != stored:
            values = _resampled(values, stored, rate)
        rates = turned(values[:, 3:], self.axes) * handedness(self.axes)
        values = np.concatenate([turned(values[:, :3], self.axes), rates], axis=1)
        return values.astype(np.float32)

    def _stored(self) -> tuple[np.ndarray, float]:
        """The stretch that is meant, (samples, 6) in m/s^2 and rad/s, and its rate."""
        if self.maker is not None:
            return self._stretch(self._checked(np.asarray(self.maker())), self._said_rate(), {})
        source = self._stream()
        with open(source, "rb") if isinstance(source, str) else io.BytesIO(source.getvalue()) as file:
            if not is_npy(file.read(8)):
                file.seek(0)
                return self._table(file)
        array = self._checked(open_npy(source, told=self.told, error=MotionError))
        return self._stretch(array, self._said_rate(), {})

    def _checked(self, array: np.ndarray) -> np.ndarray:
        if array.ndim == 2 and array.shape[1] == 6 and len(array):
            return array
        flipped = array.ndim == 2 and array.shape[0] == 6
        raise MotionError(
            f"{self.told} has the shape {array.shape}, not (samples, 6)",
            remedy="transpose it: numpy.save(FILE, array.T)"
            if flipped
            else "save three accelerations and three angular rates a sample; times are kept in CSV",
        )

    def _said_rate(self) -> float:
        if self.rate is None:
            raise MotionError(f"{self.told} does not say its rate", remedy="say it beside the recording: rate: 200")
        return self.rate

    # -- CSV ----------------------------------------------------------------------------------------------------------

    def _table(self, file: Any) -> tuple[np.ndarray, float]:
        names, rows = self._rows(file)
        places: dict[tuple[str, str], int] = {}
        times, units = None, {}
        for place, name in enumerate(names):
            bare, unit = _parted(name)
            if _TIME.match(bare):
                times, units["time"] = place, "ns" if unit is None and bare == "%time" else unit  # as rostopic writes
            elif (found := _AXIS.match(bare.replace("_", " "))) is not None:
                sensor = "acceleration" if found[1] in _ACCELEROMETER else "rotation"
                if (sensor, found[3]) in places:
                    raise MotionError(f"{self.told} has two columns of {sensor} along {found[3]}", remedy="keep one")
                places[sensor, found[3]] = place
                if unit is None and found[2] in (".", "/"):
                    unit = _ROS.get(found[1])
                if units.setdefault(sensor, unit) != unit:
                    raise MotionError(f"{self.told} names two units of {sensor}: {units[sensor]} and {unit}")
        missing = [(sensor, axis) for sensor in ("acceleration", "rotation") for axis in "xyz"]
        missing = [one for one in missing if one not in places]
        if missing:
            raise MotionError(
                f"{self.told} has no column of {missing[0][0]} along {missing[0][1]}; it has "
                f"{', '.join(quoted(name, 40) for name in names[:20])}",
                remedy="name its columns in the first line: t,ax,ay,az,gx,gy,gz",
            )
        if not len(rows):
            raise MotionError(f"{self.told} holds no samples")
        values = rows[:, [places[sensor, axis] for sensor in ("acceleration", "rotation") for axis in "xyz"]]
        if times is None:
            return self._stretch(values, self._said_rate(), units)
        return self._stretch(*self._timed(values, rows[:, times], units.get("time")), units)

    def _rows(self, file: Any) -> tuple[list[str], np.ndarray]:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            start = text.readline()
            divider = max(",;\t", key=start.count)
            names = [name.strip() for name in next(csv.reader([start], delimiter=divider), [])]
            rows: list[list[float]] = []
            for row in csv.reader(text, delimiter=divider):
                if not any(map(str.strip, row)):
                    continue
                if len(row) != len(names):
                    raise MotionError(
                        f"{self.told}, sample {len(rows) + 1}: {len(row)} values for {len(names)} columns"
                    )
                rows.append([_number(cell) for cell in row])
                if len(rows) > MOST_SAMPLES:
                    raise MotionError(
                        f"{self.told} holds more than {MOST_SAMPLES:,} samples",
                        remedy="cut it, or save it as NPY, of which a stretch is read alone (start, seconds)",
                    )
        except (UnicodeDecodeError, csv.Error, ValueError) as error:
            told = f"no text: {error}" if isinstance(error, UnicodeDecodeError) else str(error)
            raise MotionError(
                f"{self.told} is neither CSV nor NPY: {told}",
                remedy="the first line names the columns, the others hold numbers: t,ax,ay,az,gx,gy,gz",
            ) from None
        return names, np.array(rows, dtype=np.float64).reshape(-1, len(names))

    def _timed(self, values: np.ndarray, times: np.ndarray, unit: str | None) -> tuple[np.ndarray, float]:
        """Samples on an even grid, and the rate that their times tell."""
        if len(times) < 2:
            raise MotionError(f"{self.told} holds one sample, whose times tell no rate")
        if not np.isfinite(times).all():
            raise MotionError(f"{self.told} lacks times of samples", remedy="leave such samples out")
        if self.time is not None and unit is not None and self.time != unit:
            raise MotionError(f"{self.told} says that times are in {unit}, and time: {self.time} is given")
        unit = self.time or unit
        times = (times - times[0]) * TIMES[unit or "s"]
        steps = np.diff(times)
        if (steps <= 0).any():
            place = int(np.argmax(steps <= 0)) + 2
            raise MotionError(
                f"{self.told}, sample {place}: its time is not after that of the one before",
                remedy="sort the samples, and leave out those that stand twice",
            )
        rate = (len(times) - 1) / times[-1]
        if not RATES[0] <= rate <= RATES[1]:
            raise MotionError(
                f"{self.told} has {rate:,.4g} samples a second by its times, taken as {unit or 's'}",
                remedy="say in which unit they are: time: ms (or us, ns)",
            )
        if self.rate is not None and abs(self.rate / rate - 1) > _AGREES:
            raise MotionError(
                f"{self.told} has {rate:,.4g} samples a second by its times, and rate: {self.rate:g} is given",
                remedy="leave `rate` out",
            )
        if steps.max() > _GAP:
            place = int(np.argmax(steps)) + 1
            raise MotionError(
                f"{self.told} has no sample for {steps.max():.3g} seconds behind sample {place}",
                remedy="cut it there into two recordings",
            )
        if np.abs(steps * rate - 1).max() > _JITTER:
            even = np.arange(len(times)) / rate
            values = np.stack([np.interp(even, times, column) for column in values.T], axis=1)
        whole = round(rate)
        return values, float(whole) if whole and abs(rate / whole - 1) < _SNAPS else float(rate)

    # -- values ---------------------------------------------------------------------------------------------------

    def _stretch(self, values: np.ndarray, rate: float, units: Mapping[str, str | None]) -> tuple[np.ndarray, float]:
        first = round((self.start or 0) * rate)
        count = len(values) - first if self.seconds is None else round(self.seconds * rate)
        if count < 1 or first + count > len(values):
            raise MotionError(
                f"{self.told} lasts {len(values) / rate:.2f} seconds at {rate:g} samples a second, and "
                f"{self.seconds or 'more'} from {self.start or 0} on are asked for",
                remedy="start and seconds are of the recording",
            )
        if count > MOST_SAMPLES:
            raise MotionError(
                f"{self.told} holds {count:,} samples, more than {MOST_SAMPLES:,}",
                remedy="read a stretch of it: start: 0, seconds: 60",
            )
        taken = np.asarray(values[first : first + count], dtype=np.float64)
        scales = [
            self._scale(sensor, units.get(sensor), known)
            for sensor, known in (("acceleration", ACCELERATIONS), ("rotation", ROTATIONS))
        ]
        return taken * np.repeat(scales, 3), rate

    def _scale(self, sensor: str, named: str | None, known: Mapping[str, float]) -> float:
        given: str | None = getattr(self, sensor)
        if named is not None and named not in known:
            raise MotionError(f"{self.told}: {quoted(named, 40)} is no unit of {sensor}", remedy=", ".join(known))
        if given is not None and named is not None and given != named:
            raise MotionError(f"{self.told} says that {sensor} is in {named}, and {sensor}: {given} is given")
        unit = given or named
        if unit is None:
            raise MotionError(
                f"{self.told} does not say in which unit {sensor} is",
                remedy=f"say it beside the recording: {sensor}: {' or '.join(known)}",
            )
        return known[unit]

    def _filled(self, values: np.ndarray, rate: float) -> np.ndarray:
        lost = ~np.isfinite(values)
        if not lost.any():
            return values
        share = lost.any(axis=1).mean()
        if share > _LOST:
            raise MotionError(
                f"{self.told} lacks values of {share:.0%} of its samples (NaN or empty), more than {_LOST:.0%}",
                remedy="cut out the stretch that is whole",
            )
        whole = np.flatnonzero(np.concatenate([[True], ~lost.any(axis=1), [True]]))
        behind = int(np.argmax(np.diff(whole)))
        if (gap := (whole[behind + 1] - whole[behind] - 1) / rate) > _GAP:
            raise MotionError(
                f"{self.told} lacks values for {gap:.3g} seconds behind sample {whole[behind]}",
                remedy="cut it there into two recordings",
            )
        places = np.arange(len(values))
        columns = [
            np.interp(places, places[~gone], column[~gone]) for column, gone in zip(values.T, lost.T, strict=True)
        ]
        return np.stack(columns, axis=1)


def _number(cell: str) -> float:
    cell = cell.strip()
    return float(cell) if cell else math.nan


def _parted(name: str) -> tuple[str, str | None]:
    """The name of a column without its unit, and the unit."""
    name = name.strip().casefold()
    found = _UNIT.search(name)
    if found is None:
        return name, None
    unit = (found[1] if found[1] is not None else found[2]).strip()
    return name[: found.start()].strip(), _SAME.get(unit, unit)


def _resampled(values: np.ndarray, stored: float, rate: float) -> np.ndarray:
    """At another rate, by polyphase filtering; what lasts as long has as many samples as it should."""
    from scipy.signal import resample_poly  # slow to import, and rarely needed

    ratio = (Fraction(rate).limit_denominator(100_000) / Fraction(stored).limit_denominator(100_000)).limit_denominator(
        1000
    )
    wanted = max(1, round(len(values) * rate / stored))
    if len(values) == 1:  # nothing to filter
        return np.repeat(values, wanted, axis=0)
    # the mean is taken off first: phases of the filter differ by a thousandth, of gravity as much as much motion is;
    # a recording goes on as a line, since nothing ends where it does
    middle = values.mean(axis=0)
    made = resample_poly(values - middle, ratio.numerator, ratio.denominator, axis=0, padtype="line") + middle
    return made[:wanted]
