"""How much memory the probes keep at most, however many samples pass."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

from alula.anatomy import Anatomy
from alula.probes import Alignment, AttentionShift, Geometry, Overlap, Probe, VocabularyLens
from alula.probes.attention import SEGMENTS
from alula.probes.overlap import linears

_SUM, _KEPT = 8, 4
"""bytes of a number in a sum and in a kept sample"""
_SLACK = 64 * 1024
"""counts, priorities and other small change of a probe"""


def bound(probes: Iterable[Probe], anatomy: Anatomy) -> int:
    """Bytes that these probes keep on one host at most, between two forwards."""
    kinds = 1 + len(anatomy.placeholders)  # text, and all that the host can be shown
    return sum(_bound(probe, anatomy, kinds) + _SLACK for probe in probes)


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


def _bound(probe: Probe, anatomy: Anatomy, kinds: int) -> int:
    layers, width, keep = anatomy.num_layers, anatomy.hidden_size, probe.keep
    states = layers + 1
    match probe:
        case AttentionShift():
            heads = anatomy.num_heads if probe.heads == "each" else 1
            return 2 * layers * heads * len(SEGMENTS) * (keep * _KEPT + _SUM)
        case Alignment():
            return (kinds - 1) * 2 * states * (width + 2) * (keep * _KEPT + _SUM)
        case Geometry():
            # norms (4) and change (1) per kind; sample means of four kinds of rows at five states
            summaries = kinds * states * 8 * (keep * _KEPT + _SUM)
            return summaries + kinds * states * width * _SUM + keep * 4 * 5 * width * _KEPT + kinds * states * 8 * _SUM
        case VocabularyLens():
            head = anatomy.head
            vocabulary = 0 if head is None else head.get_parameter("weight").shape[0]
            examples = probe.examples * 4 * probe.tokens_per_kind * (2 * 9 * probe.top + 1) * _KEPT
            return 3 * kinds * 9 * vocabulary * _SUM + examples + kinds * 2 * 3 * 9 * (keep * _KEPT + _SUM)
        case Overlap():
            widths = sum(matrix.in_features for layer in anatomy.layers for _, matrix in linears(layer))
            return len(probe.streams) * 2 * widths * _SUM
        case _:
            raise TypeError(type(probe).__name__)
