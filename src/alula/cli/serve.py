"""``alula serve``: models over HTTP, as OpenAI's clients ask, and a page."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alula.cli.options import BankDirectory

if TYPE_CHECKING:
    from alula.serving.engine import Engine
    from alula.serving.http import Settings

TOKEN = "ALULA_SERVE_TOKEN"
"""environment variable that holds the token; on a command line every user of the machine could read it"""
DEMO = "fledgling"
REAL = "ALULA_REAL"
"""environment variable that names a directory of `alula real prepare`"""


def register(app: typer.Typer) -> None:
    """Add ``serve``."""
    app.command()(serve)


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL...",
            help="Model and adapter directories, hub ids, names that packages bring; an adapter is called BASE+NAME.",
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Serve the fledgling, questions to try, and what ALULA_REAL holds.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help=f"File with the token that clients have to show. (default: ${TOKEN}; none)",
        ),
    ] = None,
    server_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name the server is asked under, as a proxy's. Repeatable."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Origin whose pages may ask, as https://example.org. Repeatable."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Host of the web that media may be fetched from. Repeatable."),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIRECTORY", exists=True, file_okay=False, help="What --allow-load may load from."),
    ] = None,
    allow_load: Annotated[
        bool, typer.Option("--allow-load", help="Models below --adapters may be loaded and unloaded by request.")
    ] = False,
    runs: Annotated[
        Path | None,
        typer.Option(metavar="DIRECTORY", exists=True, file_okay=False, help="Show the reports and audits in it."),
    ] = None,
    bank: BankDirectory = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=1, help="How many demonstrations of the bank. (default: all)"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: a GPU if there is one)")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: the checkpoint's)")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that wait at most; others are told 429.")] = 256,
    running: Annotated[int, typer.Option(min=1, help="Requests that are computed at once.")] = 64,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt. (default: the model's context)")
    ] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1024,
    prefix_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens kept of earlier requests, for turns that go on from them.")
    ] = 32_768,
    prefix_memory: Annotated[int, typer.Option(min=0, help="Megabytes that these take at most.")] = 2_048,
    media: Annotated[int, typer.Option(min=0, help="Pictures, sounds and films of a request.")] = 16,
    pixels: Annotated[int, typer.Option(min=1, help="Pixels of a picture.")] = 25_000_000,
    body: Annotated[int, typer.Option(min=1, help="Megabytes of a request.")] = 64,
    connections: Annotated[
        int | None,
        typer.Option(
            min=1, help="Connections at once; others are told 503. (default: 768, if as many files may be open)"
        ),
    ] = None,
    connections_per_address: Annotated[
        int | None,
        typer.Option(min=1, help="Connections from one address; others are told 429. (default: 256)"),
    ] = None,
    deadline: Annotated[float | None, typer.Option(min=0.001, help="Seconds a request has. (default: no end)")] = None,
) -> None:
    """Serve models: OpenAI's API at /v1, a page at /, Prometheus' numbers at /metrics.

    Several models over the same weights: `alula serve base=DIR base+wings=ADAPTER`. Ctrl-C lets running answers end.

    Exit code 130: stopped by Ctrl-C; 143: by SIGTERM; 1: a model that cannot be loaded, a port in use; 2: wrong usage.
    """
    from alula.errors import UsageError

    if not models and not demo:
        raise UsageError("which model?", where="alula serve", remedy="alula serve MODEL, or alula serve --demo")
    if shots is not None and bank is None:
        raise UsageError("shots are taken from a bank", where="--shots", remedy="add --bank DIRECTORY")
    _check_extra()
    from alula.hosts.placement import device_named, dtype_named
    from alula.serving.engine import Engine, Limits
    from alula.serving.http import Connections, Settings, application, listen
    from alula.serving.http import serve as served
    from alula.serving.http.addresses import Allowed
    from alula.serving.http.settings import MEGABYTE, check_exposure, check_origin, own_names

    shown = _token(token_file)
    check_exposure(host, shown)
    settings = Settings(
        token=shown,
        hosts=own_names(host, tuple(server_name or ())),
        origins=frozenset(check_origin(each) for each in allow_origin or ()),
        allowed=Allowed.of(allow_host or ()),
        may_load=allow_load,
        adapters=adapters,
        runs=runs,
        body_bytes=body * MEGABYTE,
        media_bytes=min(body * MEGABYTE, Settings.media_bytes),
        demo=demo,
    )
    limits = Limits(
        queue=queue,
        running=running,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        prefix_tokens=prefix_tokens,
        prefix_bytes=prefix_memory * MEGABYTE,
        images_per_request=media,
        pixels_per_image=pixels,
        deadline=deadline,
    )
    held = Connections.fitting(connections, connections_per_address)
    placed = {"dtype": dtype_named(dtype), "device": device_named(device)}
    named = _named([*(models or ()), *(_prepared() if demo else ())], (DEMO,) if demo else ())
    shown_first = _demonstrations(named, bank, shots)
    listening = listen(host, port)  # before models are loaded: a port in use is told at once
    address = _address(host, listening.getsockname()[1])
    _say_begun(address)
    with (
        _ended_by_sigterm(),
        listening,
        tempfile.TemporaryDirectory(prefix="alula-serve-") as folder,
        Engine(limits) as engine,
        _interrupted_once(),
    ):
        samples = _loaded(engine, named, Path(folder), placed, demo, shown_first)
        app = application(engine, settings, samples=samples)
        served(app, listening, connections=held, ready=lambda: _say_ready(address, engine, settings))


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """In the block SIGTERM ends the process as an exception does, so that nothing is left of it; exit code 143."""

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _interrupted_once() -> Iterator[None]:
    """Once Ctrl-C has ended the block, the process ends: another one does not disturb it at that."""
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise


def _check_extra() -> None:
    """Refuse to begin without the packages that the server is made of.

    Raises:
        UsageError: one is missing.
    """
    from alula.errors import UsageError

    for package in ("fastapi", "uvicorn", "httpx", "prometheus_client", "python_multipart"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"the server needs the package {package.replace('_', '-')}",
                where="alula serve",
                remedy="pip install 'alula[serve]'",
            )


def _token(file: Path | None) -> str | None:
    """The token of a file, or of the environment.

    Raises:
        UsageError: other users of the machine may read the file.
    """
    from alula.errors import UsageError
    from alula.files import telling

    if file is None:
        return os.environ.get(TOKEN) or None
    with telling(file):
        facts = file.stat()
        # as ssh has it with keys; what another user owns (a mounted secret) is that user's to protect
        if hasattr(os, "getuid") and facts.st_uid == os.getuid() and facts.st_mode & 0o077:
            raise UsageError(
                f"other users may use this file: its mode is {stat.S_IMODE(facts.st_mode):04o}",
                where=f"--token-file {file}",
                remedy=f"chmod 600 {file}",
            )
        return file.read_text(encoding="utf-8", errors="replace").strip()


def _prepared() -> list[str]:
    """The language model that `alula real prepare` made, where it did."""
    from alula.real import PARTS

    root = os.environ.get(REAL)
    place = next(part.place for part in PARTS if part.name == "smollm2")
    return [f"real={Path(root) / place}"] if root and (Path(root) / place).is_dir() else []


def _named(models: Sequence[str], before: Sequence[str]) -> list[tuple[str, str]]:
    """(name, place) of what is to be loaded, in that order.

    Args:
        models: as they are given.
        before: names of bases that are loaded before them.

    Raises:
        UsageError: a name is none, or another model's.
    """
    from alula.errors import UsageError
    from alula.serving.http import adapter_name, lineup

    named: list[tuple[str, str]] = []
    for entry in lineup(models):
        taken = [*before, *(name for name, _ in named)]
        bases = [name for name in taken if "+" not in name]
        name = adapter_name(entry, bases) if entry.is_adapter else entry.called
        if name in taken:
            raise UsageError(f"two models are called {name!r}", where=entry.path, remedy=f"name it: OTHER={entry.path}")
        named.append((name, entry.path))
    return named


def _demonstrations(
    named: Sequence[tuple[str, str]], bank: Path | None, shots: int | None
) -> dict[str, dict[str, Any]]:
    """What stands before conversations, as `Engine.load` takes it, by the name of each model that reads it.

    Raises:
        UsageError: there is a bank, and no model reads it.
    """
    from alula.errors import UsageError
    from alula.serving.engine import reads_demonstrations

    if bank is None:
        return {}
    found = {name: {"bank": bank, "shots": shots} for name, path in named if reads_demonstrations(path)}
    if not found:
        raise UsageError(
            "no model that is served reads demonstrations", where="--bank", remedy="name an adapter of method aim"
        )
    return found


def _loaded(
    engine: Engine,
    named: Sequence[tuple[str, str]],
    folder: Path,
    placed: dict[str, Any],
    demo: bool,
    shown: dict[str, dict[str, Any]],
) -> Callable[[], list[dict[str, Any]]]:
    """Load what is served.

    Args:
        named: names and places, bases first.
        folder: for what a demo puts together.
        shown: before conversations, by the name of the model.

    Returns:
        what the page offers to ask.
    """
    from rich.console import Console
    from rich.markup import escape

    from alula.serving.demo import put_together, samples
    from alula.serving.http import offered

    console = Console(stderr=True)
    entries: list[tuple[str, str]] = []
    if demo:
        with console.status("putting the demo together"):
            entries = [(name, str(path)) for name, path in put_together(DEMO, folder)]
    for name, path in [*entries, *named]:
        with console.status(f"loading {escape(name)}"):
            engine.load(name, path, **placed, **shown.get(name, {}))
    return (lambda: offered(samples(folder / DEMO))) if demo else list


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _say_begun(address: str) -> None:
    """Where the server will be, in a log; a terminal shows what is loaded."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:
        console.print(f"loading; it will answer at {address}")


def _say_ready(address: str, engine: Engine, settings: Settings) -> None:
    """Where the server is."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    names = ", ".join(each.name for each in engine.models())
    console.print(f"[bold]{escape(address)}[/bold]  serves {escape(names)}")
    token = "with the token" if settings.token is not None else "any api_key"
    console.print(f"[dim]OpenAI's clients: base_url {escape(address)}/v1, {token}; Ctrl-C stops[/dim]")
