"""A loaded model with what its requests need, and what it says of itself."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from alula.anatomy import Anatomy, unwrap
from alula.chat_template import TemplateSettings
from alula.demonstrations import Shot
from alula.demonstrations.few_shot import few_shot
from alula.errors import HostError
from alula.hosts.stops import stop_ids
from alula.hosts.templates import default_template
from alula.inputs import Intake
from alula.loading import sharing
from alula.seam import Owner, install, joining
from alula.serving.engine.gaze import Gaze, ask
from alula.serving.engine.sampling import Defaults
from alula.serving.engine.spelling import Spelling

Kind = Literal["text", "host", "peft", "alula"]
_STEERED = "serving"
_SAID_BY = ("user", "assistant")
"""roles whose words hold no special tokens: what people write, and what a model wrote and they send back"""


@dataclass(frozen=True)
class Served:
    """A model that requests can name.

    Attributes:
        name, path: of it.
        base: name of the base whose weights it shares; None: it is one.
        kind: "text": a text model, "host": one with media, "peft" or "alula": an adapter.
        adapter: its type ("wings", "lora" ...); None: a base.
        takes: names of the media it takes.
        exact_gate: requests without media are computed by the base itself.
        context: tokens of prompt and answer that it takes; None: no bound is known.
        loading: by medium, arguments with which its files are to be decoded (`Intake.loading`).
        created: seconds since 1970 when it was loaded.
        batched: its requests are computed together.
        why_alone: why they are not.
        shots: demonstrations that stand before every conversation.
    """

    name: str
    path: str
    base: str | None
    kind: Kind
    adapter: str | None
    takes: frozenset[str]
    exact_gate: bool
    context: int | None
    loading: Mapping[str, Mapping[str, Any]]
    created: int
    batched: bool
    why_alone: str | None = None
    shots: int = 0


@dataclass(eq=False)
class Resident:
    """A loaded model with what its requests need.

    Attributes:
        served: what it says of itself.
        model: on its device, in eval mode.
        processor: its processor or tokenizer.
        base: the one whose weights it shares.
        shots: demonstrations that stand before every conversation.
        preparing: held while the processor is used: tokenizers are not made for two threads.
        requests: how many are on their way.
        gaze: reads the attention of all its forwards.
    """

    served: Served
    model: Any
    processor: Any
    base: Resident | None = None
    shots: Sequence[Shot] = ()
    preparing: threading.RLock = field(default_factory=threading.RLock)
    requests: int = 0
    gaze: Gaze | None = None

    @property
    def tokenizer(self) -> Any:
        """Of its processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def spelling(self) -> Spelling:
        """The bytes of its tokens."""
        return Spelling(self.tokenizer)

    @cached_property
    def anatomy(self) -> Anatomy:
        return Anatomy.of(unwrap(self.model))

    @cached_property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return torch.device(next(self.model.parameters()).device)

    @cached_property
    def defaults(self) -> Defaults:
        """How the checkpoint has tokens drawn."""
        return Defaults.of(getattr(self.model, "generation_config", None))

    @cached_property
    def _own_template(self) -> tuple[str | None, str | None]:
        """A template for a model that came without one, and the token that ends its turns."""
        if getattr(self.processor, "chat_template", None) is not None:
            return None, None
        return default_template(self.tokenizer)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer."""
        _, end = self._own_template
        own = [] if end is None else [self.tokenizer.get_vocab()[end]]
        return frozenset([*stop_ids(self.model, self.tokenizer), *own])

    @cached_property
    def reads_in_pieces(self) -> bool:
        """Whether prompts may be computed piece by piece, and behind what others left."""
        return joining.reads_in_pieces(self.model)

    @cached_property
    def position_sections(self) -> int | None:
        """In how many numbers it goes by a position; None: in one."""
        return joining.position_sections(self.model)

    @cached_property
    def _intake(self) -> Intake:
        return self._made_intake(None)

    def intake(self, template: TemplateSettings | None = None) -> Intake:
        """The way from messages to its inputs."""
        return self._intake if template is None else self._made_intake(template)

    def _made_intake(self, template: TemplateSettings | None) -> Intake:
        options = {"live": True, "chat_template": self._own_template[0], "said_by": _SAID_BY}
        return few_shot(self.processor, self.shots, template, **options)

    def _tree(self) -> Any:
        """A model of its own over the same weights, with the seam on it."""
        model = sharing(self.model)
        install(model, _STEERED, Owner())
        return model

    @cached_property
    def steered(self) -> Any:
        """A tree of its own over the same weights, for requests that something holds for alone: what is put on it for
        one of these does not reach the others. The seam is always there, so that no cache is filled without it."""
        return self._tree()

    @cached_property
    def rehearsing(self) -> Any:
        """A tree of its own on which nothing is computed, to see what can be put on it; for who holds `preparing`."""
        return self._tree()

    @cached_property
    def _watched(self) -> Resident | None:
        model, gaze = self._tree(), Gaze()
        try:
            ask(model, gaze)
        except HostError:
            return None
        return Resident(self.served, model, self.processor, self.base, self.shots, self.preparing, gaze=gaze)

    @property
    def watched(self) -> Resident | None:
        """The same over a tree of its own whose attention is read: what asks where its tokens looked, and for nothing
        else, is computed together there. None: it cannot be read."""
        with self.preparing:  # one, whoever asks first
            return self._watched

    @property
    def trees(self) -> list[Resident]:
        """It, and what it is computed by in its place."""
        watched = vars(self).get("_watched")
        return [self] if watched is None else [self, watched]
