"""A request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass

from alula.serving.engine.answer import Answer
from alula.serving.engine.handle import Handle
from alula.serving.engine.looks import Looking
from alula.serving.engine.prompts import Prepared
from alula.serving.engine.request import Request
from alula.serving.engine.resident import Resident


@dataclass(eq=False)
class Job:
    """A request with all it needs.

    Attributes:
        resident: the model that it names.
        computing: the model whose bits its answer is of.
        looking: tells where its tokens looked, as it is computed together with others; None: not asked for, or it is
            computed by itself.
        is_over: it was let go.
    """

    request: Request
    prepared: Prepared
    resident: Resident
    computing: Resident
    answer: Answer
    handle: Handle
    looking: Looking | None = None
    is_over: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether it is computed by itself."""
        return (self.request.is_steered and self.looking is None) or not self.computing.served.batched
