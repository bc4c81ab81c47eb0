"""What a section of an audit is: a question, how it is measured, what the answer means and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alula.anatomy import Anatomy
from alula.auditing.finding import Finding
from alula.auditing.record import Audit
from alula.evaluation import PairedRun, RunResult, Task
from alula.probes import Probe, Resampling
from alula.reports.document import Block

SUM_BYTES, KEPT_BYTES = 8, 4
"""bytes of a number in a sum and in a kept sample"""

IMA_PAPER = ("Implicit multimodal alignment, arXiv 2405.16700", "https://arxiv.org/abs/2405.16700")
WINGS_PAPER = ("Wings, arXiv 2406.03496", "https://arxiv.org/abs/2406.03496")
WANDA_PAPER = ("Wanda, arXiv 2306.11695", "https://arxiv.org/abs/2306.11695")
CKA_PAPER = ("Similarity of representations, arXiv 1905.00414", "https://arxiv.org/abs/1905.00414")


def kinds_of(anatomy: Anatomy) -> int:
    """How many kinds of tokens a host has: text, and all that it can be shown."""
    return 1 + len(anatomy.placeholders)


def _nothing(number: int = 0) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Pass:
    """Contexts of one pass over the conversations: ``around(n)`` of batch n, ``whole()`` of the pass."""

    around: Callable[[int], AbstractContextManager[Any]] = _nothing
    whole: Callable[[], AbstractContextManager[Any]] = _nothing


def _plain_result(probes: Mapping[str, Any], how: Resampling, model: Any, processor: Any) -> Any:
    return probes["model"].result(how)


def _no_controls(model: Any, anatomy: Anatomy, seed: int) -> dict[str, Pass]:
    return {}


@dataclass(frozen=True)
class Measurement:
    """A probe over conversations with images.

    Attributes:
        probe: makes the probe; takes ``seed``.
        bound: bytes that a probe keeps on a host at most, between two forwards.
        result: from the probes by pass ("model", and each control), how to resample, the model and its processor.
        controls: further passes that repeat the measurement under a control, by name; takes model, anatomy and seed.
    """

    probe: Callable[..., Probe]
    bound: Callable[[Any, Anatomy], int]
    result: Callable[[Mapping[str, Any], Resampling, Any, Any], Any] = _plain_result
    controls: Callable[[Any, Anatomy, int], dict[str, Pass]] = _no_controls


@dataclass(frozen=True)
class Questions:
    """Questions that are put to the model, and in part to its base.

    Attributes:
        tasks: from the user's own file (or None), the number of items, the seed, and the names of tasks that come with
            the model; raises a UsageError where there is nothing to ask.
        of_base: which of them the base is asked too; how likely their references are is weighed as well.
        result: from the model's answers, the comparison with the base's (or None), and whether the base was asked in
            the model's own template and tokens.
        asked: the result's number of questions in words.
    """

    tasks: Callable[[Path | None, int, int, Sequence[str]], list[Task]]
    of_base: Callable[[Sequence[Task]], list[Task]]
    result: Callable[[RunResult, PairedRun | None, bool], Any]
    asked: Callable[[Any], str]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question of an audit. A section has either a ``measurement`` or ``questions``.

    Attributes:
        name: as ``--sections`` takes it; also the key of its result in an `Audit` and in ``audit.json``.
        result: the type of its result.
        verdict: what the result means for this model; None where it says nothing.
        blocks: figures and tables.
        notes: sentences about what the figures leave out.
        links: literature, as (title, URL).
        export: JSON values by top-level key of ``audit.json``, given the result or None; by default ``name`` alone.
    """

    name: str
    result: type[Any]
    verdict: Callable[[Audit, Any], Finding | None]
    blocks: Callable[[Audit, Any], list[Block]]
    notes: Callable[[Any], list[str]] = lambda result: []
    links: tuple[tuple[str, str], ...] = ()
    export: Callable[[Any], dict[str, Any]] | None = None
    measurement: Measurement | None = None
    questions: Questions | None = None

    def exported(self, audit: Audit) -> dict[str, Any]:
        """JSON values by top-level key."""
        result = audit.results.get(self.name)
        if self.export is not None:
            return self.export(result)
        return {self.name: None if result is None else result.to_dict()}
