"""Going through a data file once, before a run does: count what is there, decode all media, list what is bad."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from alula.bounds import DEFAULT_MAX_PIXELS
from alula.data.errors import BadSampleError, Place, PlaceholderError, RecordError, UnsupervisedError
from alula.data.images import ImageRef
from alula.data.samples import MEDIA, Sample, Source, decoded, parts
from alula.data.sources import FileLike, open_file
from alula.errors import AlulaError, UsageError
from alula.jobs import end_with_parent

_CHUNK = 64
_COUNTED = ("image", "video", "audio")  # by fields of their own
_MEASURED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "points": lambda points: points[:, :3],
    "depth": lambda meters: meters[meters > 0],
    "normals": lambda vectors: vectors,
    "motion": lambda samples: np.linalg.norm(samples[:, :3], axis=1),
    "response": lambda voxels: voxels,
}
"""Medium -> those of its values that tell a wrong unit"""
_UNITS = ("unit", "scale", "rate", "acceleration", "rotation", "time", "colors")
"""Options that say in which units a file is"""
_REMEMBERED = 100_000  # pictures; each takes some hundred bytes of memory
_WORTH_A_PROCESS = 256  # records; starting a process takes as long as decoding some hundred small images

Progress = Callable[[int, int], None]
"""Called with the number of records done and their total."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """One unusable record: where it stands, the cause in a word (``kind``), and the reason in a sentence."""

    file: str
    line: int | None
    unit: str
    id: str | None
    kind: str
    reason: str

    def __str__(self) -> str:
        place = Place(self.file, self.line, self.id, self.unit)
        return f"{place}: {self.kind}: {self.reason}" + (f" (record {place.named})" if place.named else "")


@dataclass(slots=True)
class CheckReport:
    """What a file holds.

    Attributes:
        file: its path.
        samples: records, bad ones included.
        text_only: usable samples without media.
        images: images of all records whose structure could be read, mismatched ones included.
        videos, audios: likewise videos and audio clips.
        others: likewise other media, by their names.
        said: how often records and sources said what of them, such as ``unit: mm``; by medium.
        extents: their least and largest values, of those that are known: meters of depth, coordinates of points,
            lengths of accelerations in m/s^2, values of normals and responses; by medium.
        placeholders: places for them.
        turns: messages by role, of usable samples.
        bad: the unusable records, in file order.
        seconds: how long it took.
    """

    file: str
    samples: int = 0
    text_only: int = 0
    images: int = 0
    videos: int = 0
    audios: int = 0
    others: Counter[str] = field(default_factory=Counter)
    said: dict[str, Counter[str]] = field(default_factory=dict)
    extents: dict[str, tuple[float, float]] = field(default_factory=dict)
    placeholders: int = 0
    turns: Counter[str] = field(default_factory=Counter)
    bad: list[BadRecord] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.bad

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        said = {medium: dict(count) for medium, count in self.said.items()}
        counted = {"turns": dict(self.turns), "others": dict(self.others), "said": said}
        return {**asdict(replace(self, said={})), **counted, "ok": self.ok}

    def _measure(self, medium: str, ref: Any, values: Any) -> None:
        if medium not in _MEASURED:
            return
        given = {option.name: getattr(ref, option.name) for option in fields(ref) if option.name in ref.options}
        told = [f"{name}: {value}" for name, value in given.items() if name in _UNITS and value is not None]
        self.said.setdefault(medium, Counter())[", ".join(told) or "nothing"] += 1
        values = _MEASURED[medium](values)
        self._widen(medium, (float(values.min()), float(values.max())))

    def _widen(self, medium: str, extent: tuple[float, float]) -> None:
        low, high = self.extents.get(medium, extent)
        self.extents[medium] = min(low, extent[0]), max(high, extent[1])

    def _count(self, medium: str, items: int) -> None:
        if medium in _COUNTED:
            setattr(self, f"{medium}s", getattr(self, f"{medium}s") + items)
        elif items:
            self.others[medium] += items

    def _add(self, other: CheckReport) -> None:
        self.samples += other.samples
        self.text_only += other.text_only
        self.images += other.images
        self.videos += other.videos
        self.audios += other.audios
        self.others += other.others
        for medium, said in other.said.items():
            self.said.setdefault(medium, Counter()).update(said)
        for medium, extent in other.extents.items():
            self._widen(medium, extent)
        self.placeholders += other.placeholders
        self.turns += other.turns
        self.bad += other.bad


def check(
    path: str | os.PathLike[str],
    *,
    form: str = "auto",
    images: str | os.PathLike[str] | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    reading: Mapping[str, Mapping[str, Any]] | None = None,
    answers: str | os.PathLike[str] | None = None,
    prompts: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    workers: int = 0,
    progress: Progress | None = None,
) -> CheckReport:
    """Read every record and decode every medium of a data file or dataset folder.

    Args:
        path: what `open_file` opens.
        form: a name of `alula.data.sources.FORMS`.
        images: folder relative image paths start from; default: beside the file.
        split: of a dataset that holds several.
        columns: alula's name of a column -> its name in the file.
        reading: how media are read where records do not say it: medium -> option -> value.
        answers: the annotations that answer the questions of a VQA file.
        prompts: the records are prompts for evaluation, which need no assistant turn.
        max_pixels: largest image accepted.
        workers: processes to decode in; 0 or 1: this one. They are spawned, so a script that asks for some needs
            ``if __name__ == "__main__":``.
        progress: called now and then.

    Raises:
        DataError, UsageError: the file as a whole cannot be read.
    """
    began = time.perf_counter()
    source = open_file(
        path,
        form=form,
        images=images,
        max_pixels=max_pixels,
        split=split,
        columns=columns,
        answers=answers,
        reading=reading,
    )
    report = CheckReport(file=os.fspath(path))
    for part in _parts(source, prompts, workers):
        report._add(part)
        if progress is not None:
            progress(report.samples, source.size)
    report.seconds = time.perf_counter() - began
    return report


def check_source(source: Source, most: int) -> CheckReport:
    """Read at most so many records of an open source, spread evenly from its first to its last, and decode their media.

    Raises:
        UsageError: it has no end.
    """
    if source.size is None:
        raise UsageError("the source has no end", where=source.name, remedy="set `limit` on it")
    began, read = time.perf_counter(), min(source.size, most)
    report = CheckReport(file=source.name)
    spread = [step * (source.size - 1) // max(read - 1, 1) for step in range(read)]
    report._add(_check_chunk(source, spread, prompts=False, whole=set()))
    report.seconds = time.perf_counter() - began
    return report


def _parts(source: FileLike, prompts: bool, workers: int) -> Iterator[CheckReport]:
    chunks = [range(first, min(first + _CHUNK, source.size)) for first in range(0, source.size, _CHUNK)]
    workers = min(workers, source.size // _WORTH_A_PROCESS)
    if workers <= 1:
        whole: set[ImageRef] = set()
        yield from (_check_chunk(source, chunk, prompts, whole) for chunk in chunks)
        return
    # spawned, not forked: a progress display in the parent runs a thread
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_open, initargs=(source,)) as pool:
        yield from pool.map(_check_opened, chunks, [prompts] * len(chunks))


_opened: list[tuple[FileLike, set[ImageRef]]] = []
"""The source a worker process was started for, and the pictures that it found whole."""


def _open(source: FileLike) -> None:
    end_with_parent()
    _opened[:] = [(source, set())]


def _check_opened(chunk: range, prompts: bool) -> CheckReport:
    source, whole = _opened[0]
    return _check_chunk(source, chunk, prompts, whole)


def _check_chunk(source: Source, chunk: Iterable[int], prompts: bool, whole: set[ImageRef]) -> CheckReport:
    report = CheckReport(file="")
    for index in chunk:
        report.samples += 1
        try:
            _check_record(source[index], prompts, report, whole)
        except PlaceholderError as error:
            report.placeholders += error.counts[0]
            report._count(error.medium, error.counts[1])
            report.bad.append(_bad([error]))
        except BadSampleError as error:
            report.bad.append(_bad([error]))
        except (AlulaError, MemoryError):
            raise
        except Exception as error:  # a record that nobody thought of must not hide what is wrong with the others
            place = source.place(index) if isinstance(source, FileLike) else Place(source.name, index, unit="item")
            told = RecordError(f"cannot be read ({type(error).__name__}: {error})", place=place)
            report.bad.append(_bad([told]))
    return report


def _check_record(sample: Sample, prompts: bool, report: CheckReport, whole: set[ImageRef]) -> None:
    for medium in MEDIA:
        report._count(medium, len(sample.media(medium)))
    report.placeholders += len(sample.media())
    faults = list(_faults(sample, prompts, report, whole))
    if faults:
        report.bad.append(_bad(faults))
        return
    report.text_only += not sample.media()
    report.turns.update(message["role"] for message in sample.messages)


def _faults(sample: Sample, prompts: bool, report: CheckReport, whole: set[ImageRef]) -> Iterator[BadSampleError]:
    assert sample.place is not None
    answers = [message for message in sample.messages if message["role"] == "assistant"]
    if not prompts and not answers:
        yield UnsupervisedError("no assistant turn, so nothing to learn from", place=sample.place)
    elif not prompts and not any(message.get("train", True) for message in answers):
        yield UnsupervisedError("no token to learn from: no answer is to be learnt", place=sample.place)
    for part in parts(sample.messages):
        try:
            if part["type"] == "image":
                _verify(part["image"], whole)
                continue
            made = decoded(part, lambda medium: {})
        except BadSampleError as error:
            yield error.at(sample.place)
        else:
            report._measure(part["type"], part.get(part["type"]), made.get(part["type"]))


def _verify(image: ImageRef, whole: set[ImageRef]) -> None:
    """Raise what is wrong with a picture, unless it is among those found whole: several records may name it."""
    if image in whole:
        return
    image.verify()
    if image.paths and len(whole) < _REMEMBERED:
        whole.add(image)


def _bad(faults: list[BadSampleError]) -> BadRecord:
    place = faults[0].place
    assert place is not None
    reasons = "; ".join(error.message + (f" ({error.remedy})" if error.remedy else "") for error in faults)
    return BadRecord(place.file, place.line, place.unit, place.record, faults[0].kind, reasons)
