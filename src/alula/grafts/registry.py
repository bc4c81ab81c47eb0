"""Which grafts there are. A graft's own package registers it; saved adapters are read by what is registered.

Packages installed beside alula add theirs by the entry point group ``alula.grafts``: each names a module that calls
`register` when it is imported, under the graft's type. It is imported when a graft of that type is first asked for.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import NamedTuple

from alula.errors import UsageError
from alula.grafts.base import Graft, GraftConfig


class GraftKind(NamedTuple):
    """A type of graft: the class of its settings, and that of its handles."""

    config: type[GraftConfig]
    graft: type[Graft]


_KINDS: dict[str, GraftKind] = {}


def register(config: type[GraftConfig], graft: type[Graft]) -> None:
    """Make a graft known under ``config.graft_type``.

    Raises:
        UsageError: another graft has that type.
    """
    kind = GraftKind(config, graft)
    if _KINDS.setdefault(config.graft_type, kind) != kind:
        raise UsageError(
            f"there is a graft of type {config.graft_type!r} already: {_KINDS[config.graft_type].graft.__name__}",
            remedy="give this one another graft_type",
        )


def kind_of(graft_type: object) -> GraftKind | None:
    """The graft of that type; None where there is none."""
    if isinstance(graft_type, str) and graft_type not in _KINDS:
        for entry in entry_points(group="alula.grafts", name=graft_type):
            entry.load()
    return _KINDS.get(graft_type) if isinstance(graft_type, str) else None


def graft_types() -> tuple[str, ...]:
    """Types of the grafts there are, those of other packages included."""
    return tuple(sorted({*_KINDS, *entry_points(group="alula.grafts").names}))
