"""``alula bank``: demonstrations encoded once, for whoever shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from alula.bounds import MAX_ITEMS
from alula.cli.options import EARLIER_ITEMS, Template


def register(app: typer.Typer) -> None:
    """Add ``bank``."""
    app.command()(bank)


def bank(
    model: Annotated[str, typer.Argument(help="An adapter directory of method aim.")],
    data: Annotated[
        str,
        typer.Argument(
            help="Conversations with pictures: a file that `alula data check` reads, or a source as recipes name it, "
            "such as microworld:visual,split=train."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The bank's directory; what is there already is not encoded again.")],
    images: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that image paths in a file start from.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(*EARLIER_ITEMS, min=1, max=MAX_ITEMS, help="Conversations that are read. (default: all)"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Demonstrations of one forward.")] = 16,
    template: Template = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: the checkpoint's)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: a GPU if there is one)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON on stdout.")] = False,
) -> None:
    """Fill a bank: each answer to a question about one picture becomes a demonstration, encoded alone.

    Any number of processes may fill one bank. `alula chat` and `alula eval` show what is there: --bank DIRECTORY.

    Exit code 0: done; 1: failed; 2: wrong usage.
    """
    import json
    from functools import partial

    from alula.chat_template import TemplateSettings
    from alula.cli.tasks import source_named
    from alula.demonstrations import Bank, conversations, fill
    from alula.hosts.placement import device_named, dtype_named
    from alula.inputs import Intake
    from alula.loading import load_model
    from alula.progress import bar

    source = source_named(data, where="DATA", images=images)
    settings = TemplateSettings.parse(template or ())
    with Console(stderr=True).status(f"loading {model}"):
        loaded = load_model(model, dtype=dtype_named(dtype), device=device_named(device))
    there = Bank(output, loaded.model, Intake.of(loaded.processor, settings))
    with bar(conversations(source, n), True) as advancing:
        counts = fill(there, source, n=n, batch_size=batch_size, on_done=partial(advancing.advance, output.name))
    if as_json:
        typer.echo(json.dumps(counts._asdict()))
    else:
        told = (
            f"{counts.encoded} demonstrations encoded, {counts.known} were there, {len(there)} in all: {output} "
            f"({counts.without} of {counts.conversations} conversations hold none)"
        )
        Console().print(told, highlight=False, soft_wrap=True)
