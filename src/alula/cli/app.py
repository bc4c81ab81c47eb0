"""The ``alula`` command: one file per verb, no logic here beyond reporting errors the same way for all of them."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import alula
from alula.allocator import keep_freed_memory
from alula.errors import AlulaError

app = typer.Typer(
    name="alula",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="alula --debug VERB ... shows the traceback of an error.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# each module registers its command(s) in `register(app)`; the order is the order of `alula --help`
VERBS = ("quickstart", "train", "evaluate", "audit", "chat", "data", "import_", "fledgling", "study")


def _tell(version: bool) -> None:
    if version:
        typer.echo(f"alula {alula.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_tell, is_eager=True, help="Say which one.")] = False,
) -> None:
    """Give a language model eyes without costing it its words."""


def _register() -> None:
    for verb in VERBS:
        importlib.import_module(f"alula.cli.{verb}").register(app)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage."""
    _register()
    keep_freed_memory()
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console(stderr=True)
    try:
        app()
    except AlulaError as error:
        if debug:
            traceback.print_exc()
        where = f"[bold]{escape(error.where)}[/bold]: " if error.where else ""
        console.print(f"[bold red]error[/bold red] {where}{escape(error.message)}", highlight=False, soft_wrap=True)
        if error.remedy:
            console.print(f"[bold]remedy[/bold] {escape(error.remedy)}", highlight=False, soft_wrap=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise SystemExit(130) from None
