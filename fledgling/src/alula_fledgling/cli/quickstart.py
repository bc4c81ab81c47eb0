"""``alula quickstart``: the main job, end to end, on the fledgling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alula.bounds import MAX_ITEMS
from alula.cli.command import command_line
from alula.cli.options import ITEMS


def register(app: typer.Typer) -> None:
    """Add ``quickstart``."""
    app.command(name="quickstart")(quickstart)


def quickstart(
    output: Annotated[
        Path, typer.Option(help="Directory for everything it writes; a second call goes on there.")
    ] = Path("runs/quickstart"),
    seeds: Annotated[str, typer.Option(help="Training seeds, comma separated; each repeats all trainings.")] = "0",
    methods: Annotated[
        str, typer.Option(help="Comma separated, out of full, full-10x, lora, wings, experts.")
    ] = "full,full-10x,lora,wings,experts",
    items: Annotated[int, typer.Option(*ITEMS, min=1, max=MAX_ITEMS, help="Questions per task.")] = 400,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes side by side; default: one per core.")] = None,
    steps: Annotated[float, typer.Option(min=0.001, help="Factor on the trainings' steps, for a quick look.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")] = False,
) -> None:
    """Tune one model five ways on the same images and measure how much text skill each way keeps.

    Joins the LLM and the vision tower of the fledgling, aligns them once, then tunes them by full fine-tuning (at
    the shared and at ten times the learning rate), LoRA, Wings and experts. Base and tuned models answer the same
    held-out questions: text bare, text after an image, visual skill, interleaved dialogues. Ends with a table and a
    self-contained HTML report.
    """
    from rich.console import Console

    from alula.errors import UsageError
    from alula.files import write_text
    from alula.reports import experiment_report, experiment_table
    from alula_fledgling.quickstart import Plan
    from alula_fledgling.quickstart import quickstart as run

    try:
        chosen = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise UsageError(
            f"--seeds {seeds!r} is not a list of whole numbers", remedy="write e.g. --seeds 0,1,2"
        ) from None
    plan = Plan(output=output, seeds=chosen, methods=tuple(methods.split(",")), items=items, steps=steps)
    outcome = run(plan, command=command_line(), workers=workers)
    report = write_text(output / "report.html", experiment_report(outcome))
    if as_json:
        typer.echo(outcome.model_dump_json())
    else:
        Console().print(experiment_table(outcome))
        typer.echo(f"report: {report}")
        typer.echo(f"record: {output / 'outcome.json'}")
