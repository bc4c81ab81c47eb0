"""``alula import``: import released weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add ``import wings``."""
    group = typer.Typer(name="import", help="Import released weights.", no_args_is_help=True)
    group.callback()(_group)
    group.command()(wings)
    app.add_typer(group)


def _group() -> None:
    """A group also while it has one command."""


def wings(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Directory of released weights.")],
    out: Annotated[Path, typer.Argument(help="New directory, for host/ and adapter/.")],
    llm: Annotated[str, typer.Option(help="The LLM it was tuned from: hub id or directory.")],
    vision: Annotated[str, typer.Option(help="The SigLIP tower it was trained with: hub id or directory.")],
    system_tokens: Annotated[
        int,
        typer.Option(min=0, help="Tokens of the system prompt and user header; 14 for Qwen1.5 and its default prompt."),
    ] = 14,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. (default: the LLM's)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths and settings as JSON.")] = False,
) -> None:
    """Turn the released Wings checkpoint into a stock host and an adapter, checking every tensor by name and shape.

    The result answers with the released arithmetic: `alula.load_model("OUT/adapter")`.
    """
    from alula.importing import import_wings

    made = import_wings(checkpoint, llm, vision, out, system_tokens=system_tokens, dtype=dtype)
    if as_json:
        print(json.dumps({"host": str(made.host), "adapter": str(made.adapter), "config": made.config.to_dict()}))
        return
    console = Console(stderr=True)
    console.print(f"host     {made.host}", highlight=False, soft_wrap=True)
    console.print(f"adapter  {made.adapter}", highlight=False, soft_wrap=True)
    if made.config.router == "attention" and len(made.config.learners) == 2:
        console.print(
            f"Inputs with an image may have {made.config.router_tokens} tokens: the router was trained on no more.",
            highlight=False,
        )
