"""``alula eval``: what a model knows, and what it kept of what its base knew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.cli.command import command_line
from alula.cli.options import Template


def register(app: typer.Typer) -> None:
    """Add ``eval``."""
    app.command(name="eval")(evaluate)


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A model or adapter directory, a hub id, or 'fledgling' (the model that ships here).")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The model before tuning; both answer the same questions and are compared item by item."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma separated: text_bare, text_after_image, text_after_text, visual, visual_unseen, dialogue, "
            "interleaved, film, film_unseen, sound, sound_unseen; pope and chair: objects a model makes up. "
            "(default: what MODEL can take)"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Own conversations (as for training): the last assistant turn is the reference answer."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder that image paths in --data, --annotations and --pope start from."),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="Instances file as COCO's: pope and chair ask about its pictures, not the microworld's."),
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Captions file of the same pictures: for chair, what people name is there too.")
    ] = None,
    synonyms: Annotated[
        Path | None, typer.Option(help="For chair: per line an object and the words for it, separated by commas.")
    ] = None,
    pope: Annotated[
        list[Path] | None,
        typer.Option(help="File of questions as POPE publishes them (JSONL); may be given several times."),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, comma separated; NAME:METRIC scores by that metric. "
            r"Needs pip install 'alula\[eval]'."
        ),
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of your own harness task files (YAML).")
    ] = None,
    lm_eval_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each harness question. (default: the task's own number)")
    ] = None,
    lm_eval_chat: Annotated[
        bool, typer.Option("--lm-eval-chat", help="Put harness prompts through the chat template.")
    ] = False,
    template: Template = None,
    history: Annotated[
        str | None,
        typer.Option(
            help="Earlier answers in dialogues: gold (as written) or generated (the model's own). "
            "(default: gold, or as the records of --data say)"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Directory for answers, results and report; a second run resumes there.")
    ] = Path("runs/eval"),
    n: Annotated[
        int | None,
        typer.Option(
            "--n", min=1, max=MAX_ITEMS, help="Questions per task. (default: 400; all of --data and --lm-eval)"
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, help="Draws the questions of the native tasks, and what harness tasks draw."),
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per answer. (default: depends on the task)")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: the checkpoint's)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: a GPU if there is one)")] = None,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Evaluate a model; with --base, compare item by item: what tuning kept, lost and gained.

    Answers are greedy. Exit code 0: done; 1: failed; 2: wrong usage.
    """
    from rich.console import Console

    from alula.chat_template import TemplateSettings
    from alula.evaluation import HarnessTasks, ObjectFiles, choose_tasks, run_session
    from alula.files import write_text
    from alula.hosts.placement import device_named, dtype_named
    from alula.loading import load_model
    from alula.reports import (
        comparison_outcome,
        experiment_report,
        experiment_table,
        paired_ratio_tables,
        run_ratio_tables,
        run_report,
        run_table,
    )

    settings = TemplateSettings.parse(template or ())
    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    objects = ObjectFiles(images, annotations, captions, synonyms, tuple(pope or ()))
    harness = None
    if lm_eval is not None:
        specs = [name.strip() for name in lm_eval.split(",") if name.strip()]
        harness = HarnessTasks(specs, lm_eval_include, num_fewshot=lm_eval_fewshot, chat=lm_eval_chat, n=n, seed=seed)
    session = run_session(
        model,
        lambda name: load_model(name, dtype=dtype_named(dtype), device=device_named(device)),
        lambda processor: choose_tasks(
            processor,
            names=names,
            data=data,
            images=images,
            n=n,
            seed=seed,
            history=history,  # type: ignore[arg-type]
            objects=objects,
            more=harness is not None,
        ),
        base=base,
        harness=harness,
        template=settings,
        output=output,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=True,
    )
    command = command_line()
    talk = Console(stderr=True)
    if session.paired is None:
        html = run_report(session.tuned, command=command)
        tables = [run_table(session.tuned), *run_ratio_tables(session.tuned)]
    else:
        outcome = comparison_outcome(session.paired, command=command, seconds=session.seconds)
        html = experiment_report(outcome)
        tables = [experiment_table(outcome), *paired_ratio_tables(outcome.methods["tuned"])]
    if session.skipped:
        talk.print(
            f"not compared, since {base} takes no images (films, sounds): {', '.join(session.skipped)}",
            highlight=False,
            soft_wrap=True,
        )
    for result in filter(None, (session.tuned, session.base)):
        for task in result.tasks.values():
            for note in task.notes:
                talk.print(f"{result.model}, {task.title}: {note}", highlight=False, soft_wrap=True, markup=False)
    if as_json:
        typer.echo((session.paired or session.tuned).model_dump_json())
    else:
        Console().print(*tables, sep="\n")
    if report:
        talk.print(f"report: {write_text(output / 'report.html', html)}", soft_wrap=True, highlight=False)
    talk.print(f"answers: {output}", soft_wrap=True, highlight=False)
