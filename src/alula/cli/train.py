"""`alula train`: run a recipe."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alula.errors import visible

if TYPE_CHECKING:
    from alula.training import ReadSource

_CHECKED = """the recipe is fine
checked: the settings; the models' configurations and the host's chat template; that the directories can be written to;
         that the files of data open; of their records, with their media,"""
_NOT_CHECKED = """\
not checked: weights, memory, how many tokens records come to, whether the host takes their media, and other records,
             which `alula data check FILE` reads"""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("train")(train)


def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="The recipe: a YAML file (see recipes/ and docs/usage/training.md).", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one value; stages go by number or name: --set stages.align.steps=10. Repeatable.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Insist on resuming, or start over: what is there goes once the new run has a checkpoint or a stage "
            "done. Default: resume if there is something.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Validate the recipe, its models' configurations and data; train nothing.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No table, no progress.")] = False,
) -> None:
    """Train a multimodal model in stages, following a recipe.

    Every stage leaves a normal model or adapter directory; a killed run resumes when the same command is given
    again.

    [bold]Several processes[/bold]: torchrun --nproc-per-node 8 -m alula train RECIPE
    """
    from alula import training

    if schema:
        typer.echo(json.dumps(training.recipe_schema(), indent=2))
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe file", param_hint="RECIPE")
    loaded = training.load_recipe(recipe, overrides or ())
    if check:
        read: list[ReadSource] = []
        training.check(loaded, resume="auto" if resume is None else resume, told=read.append)
        if as_json:
            stages = [{"name": stage.name, "method": stage.method} for stage in loaded.stages]
            typer.echo(json.dumps({"recipe": loaded.name, "stages": stages, "sources": list(map(asdict, read))}))
        else:
            typer.echo("\n".join([f"{recipe}: {_CHECKED}", *map(_told, read), _NOT_CHECKED]))
        return
    result = training.train(loaded, resume="auto" if resume is None else resume, quiet=quiet)
    if not result.is_main:
        return
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2))
    elif result.stopped is not None:
        typer.echo(f"stopped by the retention budget: {result.stopped}\nthe model is {result.final}")
    elif result.was_done:
        typer.echo(f"nothing to do: {result.directory} holds the finished run; its model is {result.final}")
    else:
        typer.echo(f"done: {result.final}")


def _told(source: ReadSource) -> str:
    """What was read of a source, and its first bad record, which the stage steps over."""
    if source.size is None:
        return f"         {source.key}: none, they are drawn without end"
    part = (
        f"all {source.size:,}" if source.read == source.size else f"{source.read:,} of {source.size:,}, spread evenly"
    )
    bad = f"; bad and skipped: {len(source.bad):,}, first {source.bad[0]}" if source.bad else ""
    return visible(f"         {source.key}: {part}{bad}")
