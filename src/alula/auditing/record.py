"""What an audit found, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Bytes: what the probes keep now, what they can keep at most whatever the number of samples, and the most this
    process has used, model included (by place: "process", "accelerator")."""

    held: int
    bound: int
    peak: Mapping[str, int]


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        model, base: as they were named.
        title: the model's name for people.
        facts: the plan's settings.
        model_class: of the host; ``parameters`` and ``layers`` describe it.
        data: what the samples are from; ``measured`` of them passed, ``without_image`` and ``unusable`` were passed
            over.
        results: what each section found, by its name; a section that was not asked for is not there.
    """

    model: str
    base: str | None
    title: str
    facts: Mapping[str, Any]
    model_class: str
    parameters: int
    layers: int
    device: str
    dtype: str
    created: str
    command: str
    environment: Mapping[str, str]
    seconds: float = 0.0
    data: str = ""
    measured: int = 0
    without_image: int = 0
    unusable: int = 0
    results: Mapping[str, Any] = field(default_factory=dict)
    memory: Memory | None = None
