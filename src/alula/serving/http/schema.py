"""What requests say: OpenAI's fields, and alula's own under ``alula``.

Three kinds of fields. Those that are honored. Labels, which ask for nothing (``user``, ``metadata`` ...): they are read
and not used. And those that ask a server that knows them for something (``tools``, ``response_format``, ``store`` ...):
with a value that does they are refused with the reason, since an answer that looks as if they had been honored is worse
than none. So is whatever OpenAI's own servers do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from alula.bounds import MAX_SEED
from alula.serving.http.problems import Problem
from alula.settings import Bool, Int, Number, refusal

MOST_CHOICES = 8
"""answers of one request"""
MOST_POLICIES = 16
"""of one request: each is set up in the layers of its model"""

_Neutral = Callable[[Any], bool]


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or value == {}


REFUSED: dict[str, tuple[_Neutral, str]] = {
    "tools": (_is_empty, "no tools are called by this server: the models it serves were not taught to"),
    "tool_choice": (lambda value: value in (None, "none", "auto"), "no tools are called by this server"),
    "functions": (_is_empty, "no functions are called by this server"),
    "function_call": (lambda value: value in (None, "none", "auto"), "no functions are called by this server"),
    "response_format": (
        lambda value: value is None or value == {"type": "text"},
        "answers are plain text: nothing in this server holds a model to a grammar",
    ),
    "logit_bias": (_is_empty, "scores of single tokens are not changed by this server"),
    "modalities": (lambda value: value in (None, ["text"]), "answers are text"),
    "audio": (lambda value: value is None, "answers are text"),
    "reasoning_effort": (lambda value: value is None, "say it to the chat template: alula.template"),
    "verbosity": (lambda value: value is None, "no model served here reads it"),
    "web_search_options": (lambda value: value is None, "this server searches nothing"),
    "moderation": (lambda value: value is None, "this server judges no content"),
    "echo": (lambda value: value in (None, False), "the prompt is not sent back"),
    "add_generation_prompt": (lambda value: value in (None, True), "an answer is always a turn of its own"),
    "continue_final_message": (
        lambda value: value in (None, False),
        "an answer is always a turn of its own: a turn of the assistant at the end of messages is over",
    ),
    "suffix": (lambda value: value in (None, ""), "texts are continued, not filled in"),
    "best_of": (lambda value: value in (None, 1), "ask for n answers and choose among them"),
    "use_beam_search": (lambda value: value in (None, False), "answers are drawn one token at a time"),
    "min_p": (lambda value: value in (None, 0), "use top_p or top_k"),
    "store": (lambda value: value in (None, False), "answers are not kept by this server"),
    "prediction": (lambda value: value is None, "no answer is guessed ahead by this server"),
    "service_tier": (lambda value: value in (None, "auto", "default"), "all requests are served alike"),
    "prompt_cache_retention": (
        lambda value: value in (None, "in_memory", "in-memory"),
        "prefixes are kept in memory, while there is room",
    ),
}
"""fields that ask for what is not done: when they do not, and why they are refused otherwise"""


class Schema(BaseModel):
    """Base of what is read: unknown keys are refused, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=False)


S = TypeVar("S", bound=Schema)


def _listed(what: str) -> BeforeValidator:
    """One text stands for a list of it."""

    def listed(value: Any) -> Any:
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise ValueError(f"a text or a list of {what} is wanted here")
        return value

    return BeforeValidator(listed)


def _in_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("a text or a list of parts is wanted here")
    return value


def _link(value: Any) -> Any:
    """An address alone stands for the object that holds it, as many clients write it."""
    return {"url": value} if isinstance(value, str) else value


def _against(param: str, what: str) -> Problem:
    """What two fields of a request say against one another."""
    return Problem(what, param=param, code="invalid_value")


class Text(Schema):
    """Words."""

    type: Literal["text"]
    text: str


class Link(Schema):
    """Where a medium is: ``data:``, ``alula-upload:``, or an http(s) address."""

    url: Annotated[str, Field(min_length=1)]


class PictureLink(Link):
    """Where a picture is, and how much of it is to be seen: "low" a small copy of it, "high" and "auto" (as without a
    word) the picture at the size that the model's own processor gives it."""

    detail: Literal["auto", "low", "high", "original"] | None = None


class ImageUrl(Schema):
    """A picture."""

    type: Literal["image_url"]
    image_url: Annotated[PictureLink, BeforeValidator(_link)]

    @model_validator(mode="after")
    def _check_detail(self) -> ImageUrl:
        if self.image_url.detail == "original":
            raise ValueError("images are seen at the size that the model's processor gives them: say high, or nothing")
        return self

    @property
    def is_small(self) -> bool:
        """A small copy is to be seen."""
        return self.image_url.detail == "low"


class VideoUrl(Schema):
    """A film, as vLLM's clients write it."""

    type: Literal["video_url"]
    video_url: Annotated[Link, BeforeValidator(_link)]


class AudioUrl(Schema):
    """A sound, as vLLM's clients write it."""

    type: Literal["audio_url"]
    audio_url: Annotated[Link, BeforeValidator(_link)]


class Sound(Schema):
    """A sound in base64."""

    data: Annotated[str, Field(min_length=1)]
    format: Literal["wav", "mp3", "flac", "ogg", "opus"]


class InputAudio(Schema):
    """A sound, as OpenAI's clients write it."""

    type: Literal["input_audio"]
    input_audio: Sound


Part = Annotated[Text | ImageUrl | VideoUrl | AudioUrl | InputAudio, Field(discriminator="type")]


def _nothing(value: Any) -> Any:
    if value not in (None, [], ""):
        raise ValueError("only what answers carry when there is nothing in it (null) is taken here")


_Nothing = Annotated[Any, BeforeValidator(_nothing)]


def _nobody(value: Any) -> Any:
    if value is not None:
        raise ValueError("no model served here is told who speaks, but by the role: say it in the content")


class Message(Schema):
    """One turn. What answers of the API carry beside their content is taken back where it holds nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[tuple[Part, ...], BeforeValidator(_in_parts)]
    name: Annotated[Any, BeforeValidator(_nobody)] = None
    refusal: _Nothing = None
    reasoning_content: _Nothing = None
    audio: _Nothing = None
    annotations: _Nothing = None
    tool_calls: _Nothing = None
    function_call: _Nothing = None

    @model_validator(mode="before")
    @classmethod
    def _said_nothing(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("role") == "assistant" and given.get("content", "") is None:
            return {**given, "content": ""}
        return given


class StreamOptions(Schema):
    """What a stream holds beside the answer."""

    include_usage: Bool = False
    include_obfuscation: Bool = False

    @model_validator(mode="after")
    def _check_obfuscation(self) -> StreamOptions:
        if self.include_obfuscation:
            raise _against("stream_options.include_obfuscation", "is not done: events are as long as what they tell")
        return self


class SpanIn(Schema):
    """See `alula.steering.Span`."""

    text: str | None = None
    index: Int | None = None
    start: Int | None = None
    stop: Int | None = None
    message: Int | None = None
    part: Int | None = None
    weight: Number = 1.0


class RegionIn(Schema):
    """A box (left, top, right, bottom) or a polygon of an image, in pixels of the image as it was sent."""

    item: Annotated[Int, Field(ge=0)] = 0
    box: tuple[Number, Number, Number, Number] | None = None
    polygon: Annotated[tuple[tuple[Number, Number], ...], Field(min_length=3, max_length=1000)] | None = None
    weight: Number = 1.0
    share: Number = 0.5

    @model_validator(mode="after")
    def _check(self) -> RegionIn:
        if (self.box is None) == (self.polygon is None):
            raise ValueError("a region is a box or a polygon")
        return self


def _span(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


class HighlightIn(Schema):
    """What the model is to look at (`alula.highlight`)."""

    spans: Annotated[tuple[Annotated[SpanIn, BeforeValidator(_span)], ...], Field(max_length=64)] = ()
    regions: Annotated[tuple[RegionIn, ...], Field(max_length=64)] = ()
    strength: Annotated[Number, Field(ge=-5, le=5)] | None = None
    guidance: Annotated[Number, Field(ge=0, le=10)] | None = None

    @model_validator(mode="after")
    def _check(self) -> HighlightIn:
        if not self.spans and not self.regions:
            raise ValueError("nothing is highlighted: there are neither spans nor regions")
        return self


class Own(Schema):
    """What only alula has; see docs/usage/serve.md."""

    highlight: HighlightIn | None = None
    image_tokens: Annotated[Int, Field(gt=0)] | None = None
    policies: Annotated[dict[str, dict[str, Any]], Field(max_length=MOST_POLICIES)] | None = None
    attention: Bool = False
    compare: Annotated[tuple[str, ...], Field(max_length=MOST_CHOICES - 1)] = ()
    deadline: Annotated[Number, Field(gt=0)] | None = None
    template: dict[str, Any] | None = None


class Asked(Schema):
    """What both ways of asking share."""

    model: str
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=4), _listed("texts")] | None = (
        None
    )
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: Bool | None = None
    alula: Own | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise _against("stream_options", "is taken with stream: true alone")
        if self.alula is not None and self.alula.compare and (self.n or 1) > 1:
            raise _against("n", "of one model, or alula.compare, with one answer of each: not both")
        return self

    @property
    def own(self) -> Own:
        """alula's own fields."""
        return self.alula or Own()

    @property
    def most_tokens(self) -> int | None:
        """of an answer"""
        return self.max_tokens

    def seed_of(self, choice: int) -> int | None:
        """The seed of a choice: each draws otherwise, and compared models draw alike."""
        if self.seed is None:
            return None
        return (self.seed + (choice if (self.n or 1) > 1 else 0)) % (MAX_SEED + 1)


def _check_regions(messages: tuple[Message, ...], own: Own) -> None:
    """Refuse regions of a picture that is shown as a small copy: they are in pixels of the picture as it was sent."""
    pictures = [part for message in messages for part in message.content if isinstance(part, ImageUrl)]
    for number, region in enumerate(own.highlight.regions if own.highlight else ()):
        if region.item < len(pictures) and pictures[region.item].is_small:
            raise _against(
                f"alula.highlight.regions[{number}]", "is of a picture of which detail low shows a small copy"
            )


class ChatAsked(Asked):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: Bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatAsked:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _against("max_tokens", "says the same as max_completion_tokens, and here they differ")
        if self.top_logprobs is not None and not self.logprobs:
            raise _against("top_logprobs", "is taken with logprobs: true alone")
        if self.chat_template_kwargs is not None and self.own.template is not None:
            raise _against("chat_template_kwargs", "says the same as alula.template: give one of them")
        _check_regions(self.messages, self.own)
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def _prompts(value: Any) -> Any:
    """A prompt, or several, each text or ids of tokens."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("a text, a list of ids of tokens, or a list of these is wanted here")
    return [value] if all(isinstance(each, int) and not isinstance(each, bool) for each in value) else value


Ids = Annotated[list[Annotated[Int, Field(ge=0)]], Field(min_length=1)]


class TextAsked(Asked):
    """The body of ``/v1/completions``."""

    prompt: Annotated[tuple[str | Ids, ...], Field(max_length=MOST_CHOICES), BeforeValidator(_prompts)]
    logprobs: Annotated[Int, Field(ge=0, le=5)] | None = None

    @model_validator(mode="after")
    def _check(self) -> TextAsked:
        if len(self.prompt) * (self.n or 1) > MOST_CHOICES:
            raise _against("prompt", f"{len(self.prompt)} prompts, n answers each, are more than {MOST_CHOICES}")
        for name in ("highlight", "image_tokens", "policies", "attention", "template"):
            if getattr(self.own, name):
                raise _against(f"alula.{name}", "is taken with messages: /v1/chat/completions")
        return self


class PreviewAsked(Schema):
    """The body of ``/alula/v1/preview``: of a chat request what its prompt is made of."""

    model: str
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    alula: Own | None = None

    @model_validator(mode="after")
    def _check(self) -> PreviewAsked:
        own = self.alula or Own()
        for name in ("attention", "compare", "deadline"):
            if getattr(own, name):
                raise _against(f"alula.{name}", "is about an answer, and a preview has none")
        _check_regions(self.messages, own)
        return self


class LoadAsked(Schema):
    """The body of ``/alula/v1/models/load``."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+:@/-]{0,127}$")]
    path: Annotated[str, Field(min_length=1)]


class UnloadAsked(Schema):
    """The body of ``/alula/v1/models/unload``."""

    name: Annotated[str, Field(min_length=1)]


def read(kind: type[S], body: Mapping[str, Any]) -> S:
    """What a body says.

    Raises:
        Problem: the first thing that is wrong, with the field it stands in.
    """
    given = dict(body)
    if issubclass(kind, Asked):
        for name, (is_neutral, why) in REFUSED.items():
            if name in given and name not in kind.model_fields and not is_neutral(given.pop(name)):
                raise Problem(why, param=name, code="unsupported_parameter", remedy=f"leave {name} out")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = refusal(error, kind, given, where=lambda path: path, bracketed=True)
        unknown = first.message.startswith("unknown key")
        missing = first.message.startswith("this key is required")
        code = "unknown_parameter" if unknown else "missing_required_parameter" if missing else "invalid_value"
        raise Problem(first.message, param=first.where or None, code=code, remedy=first.remedy) from None
