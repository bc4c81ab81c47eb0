"""What a check reads of a run's data: records of every source of its stages, some of long ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from alula.data.check import BadRecord, CheckReport, check_source
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
        size: records it holds; None: it draws them without end, and none was read.
        read: records that were read, with their media, spread evenly over it.
        bad: those of them that cannot be learnt from.
    """

    key: str
    size: int | None
    read: int
    bad: tuple[BadRecord, ...]


def read_sources(recipe: Recipe, data: RunData) -> Iterator[ReadSource]:
    """Read records of every source that the stages learn from; one that several stages name is read once.

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


def _refuse(found: ReadSource, stage: Stage) -> None:
    if len(found.bad) < (found.read if stage.on_bad == "skip" else 1):
        return
    of = f"{found.read:,}" if found.read == found.size else f"{found.read:,} that were read (it holds {found.size:,})"
    more = len(found.bad) - _TOLD
    named = [*map(str, found.bad[:_TOLD]), *([f"and {more:,} more"] if more > 0 else [])]
    skip = "" if stage.on_bad == "skip" else f"; or stages.{stage.name}.on_bad=skip steps over bad records"
    raise DataError(
        "\n  ".join([f"{len(found.bad):,} of {of} cannot be learnt from:", *named]),
        where=found.key,
        remedy=f"mend what is bad, `alula data check` lists all of it{skip}",
    )
