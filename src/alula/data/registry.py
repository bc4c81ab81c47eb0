"""Which kinds of source there are: those of `alula.data.sources`, and those of packages installed beside alula.

Packages add theirs by the entry point group ``alula.sources``, each a `SourceKind`, named as its key in recipes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from alula.data.samples import Source
from alula.plugins import Registry
from alula.settings import Settings


def _no_files(spec: Any, base: Path) -> list[Path]:
    return []


class SourceKind(NamedTuple):
    """One kind of source.

    Attributes:
        key: the key that says so where a source is written; a field of ``spec``.
        spec: what may be written beside it, an `alula.data.specs.SourceSpec`.
        open: makes the source from its spec and the folder that relative paths start from.
        files: the files that hold its records, without the media they name; none of a source that draws its own.
    """

    key: str
    spec: type[Settings]
    open: Callable[[Any, Path], Source]
    files: Callable[[Any, Path], list[Path]] = _no_files


SOURCES: Registry[SourceKind] = Registry("alula.sources", "kind of source")


def register(kind: SourceKind) -> None:
    """Make a kind of source known under its key.

    Raises:
        UsageError: another kind has that key.
    """
    SOURCES.register(kind.key, kind)
