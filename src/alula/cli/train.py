"""`alula train`: run a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

_CHECKED = """the recipe is fine
checked: the settings; the models' configurations and the host's chat template; that the directories can be written to;
         that the files of data open and the sources hold something
not checked: weights, memory, and each single record, which `alula data check FILE` reads"""


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
        training.check(loaded, resume="auto" if resume is None else resume)
        stages = [{"name": stage.name, "method": stage.method} for stage in loaded.stages]
        typer.echo(json.dumps({"recipe": loaded.name, "stages": stages}) if as_json else f"{recipe}: {_CHECKED}")
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
