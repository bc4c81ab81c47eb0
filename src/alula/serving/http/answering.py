"""From requests to answers: what is asked of the engine, and what becomes of clients that go away or take nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
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
from alula.serving.http.failures import deadline_passed, problem_of
from alula.serving.http.media import MediaIntake
from alula.serving.http.metrics import Metrics
from alula.serving.http.places import Place, give_back
from alula.serving.http.problems import Problem, refused
from alula.serving.http.schema import Asked, ChatAsked, HighlightIn, Message, Own, PreviewAsked, TextAsked
from alula.serving.http.settings import Settings
from alula.serving.http.shapes import DONE, Collected, Frame, event
from alula.steering import Box, Polygon, Span

_READING, _SEEING = 4, 2
"""requests without and with media that are prepared at once, in threads beside the event loop: many pictures of some
do not keep words of others waiting, and no more of them are decoded than are prepared"""


@dataclass(frozen=True)
class Choice:
    """An answer on its way.

    Attributes:
        model: that was asked.
        handle: of the engine.
    """

    model: str
    handle: Handle


class Answering:
    """Asks the engine what clients ask.

    Args:
        engine: that answers.
        media: that takes what is shown.
        metrics: that count.
    """

    def __init__(self, engine: Engine, settings: Settings, media: MediaIntake, metrics: Metrics) -> None:
        self.engine, self.settings, self.media, self.metrics = engine, settings, media, metrics
        self._reading, self._seeing = CapacityLimiter(_READING), CapacityLimiter(_SEEING)
        self._threads = CapacityLimiter(_READING + _SEEING)

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

    async def chat(self, asked: ChatAsked, receive: Receive, place: Place) -> Response:
        """The answer to ``/v1/chat/completions``.

        Args:
            place: of the request.

        Raises:
            Problem: it cannot be asked so.
        """
        self._check(asked)
        models = self._models(asked)
        shared = self._of_prompt(asked.own, asked.chat_template_kwargs)
        messages, asked = asked.messages, asked.model_copy(update={"messages": ()})
        choices = asked.n or 1

        async def prepare(asking: Asking, shown: Sequence[Message]) -> None:
            fetched = await self.media.fetched(shown, place)
            known: list[tuple[Mapping[str, Any], list[dict[str, Any]]]] = []
            async with asking.turn(self._seeing if self.media.count(shown) else self._reading):
                for served in models:
                    taken = next((each for loading, each in known if loading == served.loading), None)
                    if taken is None:
                        taken = await self.media.taken(shown, served.loading, fetched, place)
                        known.append((served.loading, taken))
                    for _ in range(choices):
                        number = len(asking.choices)
                        sampling = self._sampling(asked, number, bool(asked.logprobs), asked.top_logprobs or 0)
                        await self._ask(asking, Request(served.name, messages=taken, sampling=sampling, **shared))

        asking = self._asking(asked.own, place)
        asking.begin(prepare(asking, messages))
        del messages  # media go with them, once they are prepared
        frame = Frame(asked.model, True, bool(asked.logprobs), _tells_usage(asked))
        names = [served.name for served in models for _ in range(choices)]
        return await self._answered(asked, asking, names, frame, receive, prompts=len(models))

    async def completion(self, asked: TextAsked, receive: Receive, place: Place) -> Response:
        """The answer to ``/v1/completions``.

        Args:
            place: of the request.

        Raises:
            Problem: it cannot be asked so.
        """
        self._check(asked)
        models = self._models(asked)
        if len(models) > 1 and len(asked.prompt) > 1:
            raise Problem("is taken with one prompt", param="alula.compare", code="invalid_value")
        prompts = asked.prompt
        names = [served.name for _ in prompts for served in models for _ in range(asked.n or 1)]

        async def prepare(asking: Asking) -> None:
            async with asking.turn(self._reading):
                for number, name in enumerate(names):
                    sampling = self._sampling(asked, number, asked.logprobs is not None, asked.logprobs or 0)
                    prompt = prompts[number * len(prompts) // len(names)]
                    given = Request(name, prompt=prompt, sampling=sampling, deadline=asked.own.deadline)
                    await self._ask(asking, given)

        asking = self._asking(asked.own, place)
        asking.begin(prepare(asking))
        frame = Frame(asked.model, False, asked.logprobs is not None, _tells_usage(asked))
        return await self._answered(asked, asking, names, frame, receive, prompts=len(prompts) * len(models))

    async def preview(self, asked: PreviewAsked, receive: Receive, place: Place) -> dict[str, Any]:
        """What ``/alula/v1/preview`` tells of a prompt, without an answer.

        Args:
            place: of the request.

        Raises:
            Problem: it cannot be asked so.
        """
        served = self.served(asked.model)
        shared = self._of_prompt(asked.alula or Own(), None)
        found: list[tuple[Preview, list[dict[str, int | None]]]] = []

        async def prepare(asking: Asking) -> None:
            fetched = await self.media.fetched(asked.messages, place)
            async with asking.turn(self._seeing if self.media.count(asked.messages) else self._reading):
                messages = await self.media.taken(asked.messages, served.loading, fetched, place)
                request = Request(served.name, messages=messages, **shared)
                preview = await to_thread.run_sync(self.engine.preview, request, limiter=self._threads)
                sizes = [_size(part) for each in messages for part in each["content"] if part["type"] != "text"]
                found.append((preview, sizes))

        asking = self._asking(asked.alula or Own(), place)
        asking.begin(prepare(asking))
        async with _watched(receive) as gone:
            try:
                await _first(asking.ready(), gone)
            finally:
                asking.close()
        preview, sizes = found[0]
        is_each = len(sizes) == len(preview.images)
        return {
            "prompt_tokens": preview.prompt_tokens,
            "context": served.context,
            "images": [
                {
                    "tokens": each.tokens,
                    "kept": each.kept,
                    "grid": None if each.grid is None else list(each.grid),
                    **(sizes[number] if is_each else {"width": None, "height": None}),
                }
                for number, each in enumerate(preview.images)
            ],
        }

    # -- what is asked of the engine ----------------------------------------------------------------------------------

    def _check(self, asked: Asked) -> None:
        """What can be told before anything is decoded."""
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
            top_k=0 if asked.top_k == -1 else asked.top_k,  # as vLLM's clients say "of all"
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

    def _models(self, asked: Asked) -> list[Served]:
        models = [self.served(asked.model)]
        return models + [self.served(name, f"alula.compare[{i}]") for i, name in enumerate(asked.own.compare)]

    def _asking(self, own: Own, place: Place) -> Asking:
        deadlines = [each for each in (own.deadline, self.engine.limits.deadline) if each is not None]
        return Asking(place, min(deadlines, default=None), has_marks=own.highlight is not None)

    async def _ask(self, asking: Asking, request: Request) -> None:
        def submit() -> None:
            asking.check()
            asking.place.enter()
            asking.add(Choice(request.model, self.engine.submit(request, arrived=asking.place.arrived)))

        await to_thread.run_sync(submit, limiter=self._threads)

    # -- answers ------------------------------------------------------------------------------------------------------

    async def _answered(
        self, asked: Asked, asking: Asking, models: Sequence[str], frame: Frame, receive: Receive, *, prompts: int
    ) -> Response:
        """Answer whole or in pieces.

        Args:
            models: that each choice is asked of.
            prompts: that are read: of every model, each text once.
        """
        async with _watched(receive) as gone:
            try:
                if asked.stream:
                    stream = _Stream(asking, models, frame, self.metrics, prompts, self.settings.pulse_seconds)
                    await _first(stream.begin(), gone)
                    return Events(stream, self.settings.stalled_seconds)
                answers = await _first(self._whole(asking), gone)
            except BaseException:
                asking.close()
                raise
        asking.close()
        return JSONResponse(frame.response(answers, models, prompts))

    async def _whole(self, asking: Asking) -> list[Collected]:
        await asking.ready()
        return await asyncio.gather(*(self._collected(choice, asking.deadline) for choice in asking.choices))

    async def _collected(self, choice: Choice, deadline: float | None) -> Collected:
        text: list[str] = []
        logprobs: list[TokenLogprob] = []
        attention: list[list[Look]] = []
        async for each in choice.handle:
            if isinstance(each, Finished):
                self.metrics.finished(choice.model, each)
                if each.reason == "deadline":
                    raise deadline_passed(deadline)
                return Collected(each, "".join(text), logprobs, attention)
            text.append(each.text)
            logprobs += each.logprobs or []
            attention += each.attention or []
        raise AssertionError("an answer without an end")


class Asking:
    """A request on its way to the engine. It is prepared to its end whatever becomes of who waits for it, since threads
    cannot be stopped; but for nobody nothing is begun.

    Args:
        place: of the request.
        deadline: seconds from its arrival.
        has_marks: its pictures are needed until it is answered.

    Attributes:
        choices: that the engine was given, in order.
    """

    def __init__(self, place: Place, deadline: float | None, *, has_marks: bool) -> None:
        self.place, self.deadline, self._has_marks = place, deadline, has_marks
        self.choices: list[Choice] = []
        self._task: asyncio.Task[None] | None = None
        self._is_closed = self._waits = False
        place.keep()

    def begin(self, preparing: Coroutine[Any, Any, None]) -> None:
        """Prepare it."""

        async def prepared() -> None:
            try:
                await preparing
            finally:
                is_large = self.place.is_large
                self.place.leave()
                if not self._has_marks:
                    self.place.close()
                if is_large:
                    await to_thread.run_sync(give_back)

        self._task = asyncio.create_task(prepared())
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # there may be nobody to see it

    @contextlib.asynccontextmanager
    async def turn(self, limiter: CapacityLimiter) -> AsyncIterator[None]:
        """Wait for its turn.

        Raises:
            ClientGone: nobody waits for it any more.
        """
        self._waits = True
        async with limiter:
            self._waits = False
            self.check()
            yield

    def check(self) -> None:
        """Raises:
        ClientGone: nobody waits for it any more.
        """
        if self._is_closed:
            raise ClientGone

    def add(self, choice: Choice) -> None:
        """Take a choice of the engine's."""
        self.choices.append(choice)
        if self._is_closed:
            choice.handle.cancel()

    async def ready(self) -> None:
        """Wait until the engine has all of it.

        Raises:
            Problem: it was refused; its deadline passed.
        """
        assert self._task is not None
        left = None if self.deadline is None else self.place.arrived + self.deadline - time.monotonic()
        try:
            async with asyncio.timeout(left):
                await asyncio.shield(self._task)
        except TimeoutError:
            self.close()
            raise deadline_passed(self.deadline) from None

    def close(self) -> None:
        """Let go of what is still on its way."""
        self._is_closed = True
        for choice in self.choices:
            choice.handle.cancel()
        if self._task is not None and self._waits:
            self._task.cancel()
        if self._task is None or self._task.done():
            self.place.close()


class _Stream:
    """The events of all choices in the order they come in."""

    def __init__(
        self, asking: Asking, models: Sequence[str], frame: Frame, metrics: Metrics, prompts: int, pulse: float
    ) -> None:
        self.asking, self.models, self.frame = asking, models, frame
        self._metrics, self._prompts, self._pulse = metrics, prompts, pulse
        self._found: asyncio.Queue[tuple[int, Delta | Finished | Problem]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._first: tuple[int, Delta | Finished | Problem] | None = None
        self._is_begun = False

    async def begin(self) -> None:
        """Wait for the first event, no longer than for a pulse: until then, what goes wrong has a status of its own.

        Raises:
            Problem: it went wrong.
        """
        self._tasks = [asyncio.create_task(self._open())]
        try:
            with contextlib.suppress(TimeoutError):
                self._first = await asyncio.wait_for(self._found.get(), self._pulse)
            problem = None if self._first is None else self._problem(*self._first)
            if problem is not None:
                raise problem
        except BaseException:
            self.close()
            raise

    async def _open(self) -> None:
        try:
            await self.asking.ready()
        except ClientGone:
            return
        except Exception as error:
            self._found.put_nowait((0, problem_of(error)))
        else:
            self._tasks += [asyncio.create_task(self._read(number)) for number in range(len(self.models))]

    async def _read(self, number: int) -> None:
        choice = self.asking.choices[number]
        try:
            async for each in choice.handle:
                if isinstance(each, Finished):
                    self._metrics.finished(choice.model, each)
                self._found.put_nowait((number, each))
        except Exception as error:
            self._found.put_nowait((number, problem_of(error)))

    def _problem(self, number: int, found: Delta | Finished | Problem) -> Problem | None:
        if isinstance(found, Finished) and found.reason == "deadline":
            return deadline_passed(self.asking.deadline, is_streamed=self._is_begun)
        return found if isinstance(found, Problem) else None

    async def sent(self) -> AsyncIterator[bytes]:
        """What goes out."""
        frame, count = self.frame, len(self.models)
        self._is_begun = True
        lengths = [0] * count
        ends: dict[int, Finished] = {}
        if frame.is_chat:
            for number in range(count):
                yield frame.begun(number)
        while len(ends) < count:
            if self._first is not None:
                (number, found), self._first = self._first, None
            else:
                try:
                    number, found = await asyncio.wait_for(self._found.get(), self._pulse)
                except TimeoutError:
                    yield b": still there\n\n"
                    continue
            problem = self._problem(number, found)
            if problem is not None:
                yield event(problem.body())
                return
            if isinstance(found, Finished):
                ends[number] = found
                yield frame.ended(number, found, self.models[number])
            elif isinstance(found, Delta):
                piece = frame.piece(number, found, lengths[number])
                lengths[number] += len(found.text)
                if piece is not None:
                    yield piece
        if frame.has_usage:
            yield frame.told([ends[number] for number in range(count)], self._prompts)
        yield DONE

    def close(self) -> None:
        """Let go of what is still on its way."""
        for task in self._tasks:
            task.cancel()
        self.asking.close()


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
