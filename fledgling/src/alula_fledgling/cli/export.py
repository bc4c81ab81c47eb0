"""``alula data export``: the microworld as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.cli.options import ITEMS


def register(app: typer.Typer) -> None:
    """Add ``export`` to ``alula data``."""
    groups = [group.typer_instance for group in app.registered_groups if group.typer_instance is not None]
    next(group for group in groups if group.info.name == "data").command()(export)


def export(
    stream: Annotated[
        str,
        typer.Argument(
            help="Microworld stream: text, visual, caption, dialogue, film, sound, points, depth, motion ..."
        ),
    ],
    directory: Annotated[Path, typer.Argument(help="New folder to write.")],
    form: Annotated[str, typer.Option("--format", help="jsonl (messages) or llava (conversations).")] = "jsonl",
    n: Annotated[int, typer.Option(*ITEMS, min=1, max=MAX_ITEMS, help="Number of items.")] = 1000,
    split: Annotated[str, typer.Option(help="train, test or unseen.")] = "train",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Another seed, other items.")] = 0,
    family: Annotated[list[str] | None, typer.Option(help="Only this family of skill; may be repeated.")] = None,
) -> None:
    """Write microworld items as files with their media, in a format the readers take."""
    from alula_fledgling.export import export_microworld

    path = export_microworld(stream, directory, form=form, n=n, split=split, seed=seed, families=family)
    typer.echo(str(path))
