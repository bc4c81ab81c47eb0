"""From requests to answers: what is asked of the engine, and what becomes of clients that go away or take nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.responses import JSONResponse, Response

from alula.chat_template import TemplateSettings
from alula.errors import AlulaError
from alula.policies import Policy, policies_from
from alula.serving.engine import (
    Delta,
    Engine,
    Finished,
    Handle,
    Highlighted,
    Look,
    Preview,
    Request,
    Sampling,
    Served,
    TokenLogprob,
)
from alula.serving.http.bodies import Receive
from alula.serving.http.failures import deadline_passed, problem_of, queue_full
from alula.serving.http.media import MediaIntake
from alula.serving.http.metrics import Metrics
from alula.serving.http.problems import Problem, refused
from alula.serving.http.schema import Asked, ChatAsked, HighlightIn, Own, PreviewAsked, TextAsked
from alula.serving.http.settings import Settings
from alula.serving.http.shapes import DONE, Collected, Frame, event
from alula.steering import Box, Polygon, Span

_PREPARING = 4
"""requests that are rendered at once, in threads beside the event loop"""
_PULSE = 15.0
"""seconds after which a stream that waits says that it is there, since proxies cut silent ones off"""


@dataclass(frozen=True)
class Choice:
    """An answer on its way.

    Attributes:
        model: that was asked.
        handle: of the engine.
        deadline: seconds it was given.
    """

    model: str
    handle: Handle
    deadline: float | None


class Answering:
    """Asks the engine what clients ask.

    Args:
        engine: that answers.
        media: that takes what is shown.
        metrics: that count.
    """

    def __init__(self, engine: Engine, settings: Settings, media: MediaIntake, metrics: Metrics) -> None:
        self.engine, self.settings, self.media, self.metrics = engine, settings, media, metrics
        self._preparing = CapacityLimiter(_PREPARING)

    def served(self, name: str, param: str = "model") -> Served:
        """The model of that name.

        Raises:
            Problem: 404.
        """
        models = self.engine.models()
        found = next((each for each in models if each.name == name), None)
        if found is None:
            raise Problem(
                f"no model {name[:120]!r} is loaded",
                status=404,
                param=param,
                code="model_not_found",
                remedy=f"there are: {', '.join(each.name for each in models)}",
            )
        return found

    async def chat(self, asked: ChatAsked, receive: Receive) -> Response:
        """The answer to ``/v1/chat/completions``.

        Raises:
            Problem: it cannot be asked so.
        """
        self._check(asked)
        models = [self.served(asked.model)]
        models += [self.served(name, f"alula.compare[{i}]") for i, name in enumerate(asked.own.compare)]
        shared = self._of_prompt(asked.own, asked.chat_template_kwargs)
        requests: list[Request] = []
        known: list[tuple[Mapping[str, Any], list[dict[str, Any]]]] = []
        for served in models:
            messages = next((each for loading, each in known if loading == served.loading), None)
            if messages is None:
                messages = await self.media.taken(asked.messages, served.loading)
                known.append((served.loading, messages))
            for _ in range(asked.n or 1):
                sampling = self._sampling(asked, len(requests), bool(asked.logprobs), asked.top_logprobs or 0)
                requests.append(Request(served.name, messages=messages, sampling=sampling, **shared))
        frame = Frame(asked.model, True, bool(asked.logprobs), _tells_usage(asked))
        return await self._answered(asked, requests, frame, receive, prompts=len(models))

    async def completion(self, asked: TextAsked, receive: Receive) -> Response:
        """The answer to ``/v1/completions``.

        Raises:
            Problem: it cannot be asked so.
        """
        self._check(asked)
        models = [self.served(asked.model)]
        models += [self.served(name, f"alula.compare[{i}]") for i, name in enumerate(asked.own.compare)]
        if len(models) > 1 and len(asked.prompt) > 1:
            raise Problem("is taken with one prompt", param="alula.compare", code="invalid_value")
        requests: list[Request] = []
        for prompt in asked.prompt:
            for served in models:
                for _ in range(asked.n or 1):
                    sampling = self._sampling(asked, len(requests), asked.logprobs is not None, asked.logprobs or 0)
                    given = Request(served.name, prompt=prompt, sampling=sampling, deadline=asked.own.deadline)
                    requests.append(given)
        frame = Frame(asked.model, False, asked.logprobs is not None, _tells_usage(asked))
        prompts = len(asked.prompt) * len(models)
        return await self._answered(asked, requests, frame, receive, prompts=prompts)

    async def preview(self, asked: PreviewAsked) -> dict[str, Any]:
        """What ``/alula/v1/preview`` tells of a prompt, without an answer.

        Raises:
            Problem: it cannot be asked so.
        """
        served = self.served(asked.model)
        messages = await self.media.taken(asked.messages, served.loading)
        request = Request(served.name, messages=messages, **self._of_prompt(asked.alula or Own(), None))
        found: Preview = await self._in_thread(self.engine.preview, request)
        sizes = [_size(part) for each in messages for part in each["content"] if part["type"] != "text"]
        is_each = len(sizes) == len(found.images)
        return {
            "prompt_tokens": found.prompt_tokens,
            "context": served.context,
            "images": [
                {
                    "tokens": each.tokens,
                    "kept": each.kept,
                    "grid": None if each.grid is None else list(each.grid),
                    **(sizes[number] if is_each else {"width": None, "height": None}),
                }
                for number, each in enumerate(found.images)
            ],
        }

    # -- what is asked of the engine ----------------------------------------------------------------------------------

    def _check(self, asked: Asked) -> None:
        """What can be told before anything is decoded."""
        if self.engine.queued >= self.engine.limits.queue:
            raise queue_full()
        most = self.engine.limits.answer_tokens
        if (asked.most_tokens or 0) > most:
            name = "max_tokens" if asked.max_tokens is not None else "max_completion_tokens"
            raise Problem(
                f"{asked.most_tokens:,} is too large: answers have up to {most:,} tokens here",
                param=name,
                code="invalid_value",
            )

    def _sampling(self, asked: Asked, number: int, logprobs: bool, top: int) -> Sampling:
        return Sampling(
            max_tokens=asked.most_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=asked.seed_of(number),
            stop=asked.stop or (),
            logprobs=logprobs,
            top_logprobs=top,
            frequency_penalty=asked.frequency_penalty or 0.0,
            presence_penalty=asked.presence_penalty or 0.0,
            repetition_penalty=asked.repetition_penalty,
        )

    def _of_prompt(self, own: Own, keywords: Mapping[str, Any] | None) -> dict[str, Any]:
        """Arguments of `Request` beside messages and sampling."""
        template = own.template if keywords is None else keywords
        where = "alula.template" if keywords is None else "chat_template_kwargs"
        return {
            "deadline": own.deadline,
            "template": None if not template else _alula_says(where, TemplateSettings, template),
            "highlight": None if own.highlight is None else _highlighted(own.highlight),
            "image_tokens": own.image_tokens,
            "policies": None if not own.policies else _policies(own.policies),
            "attention": own.attention,
        }

    async def _in_thread(self, call: Callable[[Request], Any], request: Request) -> Any:
        return await to_thread.run_sync(call, request, limiter=self._preparing)

    # -- answers ------------------------------------------------------------------------------------------------------

    async def _answered(
        self, asked: Asked, requests: Sequence[Request], frame: Frame, receive: Receive, *, prompts: int
    ) -> Response:
        """Ask, and answer whole or in pieces.

        Args:
            prompts: that are read: of every model, each text once.
        """
        choices: list[Choice] = []
        async with _watched(receive) as gone:
            try:
                for request in requests:
                    handle = await self._in_thread(self.engine.submit, request)
                    choices.append(Choice(request.model, handle, request.deadline))
                if asked.stream:
                    stream = _Stream(choices, frame, self.metrics, prompts)
                    await _first(stream.begin(), gone)
                    return Events(stream, self.settings.stalled_seconds)
                collecting = asyncio.gather(*(self._collected(choice) for choice in choices))
                answers = await _first(collecting, gone)
            except BaseException:
                for choice in choices:
                    choice.handle.cancel()
                raise
        return JSONResponse(frame.response(answers, [choice.model for choice in choices], prompts))

    async def _collected(self, choice: Choice) -> Collected:
        text: list[str] = []
        logprobs: list[TokenLogprob] = []
        attention: list[list[Look]] = []
        async for each in choice.handle:
            if isinstance(each, Finished):
                self.metrics.finished(choice.model, each)
                if each.reason == "deadline":
                    raise deadline_passed(choice.deadline or self.engine.limits.deadline)
                return Collected(each, "".join(text), logprobs, attention)
            text.append(each.text)
            logprobs += each.logprobs or []
            attention += each.attention or []
        raise AssertionError("an answer without an end")


class _Stream:
    """The events of all choices in the order they come in."""

    def __init__(self, choices: Sequence[Choice], frame: Frame, metrics: Metrics, prompts: int) -> None:
        self.choices, self.frame, self._metrics, self._prompts = choices, frame, metrics, prompts
        self._found: asyncio.Queue[tuple[int, Delta | Finished | Problem]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._first: tuple[int, Delta | Finished | Problem] | None = None

    async def begin(self) -> None:
        """Wait for the first event: until then, what goes wrong has a status of its own.

        Raises:
            Problem: it went wrong.
        """
        self._tasks = [asyncio.create_task(self._read(number)) for number in range(len(self.choices))]
        try:
            self._first = await self._found.get()
            problem = self._problem(*self._first)
            if problem is not None:
                raise problem
        except BaseException:
            self.close()
            raise

    async def _read(self, number: int) -> None:
        choice = self.choices[number]
        try:
            async for each in choice.handle:
                if isinstance(each, Finished):
                    self._metrics.finished(choice.model, each)
                self._found.put_nowait((number, each))
        except Exception as error:
            self._found.put_nowait((number, problem_of(error)))

    def _problem(self, number: int, found: Delta | Finished | Problem) -> Problem | None:
        if isinstance(found, Finished) and found.reason == "deadline":
            return deadline_passed(self.choices[number].deadline)
        return found if isinstance(found, Problem) else None

    async def sent(self) -> AsyncIterator[bytes]:
        """What goes out."""
        frame = self.frame
        lengths = [0] * len(self.choices)
        ends: dict[int, Finished] = {}
        if frame.is_chat:
            for number in range(len(self.choices)):
                yield frame.begun(number)
        while len(ends) < len(self.choices):
            if self._first is not None:
                (number, found), self._first = self._first, None
            else:
                try:
                    number, found = await asyncio.wait_for(self._found.get(), _PULSE)
                except TimeoutError:
                    yield b": still there\n\n"
                    continue
            problem = self._problem(number, found)
            if problem is not None:
                yield event(problem.body())
                return
            if isinstance(found, Finished):
                ends[number] = found
                yield frame.ended(number, found, self.choices[number].model)
            elif isinstance(found, Delta):
                piece = frame.piece(number, found, lengths[number])
                lengths[number] += len(found.text)
                if piece is not None:
                    yield piece
        if frame.has_usage:
            yield frame.told([ends[number] for number in range(len(self.choices))], self._prompts)
        yield DONE

    def close(self) -> None:
        """Let go of what is still on its way."""
        for choice in self.choices:
            choice.handle.cancel()
        for task in self._tasks:
            task.cancel()


class Events(Response):
    """A response of server-sent events. A client that goes away, or takes nothing for a while, ends its answer.

    Args:
        stream: begun.
        stalled: seconds for which one piece may wait to be taken.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: _Stream, stalled: float) -> None:
        self._stream, self._stalled = stream, stalled
        self.status_code, self.background = 200, None
        self.init_headers({"x-accel-buffering": "no"})  # proxies are to hand pieces on as they come

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def all_sent() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._stream.sent():
                async with asyncio.timeout(self._stalled):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            async with _watched(receive) as gone:
                with contextlib.suppress(ClientGone, TimeoutError):
                    await _first(all_sent(), gone)
        finally:
            self._stream.close()


class ClientGone(Exception):  # noqa: N818 - nothing went wrong here
    """The client closed its connection."""


@contextlib.asynccontextmanager
async def _watched(receive: Receive) -> AsyncIterator[asyncio.Task[None]]:
    """A task that is done when the client goes away."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(watch())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _first(work: Awaitable[Any], gone: asyncio.Task[None]) -> Any:
    """What `work` gives.

    Raises:
        ClientGone: the client went away before.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _tells_usage(asked: Asked) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage


def _highlighted(found: HighlightIn) -> Highlighted:
    spans = [
        _alula_says(f"alula.highlight.spans[{number}]", Span, **each.model_dump(exclude_unset=True))
        for number, each in enumerate(found.spans)
    ]
    regions = []
    for number, each in enumerate(found.regions):
        where, more = f"alula.highlight.regions[{number}]", {"weight": each.weight, "share": each.share}
        if each.box is not None:
            region: Any = _alula_says(where, Box, *each.box, image=each.item, **more)
        else:
            region = _alula_says(where, Polygon, each.polygon, image=each.item, **more)
        regions.append(region)
    return Highlighted(spans=spans, regions=regions, strength=found.strength, guidance=found.guidance)


def _policies(given: Mapping[str, Mapping[str, Any]]) -> dict[str, Policy]:
    try:
        return policies_from(given, where="policies")
    except AlulaError as error:
        param = f"alula.{error.where}".replace(": ", ".")
        raise Problem(error.message, param=param, code="invalid_value", remedy=error.remedy) from None


def _alula_says(param: str, make: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What `make` makes of a field; what it refuses, refused of that field."""
    try:
        return make(*given, **named)
    except AlulaError as error:
        raise refused(error, param) from None


def _size(part: Mapping[str, Any]) -> dict[str, int | None]:
    value = part[part["type"]]
    if part["type"] == "image":
        return {"width": value.width, "height": value.height}
    return {"width": None, "height": None}
