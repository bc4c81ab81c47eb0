"""The application: routes, and what they lead to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.routing import Route

import alula
from alula.errors import AlulaError, quoted
from alula.policies import policy_types
from alula.serving.engine import Engine
from alula.serving.http import bodies, schema
from alula.serving.http.answering import Answering, ClientGone
from alula.serving.http.door import GONE, SIGNED, Door
from alula.serving.http.failures import problem_of
from alula.serving.http.fetching import Fetcher
from alula.serving.http.loading import Loading
from alula.serving.http.media import FORMATS, MediaIntake, format_of
from alula.serving.http.metrics import Metrics
from alula.serving.http.places import Place, Places
from alula.serving.http.problems import Problem
from alula.serving.http.runs import POLICY, Runs
from alula.serving.http.settings import Settings
from alula.serving.http.shapes import model_of
from alula.serving.http.static import page
from alula.serving.http.uploads import Uploads

OWN = "/alula/v1"
Samples = Callable[[], list[dict[str, Any]]]
S = TypeVar("S", bound=schema.Schema)


def application(
    engine: Engine,
    settings: Settings | None = None,
    *,
    fetcher: Fetcher | None = None,
    samples: Samples = list,
) -> FastAPI:
    """The server as an ASGI application; it closes the engine when it stops.

    Args:
        engine: that answers, its models loaded.
        settings: who may ask, and what for.
        fetcher: of what lies in the web; by default one of the settings' own.
        samples: what the page offers where nothing was said yet.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await to_thread.run_sync(engine.close)

    # its own pages of documentation load scripts from elsewhere
    app = FastAPI(title="alula", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    routes = _Routes(engine, settings, fetcher, samples)
    for method, path, endpoint in routes.all():
        heads = {"HEAD"} if method == "GET" else set()
        app.add_api_route(path, endpoint, methods=[method, *heads], response_model=None)
        # before the page's files, which have all other paths
        app.router.routes.append(Route(path, _ByAnotherMethod(sorted({method, *heads}))))
    app.mount("/", page())
    app.add_middleware(Door, settings=settings, metrics=routes.metrics)
    for kind in (AlulaError, ClientGone, bodies.GoneError, HTTPException, Exception):
        app.add_exception_handler(kind, _told)
    return app


class _ByAnotherMethod:
    """An ASGI application, since a route to one takes whatever method there is.

    Args:
        methods: that the path is asked with.
    """

    def __init__(self, methods: list[str]) -> None:
        self._methods = methods

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raise Problem(
            f"this is asked with {' or '.join(self._methods)}",
            status=405,
            code="method_not_allowed",
            headers={"allow": ", ".join(self._methods)},
        )


async def _told(request: Request, error: Exception) -> Response:
    """An error as it is answered."""
    if isinstance(error, ClientGone | bodies.GoneError):
        return Response(status_code=GONE)  # nobody reads it; metrics count it
    if isinstance(error, HTTPException):  # of the router: no such path, or not by this method
        path = request.url.path
        if error.status_code == 404 or path.startswith(("/v1/", f"{OWN}/")):  # theirs are told by `_ByAnotherMethod`
            error = Problem(f"there is no {quoted(path)} here", status=404, code="not_found")
        else:
            code = "method_not_allowed" if error.status_code == 405 else None
            error = Problem(str(error.detail).lower(), status=error.status_code, code=code, headers=error.headers)
    problem = problem_of(error)
    return JSONResponse(problem.body(), problem.status, headers=problem.headers)


class _Routes:
    """What is answered, path by path."""

    def __init__(self, engine: Engine, settings: Settings, fetcher: Fetcher | None, samples: Samples) -> None:
        self.engine, self.settings, self._samples = engine, settings, samples
        self.places = Places(
            engine, most_bytes=_LARGEST * settings.body_bytes, most_pixels=_LARGEST * settings.pixels_per_request
        )
        self.metrics = Metrics(engine, [path for _, path, _ in self.all()], lambda: self.places.waiting)
        self.uploads = Uploads(most=settings.uploads, most_bytes=settings.upload_bytes, seconds=settings.upload_seconds)
        fetcher = fetcher or Fetcher(settings.allowed, most=settings.media_bytes)
        self.media = MediaIntake(settings, engine.limits, fetcher, self.uploads)
        self.answering = Answering(engine, settings, self.media, self.metrics)
        self.loading = Loading(engine, settings)
        self.runs = Runs(settings.runs, SIGNED)

    def all(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """Method, path and function of each."""
        return [
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.told_metrics),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/completions", self.completion),
            ("GET", f"{OWN}/server", self.server),
            ("POST", f"{OWN}/preview", self.preview),
            ("GET", f"{OWN}/samples", self.samples),
            ("POST", f"{OWN}/uploads", self.upload),
            ("DELETE", f"{OWN}/uploads/{{name}}", self.drop_upload),
            ("GET", f"{OWN}/adapters", self.adapters),
            ("POST", f"{OWN}/models/load", self.load),
            ("POST", f"{OWN}/models/unload", self.unload),
            ("GET", f"{OWN}/runs", self.list_runs),
            ("GET", f"{SIGNED}{{path:path}}", self.report),
        ]

    # -- OpenAI's -----------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        with self.places.take() as place:
            # no name for what was asked: its media would be kept as long as it is answered
            return await self.answering.chat(
                schema.read(schema.ChatAsked, await self._json(request, place)), request.receive, place
            )

    async def completion(self, request: Request) -> Response:
        with self.places.take() as place:
            return await self.answering.completion(
                schema.read(schema.TextAsked, await self._json(request, place)), request.receive, place
            )

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [model_of(each) for each in self.engine.models()]})

    async def model(self, name: str) -> Response:
        return JSONResponse(model_of(self.answering.served(name)))

    async def health(self) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "models": len(self.engine.models()),
                "queued": self.places.waiting,
                "running": self.engine.running,
            }
        )

    async def told_metrics(self) -> Response:
        text, kind = self.metrics.text()
        return Response(text, headers={"content-type": kind})

    # -- alula's own --------------------------------------------------------------------------------------------------

    async def server(self) -> Response:
        settings, limits = self.settings, self.engine.limits
        return JSONResponse(
            {
                "version": alula.__version__,
                "demo": settings.demo,
                "token": settings.token is not None,
                "may_load": settings.may_load,
                "runs": settings.runs is not None,
                "fetches": settings.allowed.names,
                "policies": list(policy_types()),
                "formats": {medium: list(names) for medium, names in FORMATS.items()},
                "limits": {
                    "prompt_tokens": limits.prompt_tokens,
                    "answer_tokens": limits.answer_tokens,
                    "images_per_request": limits.images_per_request,
                    "pixels_per_image": limits.pixels_per_image,
                    "seconds_per_sound": settings.seconds_per_sound,
                    "body_bytes": settings.body_bytes,
                    "media_bytes": settings.media_bytes,
                    "deadline": limits.deadline,
                    "n": schema.MOST_CHOICES,
                },
            }
        )

    async def preview(self, request: Request) -> Response:
        with self.places.take() as place:
            asked = schema.read(schema.PreviewAsked, await self._json(request, place))
            return JSONResponse(await self.answering.preview(asked, request.receive, place))

    async def samples(self) -> Response:
        return JSONResponse({"samples": await to_thread.run_sync(self._samples)})

    async def upload(self, request: Request) -> Response:
        with self.places.take() as place:
            return await self._kept(await self._uploaded(request, place))

    async def _kept(self, content: bytes) -> Response:
        medium = next((each for each in ("image", "audio") if format_of(each, content)), None)
        if medium is None:
            read = ", ".join(dict.fromkeys(name for each in FORMATS.values() for name in each))
            raise Problem(
                "this is nothing of a format that is read", param="file", code="invalid_media", remedy=f"send {read}"
            )
        value = await self.media.decoded(medium, content, "file", {})
        facts = {"width": value.width, "height": value.height} if medium == "image" else {"samples": len(value)}
        upload = self.uploads.put(medium, content, facts)
        # nobody may ask for uploads again: they go by the clock, a moment after they expired
        asyncio.get_running_loop().call_later(self.uploads.seconds + 1, self.uploads.sweep)
        return JSONResponse(upload.told(), 201)

    async def drop_upload(self, name: str) -> Response:
        self.uploads.drop(name)
        return Response(status_code=204)

    async def adapters(self) -> Response:
        return JSONResponse(await to_thread.run_sync(self.loading.listed))

    async def load(self, request: Request) -> Response:
        with self.places.take() as place:
            asked = schema.read(schema.LoadAsked, await self._json(request, place))
        return JSONResponse(model_of(await self.loading.load(asked)), 201)

    async def unload(self, request: Request) -> Response:
        with self.places.take() as place:
            asked = schema.read(schema.UnloadAsked, await self._json(request, place))
        await self.loading.unload(asked.name)
        return JSONResponse({"name": asked.name, "unloaded": True})

    async def list_runs(self) -> Response:
        return JSONResponse(await to_thread.run_sync(self.runs.listed))

    async def report(self, path: str, key: str = "") -> Response:
        content = await to_thread.run_sync(self.runs.read, path, key)
        return Response(
            content, headers={"content-type": "text/html; charset=utf-8", "content-security-policy": POLICY}
        )

    # -- bodies -------------------------------------------------------------------------------------------------------

    async def _json(self, request: Request, place: Place) -> Mapping[str, Any]:
        _check_kind(request, "application/json", "send JSON, and say so: Content-Type: application/json")
        body = await self._body(request, self.settings.body_bytes, place)
        return await to_thread.run_sync(bodies.parsed, body) if len(body) > _LARGE else bodies.parsed(body)

    async def _body(self, request: Request, most: int, place: Place) -> bytes:
        stated = request.headers.get("content-length", "0")
        if not stated.isdecimal() or int(stated[:18]) > most:
            raise bodies.too_large(most)
        found = await bodies.read(request.receive, most=most, seconds=self.settings.body_seconds, hold=place.hold)
        place.whole()
        return found

    async def _uploaded(self, request: Request, place: Place) -> bytes:
        """The one file of a form."""
        _check_kind(request, "multipart/form-data", "send a form with one field, file: curl -F file=@picture.png")
        body = await self._body(request, self.settings.media_bytes + _FORM, place)

        async def again() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            async with Request(request.scope, again).form(max_files=1, max_fields=0) as form:
                file = form.get("file")
                if file is None or isinstance(file, str):
                    raise Problem("the form has no file of that name", param="file", code="missing_required_parameter")
                return await file.read()
        except (MultiPartException, HTTPException) as error:
            said = getattr(error, "message", None) or getattr(error, "detail", "")
            raise Problem(f"the form cannot be read: {said}", param="file", code="invalid_form") from None


def _check_kind(request: Request, wanted: str, remedy: str) -> None:
    """Refuse a body that says to be of another type, and what stands behind the address besides."""
    if request.url.query:
        raise Problem(
            f"{request.url.path} takes a body and no query",
            code="unknown_parameter",
            remedy="put the fields into the body",
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise Problem(
            f"a body in {quoted(encoding, 40)} is not read",
            status=415,
            param="Content-Encoding",
            code="unsupported_media_type",
            remedy="send it as it is, not compressed",
        )
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        raise Problem(
            f"{kind[:80]!r} is no type of body that is read here",
            status=415,
            param="Content-Type",
            code="unsupported_media_type",
            remedy=remedy,
        )


_LARGEST = 4
"""requests as large as may be whose bodies, or pictures, are held at once"""
_LARGE = 1 << 20
"""bytes of JSON that are parsed beside the event loop"""
_FORM = 1 << 16
"""bytes of a form around its file"""
