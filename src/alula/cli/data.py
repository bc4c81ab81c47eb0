"""``alula data``: look at data before a run does, and make some of others."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from alula.bounds import DEFAULT_MAX_PIXELS, HARD_MAX_PIXELS, MAX_SEED
from alula.cli.options import ITEMS
from alula.errors import visible
from alula.media import MEDIA
from alula.progress import Lines

if TYPE_CHECKING:
    from alula.data.check import CheckReport

FILE = Annotated[
    Path, typer.Argument(exists=True, help="JSONL, LLaVA JSON, a saved dataset, parquet, COCO JSON, or tar files.")
]
IMAGES = Annotated[
    Path | None,
    typer.Option(
        exists=True, file_okay=False, help="Folder that relative image paths start from. (default: beside FILE)"
    ),
]
FORMAT = Annotated[str, typer.Option("--format", help="auto, jsonl, llava, dataset, coco or webdataset.")]
SPLIT = Annotated[str | None, typer.Option(help="Split of a dataset that holds several.")]
COLUMN = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=COLUMN", help="What alula calls a column, and its name in FILE: question=q. Repeatable."
    ),
]
ANSWERS = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="Annotations that answer a VQA file's questions.")
]
READING = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MEDIUM.OPTION=VALUE",
        help="How media are read where records do not say it: depth.unit=mm. Repeatable.",
    ),
]
_LISTED = 20
"""Most bad records of one kind that are printed."""


def register(app: typer.Typer) -> None:
    """Add ``data check``, ``data show`` and ``data interleave``."""
    data = typer.Typer(name="data", help="Check, show and interleave data.", no_args_is_help=True)
    data.command()(check)
    data.command()(show)
    data.command()(interleave)
    app.add_typer(data)


def check(
    file: FILE,
    images: IMAGES = None,
    form: FORMAT = "auto",
    split: SPLIT = None,
    column: COLUMN = None,
    reading: READING = None,
    answers: ANSWERS = None,
    prompts: Annotated[bool, typer.Option(help="Records are evaluation prompts: no assistant turn is needed.")] = False,
    max_pixels: Annotated[
        int, typer.Option(min=1, max=HARD_MAX_PIXELS, help="Largest image accepted, width x height.")
    ] = DEFAULT_MAX_PIXELS,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes to decode in. (default: one per core, at most 8)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Read every record and decode every medium; list what is bad, with file, line and reason (20 of each kind; --json
    has all).

    Exit code 0: all good; 1: something is bad; 2: wrong usage.
    """
    from alula.data.check import check as run

    console = Console(stderr=True)
    lines = Lines(console, None)
    columns = TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal:
                lines.total = total
                lines.tell("checking", done)

        report = run(
            file,
            form=form,
            images=images,
            split=split,
            columns=_columns(column),
            reading=_reading(reading),
            answers=answers,
            prompts=prompts,
            max_pixels=max_pixels,
            workers=min(8, os.cpu_count() or 1) if workers is None else workers,
            progress=advance,
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        kinds: Counter[str] = Counter()
        for record in report.bad:
            kinds[record.kind] += 1
            if kinds[record.kind] <= _LISTED:
                typer.echo(visible(str(record)))
        for kind, count in kinds.items():
            if count > _LISTED:
                typer.echo(f"{file}: {kind}: {count - _LISTED:,} more bad records of this kind (all with --json)")
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        rows: list[tuple[str, int | str]] = [
            ("samples", report.samples),
            ("  bad", len(report.bad)),
            ("  text only", report.text_only),
            ("images", report.images),
            *((name, count) for name, count in (("videos", report.videos), ("audio clips", report.audios)) if count),
            *(row for name in report.others for row in _of_medium(report, name)),
            ("placeholders", report.placeholders),
            ("turns", report.turns.total()),
            *((f"  {role}", count) for role, count in report.turns.items()),
        ]
        for name, told in rows:
            table.add_row(name, told if isinstance(told, str) else f"{told:,}")
        console = Console()
        console.print(table)
        verdict = "[green]all good[/green]" if report.ok else "[red]not usable as it is[/red]"
        console.print(f"{verdict} ({report.seconds:.1f} s)", highlight=False)
    if not report.ok:
        raise typer.Exit(1)


def show(
    file: FILE,
    images: IMAGES = None,
    form: FORMAT = "auto",
    split: SPLIT = None,
    column: COLUMN = None,
    reading: READING = None,
    answers: ANSWERS = None,
    first: Annotated[int, typer.Option(min=0, help="Index of the first record to show.")] = 0,
    n: Annotated[int, typer.Option(*ITEMS, min=1, help="Number of records.")] = 3,
) -> None:
    """Print records the way alula reads them: roles, texts, and each image, film, sound ... with its size."""
    from alula.data.samples import Sample
    from alula.data.sources import open_file

    def content(message: dict) -> str:
        return "".join(part["text"] if part["type"] == "text" else f"[{told(part)}] " for part in message["content"])

    def told(part: dict) -> str:
        ref = part[part["type"]]
        size = ref.load().size if part["type"] == "image" else ref.load().shape
        return f"{ref.name}: {size}"

    source = open_file(
        file,
        form=form,
        images=images,
        split=split,
        columns=_columns(column),
        answers=answers,
        reading=_reading(reading),
    )
    console = Console()
    for index in range(first, min(first + n, source.size)):
        sample: Sample = source[index]
        told_of = escape(visible(sample.id)), escape(visible(str(sample.place)))
        console.print(f"[bold]{told_of[0]}[/bold]  [dim]{told_of[1]}[/dim]", highlight=False)
        for message in sample.messages:
            mark = "" if message.get("train", True) else "  [dim](not learnt)[/dim]"
            said = escape(visible(content(message)))
            console.print(f"  [cyan]{message['role']:>9}[/cyan]  {said}{mark}", highlight=False)


def _columns(pairs: list[str] | None) -> dict[str, str]:
    from alula.data.dialects import COLUMNS
    from alula.errors import UsageError

    found: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise UsageError(f"{pair!r} is not NAME=COLUMN", where="--column", remedy="such as --column question=q")
        if name not in COLUMNS or name in found:
            told = "is given twice" if name in found else "is no column that is read"
            raise UsageError(f"{name!r} {told}", where="--column", remedy=f"names are {', '.join(COLUMNS)}")
        found[name] = column
    return found


def _of_medium(report: CheckReport, medium: str) -> Iterator[tuple[str, int | str]]:
    """Rows of the table: how many there are, what was said of their units, from which value to which they go."""
    yield MEDIA[medium].plural, report.others[medium]
    for said, count in report.said.get(medium, {}).items():
        if said != "nothing":
            yield f"  {said}", count
    if medium in report.extents:
        low, high = report.extents[medium]
        yield f"  {_EXTENTS[medium]}", f"{low:.4g} to {high:.4g}"


_EXTENTS = {
    "points": "coordinates",
    "depth": "meters",
    "normals": "components",
    "motion": "acceleration, m/s^2",
    "response": "values",
}


def _reading(pairs: list[str] | None) -> dict[str, dict[str, object]]:
    from alula.errors import UsageError

    found: dict[str, dict[str, object]] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        medium, dot, option = name.partition(".")
        if not equals or not dot or not value:
            raise UsageError(f"{pair!r} is not MEDIUM.OPTION=VALUE", where="--reading", remedy="such as depth.unit=mm")
        said = found.setdefault(medium, {})
        if option in said:
            raise UsageError(f"{name!r} is given twice", where="--reading", remedy="keep one")
        try:
            said[option] = float(value)
        except ValueError:
            said[option] = value
    return found


def interleave(
    text: Annotated[
        Path, typer.Argument(exists=True, help="Text-only questions with answers, any format alula reads.")
    ],
    visual: Annotated[Path, typer.Argument(exists=True, help="Questions about images, likewise.")],
    output: Annotated[Path, typer.Argument(dir_okay=False, help="JSONL file to write.")],
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder that image paths in VISUAL start from.")
    ] = None,
    settings: Annotated[
        str, typer.Option(help="Orders of text (T) and visual (V) turns, comma separated; the last turn is scored.")
    ] = "T,TT,TTT,TTV,TV,V,VT,VTT,VVT",
    n: Annotated[
        int | None, typer.Option(*ITEMS, min=1, help="Dialogues per setting. (default: one per possible last question)")
    ] = None,
    history: Annotated[
        str, typer.Option(help="Answers shown before the last turn: gold, or generated (the model's own).")
    ] = "gold",
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Chooses the last questions when there are more than -n.")
    ] = 0,
    encoder: Annotated[
        str | None, typer.Option(help="A sentence-transformers model to pair by. (default: TF-IDF)")
    ] = None,
) -> None:
    """Pair text and visual questions about similar things into dialogues, a benchmark for alula eval --task data:FILE.

    Takes the first question and answer of every record. Settings that end with the same kind of turn end with the same
    questions.
    """
    from alula.data.interleave import interleave as pair
    from alula.data.interleave import questions, sentence_encoder, write_dialogues
    from alula.data.sources import open_file

    dialogues = pair(
        questions(open_file(text), "T"),
        questions(open_file(visual, images=images), "V"),
        settings=[name.strip() for name in settings.split(",")],
        n=n,
        history=history,  # type: ignore[arg-type]
        seed=seed,
        embed=sentence_encoder(encoder) if encoder else None,
    )
    for setting, count in write_dialogues(dialogues, output).items():
        typer.echo(f"{setting:>6}  {count:,}", err=True)
    typer.echo(str(output))
