"""The ``alula`` command: one file per verb, no logic here beyond reporting errors the same way for all of them."""

from __future__ import annotations

import functools
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
import typer.core
import typer.main
from rich.console import Console
from rich.markup import escape

import alula
from alula import plugins
from alula.allocator import keep_freed_memory
from alula.cli.command import command_line
from alula.errors import AlulaError, UsageError, visible


class _Commands(typer.core.TyperGroup):
    """Says which package a command that is not there comes with."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        remedy = plugins.remedy(COMMANDS, args[0]) if args else None
        if remedy is not None and self.get_command(ctx, args[0]) is None:
            raise UsageError(f"`alula {args[0]}` comes with a package that is not installed", remedy=remedy)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="alula",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# each module registers its command(s) in `register(app)`; the order is the order of `alula --help`
VERBS = (
    "train",
    "codes",
    "evaluate",
    "audit",
    "speed",
    "compress",
    "chat",
    "serve",
    "bank",
    "browse",
    "data",
    "import_",
    "exporting",
    "real",
)
COMMANDS = "alula.commands"
"""entry point group of other packages' commands; each is a function that takes the application and adds to it"""


_INTERRUPTED = 130
_PARSING = typer.BadParameter.__mro__[2]
"""the parser's base of errors, click's own or the copy of it that newer releases of typer bring"""


@dataclass
class _Session:
    """What was asked of the command line as a whole."""

    debug: bool = False


def _print_version(version: bool) -> None:
    if version:
        typer.echo(f"alula {alula.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Give a language model eyes without costing it its words."""
    if isinstance(context.obj, _Session):
        context.obj.debug = debug


@functools.cache
def _registered() -> typer.Typer:
    for verb in VERBS:
        importlib.import_module(f"alula.cli.{verb}").register(app)
    for name in plugins.names(COMMANDS):
        plugins.load(COMMANDS, name)(app)
    return app


def main() -> None:
    """Run the command line ``alula``."""
    run(_registered)


def run(make: Callable[[], typer.Typer]) -> None:
    """Run a command line and report its errors. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    session = _Session()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # half surrogates, or an encoding other than UTF-8: shown as escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()  # where it was removed this says so, and some libraries end the process without a word
        commands = _tidied(typer.main.get_command(make()))
        keep_freed_memory()
        code = commands(obj=session, standalone_mode=False)  # what was typed wrong is told by us, below
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if session.debug:
            traceback.print_exc()
        reported = error if isinstance(error, AlulaError) else _as_alula_error(error)
        if reported.message:
            _print_error(reported)
        raise SystemExit(reported.exit_code) from None
    if code == _INTERRUPTED:
        _console().print("stopped")
    raise SystemExit(code if isinstance(code, int) else 0)  # a number is typer.Exit's; commands return nothing


def _as_alula_error(error: Exception) -> AlulaError:
    """An error of another library in one sentence."""
    from alula.files import files_error

    if isinstance(error, _PARSING):
        return _usage_error(error)
    found = files_error(error)
    if found is not None:
        return found
    # data workers send a whole traceback as the text of an error: its last line is the error itself
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    words = lines[-1] if "Traceback (most recent call last)" in str(error) else lines[0]
    kind = type(error).__name__
    if isinstance(error, MemoryError):
        return AlulaError("memory ran out", remedy="ask for smaller batches, fewer workers or a smaller dtype")
    return AlulaError(
        words if words.startswith(kind) else f"{kind}: {words}" if words else kind,
        remedy=f"`{command_line('--debug')}` shows where; alula did not expect this error",
    )


def _tidied(command: Any) -> Any:
    """The command and those below it with help as people read it: lines of a docstring joined to paragraphs, and no
    type named behind a flag, which takes no value."""
    if command.help:
        paragraphs = command.help.split("\n\n")
        command.help = "\n\n".join(" ".join(each.split()) for each in paragraphs)
    for each in command.params:
        if getattr(each, "is_flag", False):
            each.metavar = ""
    for below in getattr(command, "commands", {}).values():
        _tidied(below)
    return command


def _usage_error(error: Any) -> AlulaError:
    """What the parser says of a command line, as any other wrong usage."""
    said = error.format_message().strip().removesuffix(".")
    path = error.ctx.command_path if error.ctx is not None else ""
    if not path:
        return UsageError(said)
    return UsageError(said[:1].lower() + said[1:], where=path, remedy=f"`{path} --help` lists what it takes")


def _print_error(error: AlulaError) -> None:
    def shown(text: str) -> str:
        return escape(visible(text))

    where = f"[bold]{shown(error.where)}[/bold]: " if error.where else ""
    console = _console()
    console.print(f"[bold red]error[/bold red] {where}{shown(error.message)}", highlight=False, soft_wrap=True)
    if error.remedy:
        console.print(f"[bold]remedy[/bold] {shown(error.remedy)}", highlight=False, soft_wrap=True)


def _console() -> Console:
    return Console(stderr=True)


if __name__ == "__main__":  # as recipes once said; `python -m alula` is the shorter way
    main()
