"""``alula compress``: a model made smaller as far as a budget of its skill allows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.cli.command import command_line
from alula.cli.options import ITEMS, Template, output_of


def register(app: typer.Typer) -> None:
    """Add ``compress``."""
    app.command(name="compress")(compress)


def compress(
    model: Annotated[
        str, typer.Argument(help="A model directory or hub id; adapters of PEFT have to be merged first.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Own conversations, of text and with images, that end with a reference answer (JSONL, LLaVA JSON, "
            "parquet, saved dataset): some are calibrated on, others asked. (default: what comes with MODEL)"
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that image paths in --data start from.")
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="What goes: weights (set to zero: NOT faster, nor smaller in memory), or mlp (channels), heads, "
            "blocks (taken out: faster and smaller)."
        ),
    ] = "weights",
    sparsity: Annotated[
        float | None, typer.Option(help="Share that goes; with --budget, the most that is tried. (default there: 0.9)")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:SHARE[,NAME:SHARE]",
            help="Find the largest saving that keeps so much: retention (right answers of text, over those of MODEL), "
            "visual (the same about images).",
        ),
    ] = None,
    step: Annotated[float, typer.Option(help="What amounts of weights and channels are multiples of.")] = 0.05,
    method: Annotated[
        str, typer.Option(help="What goes is chosen by wanda, magnitude (looks at no data), or sparsegpt (weights).")
    ] = "wanda",
    pattern: Annotated[
        str | None, typer.Option(help="2:4 or 4:8, in place of a sparsity. (Not faster in alula, on any device.)")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Matrices, comma separated: attention, mlp, or names. (default: all)")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Whose inputs count: all, image, text, ...")] = "all",
    coded: Annotated[
        bool,
        typer.Option(
            "--coded", help="Write weights without their zeros: smaller on disk, read by alula alone; not faster."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory for model, masks, report and what was tried; a second run resumes there. "
            "(default: runs/compress/NAME, NAME made of MODEL)"
        ),
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(min=1, max=MAX_ITEMS, help="Conversations to calibrate on. (default: 128)")
    ] = None,
    items: Annotated[
        int,
        typer.Option(*ITEMS, min=1, max=MAX_ITEMS, help="Questions of --data, or of each task that comes with MODEL."),
    ] = 400,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_ITEMS, help="Prompts per forward.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=65536, help="Maximum tokens per answer to --data.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Draws what is calibrated on and asked.")] = 0,
    template: Template = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: the checkpoint's)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: a GPU if there is one)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")] = False,
) -> None:
    """Make a model smaller, and prove what it kept.

    Every amount that is tried answers the same questions as MODEL, of text and about images, and is compared with it
    item by item; with --budget the largest within it is found by bisection and saved. MODEL is left as it was.

    Not faster, whatever the sparsity: --kind weights, 2:4 and 4:8 among them, since zeros are multiplied like other
    numbers. Faster, and smaller in memory: --kind mlp, heads, blocks.
    """
    from rich.console import Console

    from alula.chat_template import TemplateSettings
    from alula.compressing import Plan, compress_report, compress_table
    from alula.compressing import compress as run
    from alula.compressing.report import pays
    from alula.compressing.run import MODEL, PAIRED
    from alula.evaluation import PairedRun
    from alula.files import write_text
    from alula.hosts.placement import device_named, dtype_named
    from alula.loading import load_model
    from alula.settings import budget_of

    output = output or output_of("compress", model)
    plan = Plan(
        output=output,
        model=model,
        kind=kind,  # type: ignore[arg-type]
        sparsity=sparsity,
        budget=None if budget is None else budget_of(budget),
        step=step,
        method=method,  # type: ignore[arg-type]
        pattern=pattern,  # type: ignore[arg-type]
        targets=None if targets is None else tuple(name.strip() for name in targets.split(",")),
        tokens=tokens,
        coded=coded,
        data=data,
        images=images,
        calibration=calibration,
        items=items,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        seed=seed,
        template=TemplateSettings.parse(template or ()).arguments,
    )
    found = run(
        plan,
        lambda name: load_model(name, dtype=dtype_named(dtype), device=device_named(device)),
        command=command_line(),
        progress=True,
    )
    found.save(output / "compress.json")
    report = write_text(output / "report.html", compress_report(found, PairedRun.load(output / PAIRED)))
    talk = Console(stderr=True)
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        Console().print(compress_table(found))
    talk.print(pays(found), highlight=False, markup=False)
    talk.print(f"model: {output / MODEL}", soft_wrap=True, highlight=False, markup=False)
    talk.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)
