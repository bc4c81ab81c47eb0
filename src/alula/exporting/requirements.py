"""What another engine asks of a model directory, point by point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Requirement:
    """One thing that an engine asks for.

    Attributes:
        what: is asked for.
        met: None where it cannot be told without the engine.
        found: in the directory.
        remedy: where it is not met, or not told.
    """

    what: str
    met: bool | None
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a directory, as it would be exported, has of what an engine asks for.

    Attributes:
        engine: a name of `ENGINES`.
        source: when and where its requirements were read.
        requirements: in the order they were looked at; what comes behind one that is not met may be missing.
    """

    engine: str
    source: str
    requirements: Sequence[Requirement]

    @property
    def accepted(self) -> bool:
        """Nothing is known to be missing."""
        return all(each.met is not False for each in self.requirements)

    @property
    def unmet(self) -> list[Requirement]:
        return [each for each in self.requirements if each.met is False]
