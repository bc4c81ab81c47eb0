"""``alula merge``, ``alula export``, ``alula push``: a tuned model as others take it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from alula.exporting import Verdict

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


def export(
    model: _MODEL,
    output: Annotated[
        Path | None, typer.Argument(help="Directory to write; a model that is there is replaced as a whole.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--for", metavar="ENGINE", help="Who is to read it: vllm, llama.cpp, transformers, peft."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what the engine asks for, and write nothing.")] = False,
    part: Annotated[
        str | None, typer.Option(help="With --for. `text`: the decoder alone, a causal language model. (default: all)")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --for. float32, bfloat16, float16. (default: the checkpoint's)")
    ] = None,
) -> None:
    """Copy a model into one directory that needs nothing beside it: an adapter takes its host along.

    With --for, write it as another engine takes it (a LoRA merged, stock classes, published names), after a look at
    everything that the engine asks for.
    """
    from alula.errors import UsageError
    from alula.exporting import check_for, export_for, export_model

    if check is (output is not None):
        remedy = "name a directory to write, or --check alone"
        raise UsageError("--check writes nothing" if check else "where to?", where="alula export", remedy=remedy)
    if engine is None:
        if check or part is not None or dtype is not None:
            raise UsageError("it goes with --for ENGINE", where="--check, --part, --dtype", remedy="name an engine")
        assert output is not None
        typer.echo(f"exported: {export_model(model, output)}")
        return
    chosen: Any = "all" if part is None else part
    if output is None:
        verdict = check_for(model, engine, part=chosen, dtype=dtype)
    else:
        verdict = export_for(model, output, engine, part=chosen, dtype=dtype)
    _show(verdict)
    if output is not None:
        typer.echo(f"exported: {output}")
    if not verdict.accepted:
        raise typer.Exit(1)


def _show(verdict: Verdict) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in (f"{verdict.engine} asks for", "met", "found", "remedy"):
        table.add_column(column, overflow="fold")
    words = {True: "yes", False: "[bold red]no[/bold red]", None: "not told"}
    for each in verdict.requirements:
        table.add_row(escape(each.what), words[each.met], escape(each.found), "" if each.met else escape(each.remedy))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"[dim]{escape(verdict.source)}[/dim]", soft_wrap=True)


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
