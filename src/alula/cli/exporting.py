"""``alula merge``, ``alula export``, ``alula push``: a tuned model as others take it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL = Annotated[str, typer.Argument(help="A model or adapter directory, such as RUN/final.")]
_OUTPUT = Annotated[Path, typer.Argument(help="Directory to write; a model that is there is replaced as a whole.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (merge, export, push):
        app.command()(command)


def merge(
    model: Annotated[str, typer.Argument(help="Directory of a LoRA adapter, such as RUN/final.")],
    output: _OUTPUT,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: the checkpoint's)")] = None,
) -> None:
    """Write the host of a LoRA run with the adapter merged into its weights: a stock model that anything loads."""
    from alula.exporting import merge_model
    from alula.hosts.placement import dtype_named

    typer.echo(f"merged: {merge_model(model, output, dtype=dtype_named(dtype))}")


def export(model: _MODEL, output: _OUTPUT) -> None:
    """Copy a model into one directory that needs nothing beside it: an adapter takes its host along."""
    from alula.exporting import export_model

    typer.echo(f"exported: {export_model(model, output)}")


def push(
    model: _MODEL,
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made where it is not there yet.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch. (default: the main one)")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload a model to the Hugging Face hub as one commit; an adapter takes its host along.

    Who you are there is what `hf auth login` or HF_TOKEN says.
    """
    from alula.exporting import push_model

    typer.echo(f"pushed: {push_model(model, repository, private=private, revision=revision, message=message)}")
