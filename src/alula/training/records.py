"""What a check reads of a run's data: records of every source of its stages and of what they are measured with, some of
long ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alula.data.check import BadRecord, CheckReport, check_source
from alula.data.samples import Sample
from alula.errors import DataError
from alula.training.datasets import RunData
from alula.training.recipe import Recipe, Stage

MOST_READ = 1000
"""of one source, which takes seconds with pictures; `alula data check` reads any number, in several processes"""
_TOLD = 3
"""Bad records that an error names."""


@dataclass(frozen=True)
class ReadSource:
    """What was read of one source.

    Attributes:
        key: its path in the recipe.
        size: records the run may use of it; None: it draws them without end, and none was read.
        read: records that were read, with their media, spread evenly over it.
        bad: those of them that cannot be learnt from.
    """

    key: str
    size: int | None
    read: int
    bad: tuple[BadRecord, ...]


def read_sources(recipe: Recipe, data: RunData) -> Iterator[ReadSource]:
    """Read records of every source that the stages learn from, and of those that validation and retention ask; a source
    that several stages name is read once.

    Raises:
        DataError: a source with bad records, where the stage does not step over them; or with nothing else.
    """
    reports: dict[str, CheckReport] = {}
    for index, stage in enumerate(recipe.stages):
        replay = stage.data.text_replay
        specs = {f"data.sources.{number}": spec for number, spec in enumerate(stage.data.sources)}
        if replay is not None and replay.ratio:
            specs |= {f"data.text_replay.sources.{number}": spec for number, spec in enumerate(replay.sources)}
        for (key, spec), source in zip(specs.items(), data.stage(index).mixture.sources, strict=True):
            if source.size is None:
                yield ReadSource(f"stages.{stage.name}.{key}", None, 0, ())
                continue
            same = f"{type(source)}: {spec.model_copy(update={'name': None, 'weight': 1.0})!r}"
            if same not in reports:
                reports[same] = check_source(source, MOST_READ)
            report = reports[same]
            found = ReadSource(f"stages.{stage.name}.{key}", source.size, report.samples, tuple(report.bad))
            _refuse(found, stage)
            yield found
    retention = data.retention
    held = {"validation": data.validation}
    if retention is not None:
        held |= {"retention.text": retention.text, "retention.pictures": retention.pictures}
    for key, samples in held.items():
        if samples:
            report = check_source(_Held(key, samples), MOST_READ)
            found = ReadSource(key, len(samples), report.samples, tuple(report.bad))
            _refuse(found)
            yield found


@dataclass
class _Held:
    """Samples that a run keeps, as a source of them."""

    name: str
    samples: Sequence[Sample]

    @property
    def size(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def _refuse(found: ReadSource, stage: Stage | None = None) -> None:
    """Raise a DataError about bad records, unless ``stage`` learns from the source and steps over them."""
    skips = stage is not None and stage.on_bad == "skip"
    if len(found.bad) < (found.read if skips else 1):
        return
    of = f"{found.read:,}" if found.read == found.size else f"{found.read:,} that were read (it holds {found.size:,})"
    more = len(found.bad) - _TOLD
    named = [*map(str, found.bad[:_TOLD]), *([f"and {more:,} more"] if more > 0 else [])]
    use = "used" if stage is None else "learnt from"
    skip = "" if stage is None or skips else f"; or stages.{stage.name}.on_bad=skip steps over bad records"
    raise DataError(
        "\n  ".join([f"{len(found.bad):,} of {of} cannot be {use}:", *named]),
        where=found.key,
        remedy=f"mend what is bad, `alula data check` lists all of it{skip}",
    )
