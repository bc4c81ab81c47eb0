"""What an audit found, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alula.evaluation import Comparison, PairedRun, RunResult
from alula.probes import (
    AlignmentResult,
    AttentionShiftResult,
    GeometryResult,
    LensResult,
    OverlapResult,
)


@dataclass(frozen=True)
class TextAnswers:
    """Answers to text.

    Attributes:
        run: the model's answers.
        pairs: compared with the base's; None without a base.
        after_image: the model's answers after an image compared with its own to the bare question; None where the
            questions were not asked after an image.
        in_its_words: the base was asked in the model's own template and tokens.
    """

    run: RunResult
    pairs: PairedRun | None = None
    after_image: Comparison | None = None
    in_its_words: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes: what the probes keep now, what they can keep at most whatever the number of samples, and the most this
    process has used, model included (by place: "process", "accelerator")."""

    held: int
    bound: int
    peak: Mapping[str, int]


@dataclass(frozen=True)
class Audit:
    """The result of an audit; sections that were not asked for are None.

    Attributes:
        model, base: as they were named.
        title: the model's name for people.
        facts: the plan's settings.
        model_class: of the host; ``parameters`` and ``layers`` describe it.
        data: what the samples are from; ``measured`` of them passed, ``without_image`` and ``unusable`` were passed
            over.
        controls: alignment with noise for images ("noise") and with an untrained connector ("untrained").
        words: the tokens that the lens found, as text.
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
    text: TextAnswers | None = None
    attention: AttentionShiftResult | None = None
    alignment: AlignmentResult | None = None
    controls: Mapping[str, AlignmentResult] = field(default_factory=dict)
    geometry: GeometryResult | None = None
    lens: LensResult | None = None
    words: Mapping[int, str] = field(default_factory=dict)
    overlap: OverlapResult | None = None
    memory: Memory | None = None
