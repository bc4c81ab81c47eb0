"""Which grafts there are. A graft's own package registers it; saved adapters are read by what is registered.

Packages installed beside alula add theirs by the entry point group ``alula.grafts``: each names a module that calls
`register` when it is imported, under the graft's type. It is imported when a graft of that type is first asked for.
"""

from __future__ import annotations

from typing import NamedTuple

from alula.grafts.base import Graft, GraftConfig
from alula.plugins import Registry


class GraftKind(NamedTuple):
    """A type of graft: the class of its settings, and that of its handles."""

    config: type[GraftConfig]
    graft: type[Graft]


_GRAFTS: Registry[GraftKind] = Registry("alula.grafts", "graft of type")


def register(config: type[GraftConfig], graft: type[Graft]) -> None:
    """Make a graft known under ``config.graft_type``.

    Raises:
        UsageError: another graft has that type.
    """
    _GRAFTS.register(config.graft_type, GraftKind(config, graft))


def kind_of(graft_type: object) -> GraftKind | None:
    """The graft of that type; None where there is none.

    Raises:
        UsageError: the package that brings it does not load.
    """
    return _GRAFTS.get(graft_type)


def graft_types() -> tuple[str, ...]:
    """Types of the grafts there are, those of other packages included."""
    return _GRAFTS.names()
