"""``alula speed``: what policies save on a model, and which to take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.cli.command import command_line
from alula.cli.options import ITEMS, Template, output_of


def register(app: typer.Typer) -> None:
    """Add ``speed``."""
    app.command(name="speed")(speed)


def speed(
    model: Annotated[str, typer.Argument(help="A model or adapter directory, or a hub id, of a model with images.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Own conversations with images (JSONL, LLaVA JSON, parquet, saved dataset)."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that image paths in --data start from.")
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Policies to measure, in the notation of policies.json (YAML or JSON). (default: a grid for the "
            "model's depth and its images)",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="NAME:SHARE[,NAME:SHARE]",
            help="What the recommended policy keeps: agreement (whole answers as without it), accuracy (right "
            "answers), retention (right answers, over those without it).",
        ),
    ] = "agreement:0.98",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory for measurements, report and policies.json; a second run resumes there. "
            "(default: runs/speed/NAME, NAME made of MODEL)"
        ),
    ] = None,
    items: Annotated[int, typer.Option(*ITEMS, min=1, max=MAX_ITEMS, help="Questions to ask.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of timing.")] = 5,
    timed: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Batches timed in each round.")] = 2,
    steps: Annotated[int, typer.Option(min=2, max=4096, help="Tokens generated where time is taken.")] = 16,
    batch_size: Annotated[
        int, typer.Option(min=1, max=MAX_ITEMS, help="Prompts per forward, as you will serve them.")
    ] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=65536, help="Maximum tokens per answer.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Draws what comes with the model, and pictures.")] = 0,
    template: Template = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: the checkpoint's)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: a GPU if there is one)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurement as JSON on stdout.")] = False,
) -> None:
    """Measure what policies save on a model with images and what they cost in answers, and recommend one.

    Each runs beside the model without any: matrix products counted, time of prompts and steps, memory of the cache,
    whole answers that stay the same and, where they are known, right ones. The cheapest within --budget is saved as
    policies.json, which `alula eval` and `alula chat` take with --policies. Without --data the questions that come with
    MODEL are asked, or else drawn pictures are shown, of which time and agreement can be said.
    """
    from rich.console import Console

    from alula.chat_template import TemplateSettings
    from alula.files import write_text
    from alula.hosts.placement import device_named, dtype_named
    from alula.loading import load_model
    from alula.settings import budget_of
    from alula.speed import Plan, measure, recommend, save_recommended, speed_report, speed_table, warnings

    output = output or output_of("speed", model)
    plan = Plan(
        output=output,
        model=model,
        data=data,
        images=images,
        grid=grid,
        samples=items,
        rounds=rounds,
        timed=timed,
        steps=steps,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        budget=budget_of(budget),
        dtype=dtype,
        seed=seed,
        template=TemplateSettings.parse(template or ()).arguments,
    )
    measured = measure(
        plan,
        lambda name: load_model(name, dtype=dtype_named(dtype), device=device_named(device)),
        command=command_line(),
        progress=True,
    )
    measured.save(output / "speed.json")
    found = recommend(measured, plan.budget)
    saved = save_recommended(found, output / "policies.json")
    report = write_text(output / "report.html", speed_report(measured, plan.budget))
    talk = Console(stderr=True)
    if as_json:
        typer.echo(measured.model_dump_json())
    else:
        Console().print(speed_table(measured))
        if measured.passed_over:
            talk.print(f"passed over: {measured.passed_over}", highlight=False, markup=False)
        for text in warnings(measured):
            talk.print(f"look: {text}", highlight=False, markup=False)
    for text in found.says:
        talk.print(text, highlight=False, markup=False)
    if saved is not None:
        talk.print(f"policies: {saved}", soft_wrap=True, highlight=False, markup=False)
    talk.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)
