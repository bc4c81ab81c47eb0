"""``alula fledgling``: raise, show and score the tiny model, the fledgling; raise its ears alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.cli.command import command_line
from alula.cli.options import ITEMS

OUTPUT = Annotated[Path, typer.Option(help="Folder to write; replaced when everything is done.")]
SEED = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Another seed, another fledgling.")]
STEPS = Annotated[int | None, typer.Option(min=1, help="Steps of schooling. (default: 3,000)")]
LAYERS = Annotated[int | None, typer.Option(min=4, help="Layers of the language model. (default: 6)")]
TOWER_STEPS = Annotated[int | None, typer.Option(min=1, help="Steps of the tower. (default: 1,000)")]
EAR_STEPS = Annotated[int | None, typer.Option(min=1, help="Steps of the ears. (default: 200)")]
EXAM_ITEMS = Annotated[
    int, typer.Option(*ITEMS, min=1, max=MAX_ITEMS, help="Held-out items per family in the examination.")
]
DEVICE = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: a GPU where there is one)")]
PRECISION = Annotated[
    str, typer.Option(help="Of the matrix products: float32, bfloat16, or auto (bfloat16 where there are units).")
]
DIRECTORY = Annotated[Path | None, typer.Argument(help="A raised fledgling. (default: the one that is installed)")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


def register(app: typer.Typer) -> None:
    """Add ``fledgling raise``, ``fledgling show``, ``fledgling score`` and ``fledgling ears``."""
    fledgling = typer.Typer(
        name="fledgling", help="Train, show and score the tiny model of the quickstart.", no_args_is_help=True
    )
    fledgling.command("raise")(raise_)
    fledgling.command()(show)
    fledgling.command()(score)
    fledgling.command()(ears)
    app.add_typer(fledgling)


def raise_(
    output: OUTPUT = Path("fledgling"),
    seed: SEED = 0,
    steps: STEPS = None,
    layers: LAYERS = None,
    tower_steps: TOWER_STEPS = None,
    ear_steps: EAR_STEPS = None,
    exam_items: EXAM_ITEMS = 200,
    device: DEVICE = None,
    precision: PRECISION = "auto",
    as_json: JSON = False,
) -> None:
    """Raise a fledgling from nothing: tokenizer, language model, tower, ears. About a quarter of an hour on 2 cores."""
    from alula_fledgling.raising.raising import Upbringing, raise_fledgling
    from alula_fledgling.raising.settings import pick_device, pick_precision

    upbringing = Upbringing(seed=seed, exam_items=exam_items)
    plans = {
        "schooling": {"steps": steps, "layers": layers},
        "tower": {"steps": tower_steps},
        "ears": {"steps": ear_steps},
    }
    for name, asked in plans.items():
        said = {key: value for key, value in asked.items() if value is not None}
        upbringing = dataclasses.replace(upbringing, **{name: dataclasses.replace(getattr(upbringing, name), **said)})
    where = pick_device(device)
    with _progress() as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, figures="")
            shown = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
            bar.update(tasks[stage], completed=done, figures=shown)
            if not bar.console.is_terminal and 20 * done // total != 20 * (done - 1) // total:
                bar.console.print(f"{stage} {done}/{total} {shown}", highlight=False)

        card = raise_fledgling(
            output,
            upbringing,
            device=where,
            dtype=pick_precision(precision, where),
            command=command_line(),
            report=report,
        )
    _show(card, as_json)
    Console(stderr=True).print(f"written to {output}", highlight=False)


def show(directory: DIRECTORY = None, as_json: JSON = False) -> None:
    """Show a fledgling's card: how it was raised and how it scored."""
    import alula_fledgling as fledgling

    _show(fledgling.card(directory), as_json)


def score(directory: DIRECTORY = None, items: EXAM_ITEMS = 200, device: DEVICE = None, as_json: JSON = False) -> None:
    """Examine a fledgling again: held-out text items under every condition, and what its tower's rows tell."""
    from alula_fledgling.raising.examination import examine_directory
    from alula_fledgling.raising.settings import pick_device

    with _progress() as bar:
        task = bar.add_task("examination", total=None, figures="")
        result = examine_directory(
            directory,
            num_items=items,
            device=pick_device(device),
            progress=lambda done, total, figures: bar.update(task, completed=done, total=total),
        )
    _show(result, as_json)


def ears(
    output: OUTPUT = Path("ears"),
    seed: SEED = 0,
    device: DEVICE = None,
    as_json: JSON = False,
) -> None:
    """Raise a spectrogram tower alone, in about a minute: the `audio` part of a fledgling."""
    from alula_fledgling.raising.ears import EarPlan, write_ears
    from alula_fledgling.raising.settings import pick_device

    with _progress() as bar:
        task = bar.add_task("ears", total=None, figures="")

        def report(done: int, total: int, figures: dict[str, float]) -> None:
            shown = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
            bar.update(task, completed=done, total=total, figures=shown)

        card = write_ears(
            output,
            EarPlan(),
            seed=seed,
            device=pick_device(device),
            command=command_line(),
            progress=report,
        )
    if as_json:
        print(json.dumps(card, indent=2))
        return
    table = Table("attribute", *card["probe"], title="ears: linear probes on their rows")
    for name in card["probe"]["test"]:
        table.add_row(name, *(f"{card['probe'][split][name]:.1%}" for split in card["probe"]))
    Console().print(table)
    Console(stderr=True).print(f"written to {output} in {card['seconds']:.0f} seconds", highlight=False)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
    )


def _show(card: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(card, indent=2))
        return
    console = Console()
    conditions = list(card["text"])
    table = Table("family", *conditions, title="text: accuracy on held-out items")
    for family in card["text"][conditions[0]]["families"]:
        table.add_row(family, *(f"{card['text'][c]['families'][family]:.1%}" for c in conditions))
    table.add_section()
    table.add_row("mean", *(f"{card['text'][c]['mean']:.1%}" for c in conditions))
    console.print(table)
    probes = card["tower_probe"]
    table = Table("attribute", *probes, title="tower: linear probes on its rows")
    for name in probes["test"]:
        table.add_row(name, *(f"{probes[split][name]:.1%}" for split in probes))
    console.print(table)
    if "command" in card:
        machine = card["machine"]
        minutes = card["seconds"]["total"] / 60
        console.print(
            f"{card['command']}\n{minutes:.1f} minutes on {machine['device']}, {machine['threads']} threads, "
            f"{machine['precision']}",
            highlight=False,
        )
