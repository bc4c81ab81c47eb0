"""``alula browse``: what a frozen model holds after reading conversations, for browse-and-concentrate to be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alula.bounds import MAX_ITEMS
from alula.cli.options import EARLIER_ITEMS, Template


def register(app: typer.Typer) -> None:
    """Add ``browse``."""
    app.command(name="browse")(browse)


def browse(
    model: Annotated[
        str, typer.Argument(help="A model or adapter directory, a hub id, or a name that a package brings.")
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="Conversations: a file (JSONL, LLaVA JSON, parquet, saved dataset), or a source as recipes name it, "
            "such as microworld:pictures,limit=1000."
        ),
    ],
    output: Annotated[
        Path, typer.Option(dir_okay=False, help="The file of conditions (safetensors); a second run resumes.")
    ],
    images: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that image paths in a file start from.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(*EARLIER_ITEMS, min=1, max=MAX_ITEMS, help="Conversations, the first so many. (default: all)"),
    ] = None,
    template: Template = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Conversations per forward.")] = 32,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: the checkpoint's)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: a GPU if there is one)")] = None,
) -> None:
    """Read conversations once, up to their first answer, and keep what the decoder holds then (explicit conditions).

    Training takes the file by browse.conditions; forwards and generation take its rows by `conditions`.
    """
    from rich.console import Console

    from alula.chat_template import TemplateSettings
    from alula.cli.tasks import source_named
    from alula.data.conditions import Conditions
    from alula.hosts.placement import device_named, dtype_named
    from alula.loading import load_model
    from alula.training.browsing import browse_data

    source = source_named(data, images=images, where="DATA")
    loaded, processor = load_model(model, dtype=dtype_named(dtype), device=device_named(device))
    file = browse_data(
        loaded,
        processor,
        source,
        output,
        n=n,
        name=model,
        template=TemplateSettings.parse(template or ()),
        batch_size=batch_size,
        progress=True,
    )
    found = Conditions.load(file)
    Console().print(f"{len(found):,} conditions of width {found.values.shape[1]}: {file}", highlight=False)
