"""Weighted mixtures whose every position can be computed: resuming a run needs nothing but its step count.

``mixture[n]`` is a pure function of the seed and ``n``. Positions are dealt to the sources in blocks of 256: after any
whole number of blocks each source has had its share to within a sample or so (Webster's apportionment, which never
takes a dealt sample back), and within a block it is shuffled whose turn it is, so that no period can fall in step with
the number of processes. A source is gone through once per epoch, in an order reshuffled every epoch: sample by sample,
or by runs of samples that stand in a row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

from alula.data.errors import BadSampleError, RecordError
from alula.data.quarantine import Quarantine
from alula.data.samples import Sample, parts
from alula.data.sources import Source, open_source
from alula.data.specs import FileSpec, MixtureSpec, SourceSpec, validated
from alula.draws import mixed, shuffled_runs
from alula.errors import DataError, UsageError
from alula.media import MEDIA

_BLOCK = 256
_MOST_SPARES = 100


class Mixture:
    """An endless deterministic stream over weighted sources, map-style; picklable.

    Args:
        sources: what to draw from.
        weights: their shares, relative; equal by default.
        runs: of each source how many samples that stand in a row are drawn together; 1 by default.
        seed: another seed, another order.
        quarantine: where unusable records go, replaced by other draws of the same source; None: they raise.

    Raises:
        UsageError: no source, an empty source, weights that are not positive numbers, one per source, or runs longer
            than their source, or of one that has no end and is not shuffled.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        *,
        runs: Sequence[int] | None = None,
        seed: int = 0,
        quarantine: Quarantine | None = None,
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        runs = [1] * len(sources) if runs is None else list(runs)
        if not sources or len(weights) != len(sources):
            raise UsageError(f"a mixture needs one weight per source, got {len(sources)} and {len(weights)}")
        if len(runs) != len(sources):
            raise UsageError(f"a mixture needs one length of runs per source, got {len(sources)} and {len(runs)}")
        for source, weight, run in zip(sources, weights, runs, strict=True):
            if not (weight > 0 and math.isfinite(weight)):
                raise UsageError(f"the weight of a source must be a positive number, not {weight}", where=source.name)
            _drawable(source, run, where=source.name)
        self.sources = list(sources)
        self.shares = [weight / math.fsum(weights) for weight in weights]
        self.runs = runs
        self.seed = seed
        self.quarantine = quarantine

    @classmethod
    def with_text_replay(
        cls,
        sources: Sequence[Source],
        replay: Sequence[Source],
        ratio: float,
        *,
        weights: Sequence[float] | None = None,
        replay_weights: Sequence[float] | None = None,
        runs: Sequence[int] | None = None,
        replay_runs: Sequence[int] | None = None,
        seed: int = 0,
        quarantine: Quarantine | None = None,
    ) -> Mixture:
        """A mixture in which the fraction ``ratio`` of all samples comes from the text-only sources ``replay``.

        A replay sample that turns out to hold an image is a ``RecordError``.

        Raises:
            UsageError: ``ratio`` outside [0, 1), or no replay source for a ratio above 0.
        """
        if not 0 <= ratio < 1:
            raise UsageError(f"the text replay ratio must be in [0, 1), not {ratio}")
        main = cls(sources, weights, runs=runs, seed=seed, quarantine=quarantine)
        if ratio == 0:
            return main
        text = cls(replay, replay_weights, runs=replay_runs)
        return cls(
            [*main.sources, *map(_TextOnly, text.sources)],
            [*(share * (1 - ratio) for share in main.shares), *(share * ratio for share in text.shares)],
            runs=[*main.runs, *text.runs],
            seed=seed,
            quarantine=quarantine,
        )

    def __getitem__(self, position: int) -> Sample:
        """The sample at a global position (0, 1, 2, ... without end), images undecoded.

        Raises:
            BadSampleError: its record is unusable and there is no quarantine.
        """
        if position < 0:
            raise IndexError(position)
        try:
            return self._read(position, attempt=0)
        except BadSampleError as error:
            if self.quarantine is None:
                raise
            self.quarantine.add(error)
        return self.replacement(position)

    def replacement(self, position: int, attempt: int = 1) -> Sample:
        """Another sample of the source drawn at ``position``: its first readable spare from ``attempt`` on.

        Spares are a function of seed, position and attempt, so a resumed run meets the same ones. Readers of the
        mixture that find a sample unusable later (its image does not decode, it is too long) ask here with rising
        ``attempt``.

        Raises:
            DataError: a hundred spares in a row are unusable.
        """
        while attempt <= _MOST_SPARES:
            try:
                return self._read(position, attempt)
            except BadSampleError as error:
                if self.quarantine is None:
                    raise
                self.quarantine.add(error)
            attempt += 1
        source = self.sources[self.draw(position)[0]]
        raise DataError(
            f"{_MOST_SPARES} replacements of a bad sample were bad too",
            where=source.name,
            remedy="look at the data with `alula data check`",
        )

    def draw(self, position: int, attempt: int = 0) -> tuple[int, int]:
        """Which source and which of its samples ``position`` holds: ``(source number, index)``."""
        number, count = _block(tuple(self.shares), self.seed, position // _BLOCK)[position % _BLOCK]
        size = self.sources[number].size
        if size is None:
            return number, count + attempt
        if attempt:
            return number, mixed(self.seed, number, position, attempt) % size
        epoch, index = divmod(count, size)
        return number, shuffled_runs(index, size, self.runs[number], self.seed, number, epoch)

    def window(self, length: int, start: int = 0) -> Window:
        """Positions ``start .. start + length - 1`` as a dataset with an end."""
        return Window(self, length, start)

    def _read(self, position: int, attempt: int) -> Sample:
        number, index = self.draw(position, attempt)
        return replace(self.sources[number][index], position=position)


class Stream(Protocol):
    """Samples by position, without end."""

    def __getitem__(self, position: int, /) -> Sample: ...


class Window:
    """A stretch of a mixture as a finite map-style dataset for ``torch.utils.data.DataLoader`` or the HF Trainer.

    Read in order (no shuffling sampler), optimizer step ``t`` of a global batch of ``G`` samples sees positions
    ``t * G ... (t + 1) * G - 1``.
    """

    def __init__(self, mixture: Stream, length: int, start: int = 0) -> None:
        if length < 0 or start < 0:
            raise UsageError(f"a window needs length and start of at least 0, not {length} and {start}")
        self.mixture, self.length, self.start = mixture, length, start

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.mixture[self.start + index]


class PositionBatches:
    """Batch sampler over mixture positions for one rank: the global batch is the same on any number of processes.

    Optimizer step ``t`` holds positions ``t * G ... (t + 1) * G - 1``; rank ``r`` of ``w`` takes the ``r``-th of ``w``
    contiguous slices, in micro-batches of at most ``micro_batch``. Pass it as ``batch_sampler`` with the mixture itself
    as the dataset.

    Args:
        steps: optimizer steps until the end of the run.
        global_batch: samples per step over all ranks, G.
        start: step to begin with (the step count of the checkpoint).
        micro_batch: samples per forward; default: the rank's whole slice.

    Raises:
        UsageError: the global batch does not divide by the number of ranks.
    """

    def __init__(
        self,
        steps: int,
        global_batch: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
    ) -> None:
        if global_batch < 1 or world < 1 or not 0 <= rank < world or not 0 <= start <= steps:
            raise UsageError(f"impossible batches: {steps=} {global_batch=} {start=} {rank=} {world=}")
        if global_batch % world:
            raise UsageError(
                f"a global batch of {global_batch} does not divide among {world} processes",
                remedy=f"use a multiple of {world}",
            )
        self.steps, self.start, self.global_batch = steps, start, global_batch
        self.rank, self.slice = rank, global_batch // world
        self.micro_batch = self.slice if micro_batch is None else micro_batch
        if self.micro_batch < 1:
            raise UsageError(f"a micro-batch needs at least one sample, not {micro_batch}")

    def __len__(self) -> int:
        return (self.steps - self.start) * -(-self.slice // self.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            first = step * self.global_batch + self.rank * self.slice
            for offset in range(0, self.slice, self.micro_batch):
                yield list(range(first + offset, first + min(offset + self.micro_batch, self.slice)))


def open_mixture(
    spec: Mapping[str, Any] | MixtureSpec,
    *,
    base: str | os.PathLike[str] = ".",
    key: str = "data",
    quarantine: Quarantine | None = None,
) -> Mixture:
    """Open what a recipe calls a mixture: ``{"sources": [...], "text_replay": {"ratio", "sources"}, "seed"}``.

    Raises:
        RecipeError: an unknown key or illegal value, with its path below ``key`` and what is legal.
        DataError: a source is not there or unreadable as a whole.
    """
    checked = validated(MixtureSpec, spec, key=key) if isinstance(spec, Mapping) else spec
    replay = checked.text_replay
    return Mixture.with_text_replay(
        _opened(checked.sources, base, f"{key}.sources"),
        _opened(replay.sources, base, f"{key}.text_replay.sources") if replay else [],
        replay.ratio if replay else 0.0,
        weights=[source.weight for source in checked.sources],
        replay_weights=[source.weight for source in replay.sources] if replay else None,
        runs=_runs(checked.sources),
        replay_runs=_runs(replay.sources) if replay else None,
        seed=checked.seed,
        quarantine=quarantine,
    )


def _opened(specs: Sequence[SourceSpec], base: str | os.PathLike[str], key: str) -> list[Source]:
    opened = []
    for number, (spec, run) in enumerate(zip(specs, _runs(specs), strict=True)):
        opened.append(open_source(spec, base=base, key=f"{key}.{number}"))
        _drawable(opened[-1], run, where=f"{key}.{number}")  # a source's name alone would not say where in the recipe
    return opened


def _drawable(source: Source, run: int, *, where: str) -> None:
    """Refuse a source that holds nothing, or no ``run`` of samples."""
    if source.size == 0:
        raise UsageError("the source is empty", where=where)
    if run != 1 and not 0 < run <= (source.size or 0):
        held = "a source without end" if source.size is None else f"a source of {source.size}"
        remedy = "leave runs out" if source.size is None else "runs: how many records in a row are about one picture"
        raise UsageError(f"runs of {run} samples in {held}", where=where, remedy=remedy)


def _runs(specs: Sequence[SourceSpec]) -> list[int]:
    """Sources that are read from no files, whose specs have no such key, are drawn from one by one."""
    return [spec.runs if isinstance(spec, FileSpec) else 1 for spec in specs]


class _TextOnly:
    """A source that promises words and is held to it."""

    def __init__(self, source: Source) -> None:
        self.source, self.name = source, source.name

    @property
    def size(self) -> int | None:
        return self.source.size

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        held = next((part["type"] for part in parts(sample.messages) if part["type"] in MEDIA), None)
        if held is not None:
            raise RecordError(f"a text replay sample holds {MEDIA[held].a}", place=sample.place)
        return sample


@lru_cache(maxsize=64)
def _block(shares: tuple[float, ...], seed: int, block: int) -> tuple[tuple[int, int], ...]:
    """Block ``block`` of the stream: per position, the source and how many samples it gave before."""
    dealt = _dealt(shares, block)
    order = sorted(range(_BLOCK), key=lambda slot: mixed(seed, block, slot))
    # the turns are shuffled among the sources, but every source gives its samples in their order
    waiting = [iter([count for source, count in dealt if source == number]) for number in range(len(shares))]
    return tuple((dealt[slot][0], next(waiting[dealt[slot][0]])) for slot in order)


def _dealt(shares: tuple[float, ...], block: int) -> list[tuple[int, int]]:
    """Seats ``block * B ... (block + 1) * B - 1`` of Webster's apportionment of ``shares``.

    Source ``s`` takes its ``k``-th sample at time ``(k + 1/2) / share``; all these times in order are the stream. The
    earliest that can matter is known in closed form, so nothing before the block is gone through.
    """
    first, slack = block * _BLOCK, len(shares) + 1
    begun = [max(0, math.ceil((first - slack) * share - 0.5)) for share in shares]
    ended = [math.ceil((first + _BLOCK + slack) * share + 0.5) for share in shares]
    times = sorted(
        ((count + 0.5) / share, number, count)
        for number, share in enumerate(shares)
        for count in range(begun[number], ended[number])
    )
    skip = first - sum(begun)
    return [(number, count) for _, number, count in times[skip : skip + _BLOCK]]
