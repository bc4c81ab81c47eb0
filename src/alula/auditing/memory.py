"""How much memory the probes keep at most, however many samples pass."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

from alula.anatomy import Anatomy
from alula.auditing.sections import Measurement
from alula.probes import Probe

_SLACK = 64 * 1024
"""counts, priorities and other small change of a probe"""


def bound(probes: Iterable[tuple[Measurement, Probe]], anatomy: Anatomy) -> int:
    """Bytes that these probes, each with the measurement it belongs to, keep on one host at most between forwards."""
    return sum(measurement.bound(probe, anatomy) + _SLACK for measurement, probe in probes)


def held(probes: Iterable[Probe]) -> int:
    """Bytes that the probes keep now."""
    return sum(value.numel() * value.element_size() for probe in probes for value in probe.state_dict().values())


def peak() -> dict[str, int]:
    """The most bytes this process has used so far, all in all and, where there is one, on its accelerator."""
    found = {}
    if sys.platform != "win32":
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["process"] = most if sys.platform == "darwin" else most * 1024
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        found["accelerator"] = torch.cuda.max_memory_allocated()
    return found
