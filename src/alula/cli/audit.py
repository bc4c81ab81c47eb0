"""``alula audit``: look inside any existing model with images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.cli.command import command_line
from alula.cli.options import ITEMS, Template, output_of


def register(app: typer.Typer) -> None:
    """Add ``audit``."""
    app.command(name="audit")(audit)


def audit(
    model: Annotated[str, typer.Argument(help="A model or adapter directory, or a hub id, of a model with images.")],
    base: Annotated[
        str | None,
        typer.Option(help="The model before tuning, or the text LLM inside it, to compare text answers with."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Own conversations with images (JSONL, LLaVA JSON, parquet, saved dataset)."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that image paths in --data start from.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Own text conversations for the text answers; the last turn is the reference."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory for measurements, answers and report; a second run resumes there. "
            "(default: runs/audit/NAME, NAME made of MODEL)"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Conversations with images to measure.")] = 128,
    items: Annotated[int, typer.Option(*ITEMS, min=1, max=MAX_ITEMS, help="Text questions to ask.")] = 200,
    sections: Annotated[
        str, typer.Option(help="Comma separated, from text, attention, alignment, geometry, lens, overlap.")
    ] = "text,attention,alignment,geometry,lens,overlap",
    controls: Annotated[
        bool,
        typer.Option(help="Measure alignment again with noise for images and with an untrained connector."),
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Conversations per forward.")] = 8,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Draws the items that come with the model, resamples and noise.")
    ] = 0,
    probe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.NAME=VALUE",
            help="Setting of a section's probe, such as attention.system=apart; repeatable.",
        ),
    ] = None,
    template: Template = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: the checkpoint's)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: a GPU if there is one)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the audit as JSON on stdout.")] = False,
) -> None:
    """Inspect any model with images: the text skill it kept, and how images move through it.

    Nothing is trained. Text answers (against --base), attention shift, alignment, geometry, vocabulary lens and weight
    overlap, with intervals and nulls, in one HTML page that says what each figure means for this model. Without --data
    and --text the conversations that come with MODEL are used, if any do. Memory does not grow with the number of
    samples; a run that was stopped goes on where it was.
    """
    import json

    from rich.console import Console

    from alula.auditing import Plan, audit_json, audit_report, findings
    from alula.auditing import audit as run
    from alula.auditing.plan import probe_settings
    from alula.chat_template import TemplateSettings
    from alula.files import write_json, write_text
    from alula.hosts.placement import device_named, dtype_named
    from alula.loading import load_model
    from alula.reports import findings_table

    output = output or output_of("audit", model)
    plan = Plan(
        output=output,
        model=model,
        base=base,
        data=data,
        images=images,
        text=text,
        samples=samples,
        items=items,
        sections=tuple(name.strip() for name in sections.split(",") if name.strip()),
        controls=controls,
        batch_size=batch_size,
        dtype=dtype,
        seed=seed,
        probes=probe_settings(probe or ()),
        template=TemplateSettings.parse(template or ()).arguments,
    )
    found = run(
        plan,
        lambda name: load_model(name, dtype=dtype_named(dtype), device=device_named(device)),
        command=command_line(),
        progress=True,
    )
    record = audit_json(found)
    write_json(output / "audit.json", record)
    report = write_text(output / "report.html", audit_report(found))
    if as_json:
        typer.echo(json.dumps(record))
    else:
        Console().print(findings_table([(f.title, f.status, f.figure, f.do) for f in findings(found)]))
    talk = Console(stderr=True)
    talk.print(f"report: {report}", soft_wrap=True, highlight=False)
