"""Which kinds of source there are: those of `alula.data.sources`, and those of packages installed beside alula.

Packages add theirs by the entry point group ``alula.sources``, each a `SourceKind`, named as its key in recipes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from alula import plugins
from alula.data.samples import Source
from alula.errors import UsageError
from alula.settings import Settings

GROUP = "alula.sources"


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


_KINDS: dict[str, SourceKind] = {}


def register(kind: SourceKind) -> None:
    """Make a kind of source known.

    Raises:
        UsageError: another kind has that key.
    """
    if _KINDS.setdefault(kind.key, kind) != kind:
        raise UsageError(f"there is a kind of source {kind.key!r} already", remedy="give this one another key")


def kind_of(key: str) -> SourceKind | None:
    """The kind of source with that key; None where there is none.

    Raises:
        UsageError: the package that brings it does not load.
    """
    if key not in _KINDS:
        found = plugins.load(GROUP, key)
        if found is not None:
            register(found)
    return _KINDS.get(key)


def loaded() -> tuple[SourceKind, ...]:
    """The kinds that were registered or asked for so far."""
    return tuple(_KINDS.values())


def source_keys() -> tuple[str, ...]:
    """Keys of the kinds there are, alula's own first."""
    return tuple(dict.fromkeys((*_KINDS, *plugins.names(GROUP))))
