"""What is asked of an engine, and how much of it is let in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alula.bounds import DEFAULT_MAX_PIXELS, MAX_SEED
from alula.chat_template import TemplateSettings
from alula.policies import Policy
from alula.serving.engine.errors import RequestError

MOST_STOPS, MOST_LOGPROBS = 16, 20


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are drawn; None: as the checkpoint sets it, else without effect.

    Attributes:
        max_tokens: most tokens of the answer; None: as many as limits and context let.
        temperature: divides the logits; 0: the likeliest token each time.
        top_p: draw from the likeliest tokens that have this much probability together.
        top_k: draw from so many of the likeliest; 0: from all.
        seed: of the draws; the same answer comes of it whatever runs beside. None: another one each time.
        stop: texts that end the answer; they are no part of it.
        logprobs: tell the log-probability of every token, as the model gives it: before temperature and penalties.
        top_logprobs: and of so many of the likeliest in its place.
        frequency_penalty: taken off the logit of a token for each time it stands in the answer (OpenAI's).
        presence_penalty: taken off once for a token that stands in the answer (OpenAI's).
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that stand in prompt or
            answer (Keskar et al., arXiv 1909.05858).

    Raises:
        RequestError: a number out of its bounds.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _within("max_tokens", self.max_tokens, 1, math.inf, whole=True)
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 0, 1, open_below=True)
        _within("top_k", self.top_k, 0, math.inf, whole=True)
        _within("seed", self.seed, 0, MAX_SEED, whole=True)
        _within("top_logprobs", self.top_logprobs, 0, MOST_LOGPROBS, whole=True)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("repetition_penalty", self.repetition_penalty, 0, 100, open_below=True)
        if len(self.stop) > MOST_STOPS or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"up to {MOST_STOPS} texts that are not empty can end an answer", where="stop")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("has no effect without logprobs", where="top_logprobs", remedy="give logprobs=True")


@dataclass(frozen=True)
class Highlighted:
    """What the model is to attend to (`alula.highlight`).

    Attributes:
        spans: texts of the prompt, or `alula.steering.Span`s.
        regions: of the request's media: a `Box`, `Polygon`, ... that names its image by itself, or a pair of the
            image's number and one.
        strength, guidance: see `alula.highlight`; None: its own.
    """

    spans: Sequence[Any] = ()
    regions: Sequence[Any] = ()
    strength: float | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        if not self.spans and not self.regions:
            raise RequestError("neither spans nor regions are given", where="highlight")


@dataclass(frozen=True)
class Request:
    """One answer that is asked for.

    Attributes:
        model: name of a loaded model.
        messages: a conversation, as `alula.inputs.Intake` takes them: content in parts, with decoded media; plain
            texts are taken too.
        prompt: in the place of messages: a text as it is, or token ids.
        sampling: how the answer is drawn.
        template: variables for the chat template.
        deadline: seconds from submission, after which what is there is all.
        highlight: what to attend to.
        image_tokens: tokens that every image has at most (`alula.policies.Budget`).
        policies: by name, for this request alone.
        attention: tell of every new token where in the images it looked.

    Raises:
        RequestError: neither or both of messages and prompt; options that have no effect together.
    """

    model: str
    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    template: TemplateSettings | None = None
    deadline: float | None = None
    highlight: Highlighted | None = None
    image_tokens: int | None = None
    policies: Mapping[str, Policy] | None = None
    attention: bool = False

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise RequestError("a request has messages or a prompt", where="messages")
        if self.messages is not None and not self.messages:
            raise RequestError("there are none", where="messages")
        if self.prompt is not None and not len(self.prompt):
            raise RequestError("it is empty", where="prompt")
        if self.prompt is not None and self.template is not None:
            raise RequestError("a prompt goes through no chat template", where="template", remedy="give messages")
        _within("deadline", self.deadline, 0, math.inf, open_below=True)
        _within("image_tokens", self.image_tokens, 1, math.inf, whole=True)

    @property
    def is_steered(self) -> bool:
        """Whether something holds for its forwards alone."""
        return bool(self.changes_forwards or self.attention)

    @property
    def changes_forwards(self) -> bool:
        """Whether its forwards are others than those of a request without it."""
        return bool(self.highlight or self.image_tokens or self.policies)


@dataclass(frozen=True)
class Limits:
    """How much an engine lets in.

    Attributes:
        queue: requests that wait; one more is refused (`QueueFull`).
        running: requests that are computed at once.
        prompt_tokens: of one prompt, media included; None: as the model's context lets.
        answer_tokens: most tokens of an answer; asked for without a number, this many.
        images_per_request: media of any kind.
        pixels_per_image: of one image.
        deadline: seconds that any request has; None: no bound.
        prefill_tokens: tokens of prompts that are computed between two steps of running answers.
        prefix_tokens: tokens of finished prompts and answers that are kept for further turns, over all models.
        prefix_bytes: that these take at most, on the models' devices: a token is a hundred times as large in one model
            as in another.
    """

    queue: int = 256
    running: int = 64
    prompt_tokens: int | None = None
    answer_tokens: int = 1024
    images_per_request: int = 16
    pixels_per_image: int = DEFAULT_MAX_PIXELS
    deadline: float | None = None
    prefill_tokens: int = 512
    prefix_tokens: int = 32768
    prefix_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        for name in ("queue", "running", "prompt_tokens", "answer_tokens", "pixels_per_image", "prefill_tokens"):
            _within(name, getattr(self, name), 1, math.inf, whole=True)
        for name in ("images_per_request", "prefix_tokens", "prefix_bytes"):
            _within(name, getattr(self, name), 0, math.inf, whole=True)
        _within("deadline", self.deadline, 0, math.inf, open_below=True)


def _within(name: str, value: Any, least: float, most: float, *, whole: bool = False, open_below: bool = False) -> None:
    if value is None:
        return
    kinds: Any = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
        raise RequestError(f"{value!r} is no {'whole ' if whole else ''}number", where=name)
    if value < least or value > most or (open_below and value == least):
        above = "above" if open_below else "at least"
        upper = "" if math.isinf(most) else f" and at most {most:g}"
        raise RequestError(f"{value} is out of bounds", where=name, remedy=f"give a number {above} {least:g}{upper}")
