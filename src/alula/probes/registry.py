"""Which probes there are. A probe's own file registers it; saved measurements are read by what is registered.

Packages installed beside alula add theirs by the entry point group ``alula.probes``: each names a module that calls
`register` when it is imported, under the probe's name. It is imported when a probe of that name is first asked for.
"""

from __future__ import annotations

import os
from typing import TypeVar

from alula.errors import DataError
from alula.plugins import Registry
from alula.probes.base import Probe, name_in

_PROBES: Registry[type[Probe]] = Registry("alula.probes", "probe")
P = TypeVar("P", bound=type[Probe])


def register(probe: P) -> P:
    """Make a probe known under its ``name``; returns it, so that it also decorates the class.

    Raises:
        UsageError: another probe has that name.
    """
    _PROBES.register(probe.name, probe)
    return probe


def probe_names() -> tuple[str, ...]:
    """Names of the probes there are, those of other packages included."""
    return _PROBES.names()


def load_probe(file: str | os.PathLike[str]) -> Probe:
    """Read a probe of any kind that `Probe.save` wrote, with its settings and measurements.

    Raises:
        DataError: not such a file, or one of a probe that no installed package has.
    """
    name = name_in(file)
    kind = _PROBES.get(name)
    if kind is None:
        raise DataError(
            f"it holds the probe {name!r}, which is none of: {', '.join(probe_names())}",
            where=str(file),
            remedy="install the package of that probe",
        )
    return kind.load(file)
