"""``alula eval``: what a model knows, and what it kept of what its base knew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alula.bounds import MAX_ITEMS, MAX_SEED
from alula.cli.command import command_line
from alula.cli.options import EARLIER_ITEMS, BankDirectory, Policies, Shots, Template, output_of
from alula.cli.tasks import HELP, EvalCommand, pictures_named, requested, truthfulness_named


def register(app: typer.Typer) -> None:
    """Add ``eval``."""
    app.command(name="eval", cls=EvalCommand)(evaluate)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A model or adapter directory, a hub id, or a name that a package brings, such as 'fledgling'."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The model before tuning; both answer the same questions and are compared item by item."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(metavar="TASK", help=HELP)] = None,
    images: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that image paths in the files of tasks start from.")
    ] = None,
    retrieval: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="Captions and pictures in the place of questions: R@1, 5, 10 both ways (of models with MKS2's "
            "retrieval), BLEU-4 and CIDEr. A file (COCO's or Karpathy's JSON, Flickr30k's lines, CSV of image and "
            r"caption)\[,split=NAME]; or a source as recipes name it, such as microworld:caption,split=test.",
        ),
    ] = None,
    truthfulness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE...",
            help="TruthfulQA and ETHICS by likelihood, beside the tasks or in their place, with what answer habits "
            "alone would score. Published files, one or more: TruthfulQA.csv, mc_task.json, cm_*.csv, justice_*.csv, "
            r"deontology_*.csv, virtue_*.csv, util_*.csv\[,chat=true]; own: the questions that come with MODEL.",
        ),
    ] = None,
    template: Template = None,
    policies: Policies = None,
    bank: BankDirectory = None,
    shots: Shots = None,
    history: Annotated[
        str | None,
        typer.Option(
            help="Earlier answers in dialogues: gold (as written) or generated (the model's own). "
            "(default: gold, or as the records of data:FILE say)"
        ),
    ] = None,
    references: Annotated[
        bool,
        typer.Option(
            "--references",
            help="Weigh as well how likely the model holds the reference answers (nats per token): tells what was lost "
            "where no answer is the reference word for word. Not of lm_eval tasks and chair.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory for answers, results and report; a second run resumes there. "
            "(default: runs/eval/NAME, NAME made of MODEL)"
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            *EARLIER_ITEMS,
            min=1,
            max=MAX_ITEMS,
            help="About how many questions each task asks, whole images and dialogues. "
            "(default: the task's own number; all of data: and lm_eval:)",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, help="Draws the questions of tasks by name, and what harness tasks draw."),
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per answer. (default: depends on the task)")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: the checkpoint's)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. (default: a GPU if there is one)")] = None,
    report: Annotated[bool, typer.Option(help="Write report.html, of questions.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
) -> None:
    """Evaluate a model; with --base, compare item by item: what tuning kept, lost and gained.

    Answers are greedy. Exit code 0: done; 1: failed; 2: wrong usage.
    """
    from functools import partial

    from rich.console import Console

    from alula.chat_template import TemplateSettings
    from alula.demonstrations import shots_in
    from alula.errors import UsageError
    from alula.evaluation import choose_tasks, evaluate_captions, run_session
    from alula.files import write_text
    from alula.hosts.placement import device_named, dtype_named
    from alula.loading import load_model
    from alula.reports import (
        captions_table,
        comparison_outcome,
        comparison_report,
        experiment_table,
        paired_ratio_tables,
        run_ratio_tables,
        run_report,
        run_table,
    )

    output = output or output_of("eval", model)
    talk = Console(stderr=True)
    settings = TemplateSettings.parse(template or ())
    if retrieval is not None:
        refused = {
            "--task": task,
            "--base": base,
            "--history": history,
            "--bank": bank,
            "--truthfulness": truthfulness,
            "--references": references,
        }
        if wrong := [option for option, given in refused.items() if given]:
            raise UsageError(f"asks no questions: leave {', '.join(wrong)} out", where="--retrieval")
        pictures = pictures_named(retrieval, images=images, n=n, seed=seed)
        loaded, processor = load_model(model, dtype=dtype_named(dtype), device=device_named(device), policies=policies)
        run = evaluate_captions(
            loaded,
            processor,
            pictures,
            name=model,
            source=retrieval,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens or 64,
            template=settings,
            journal=output / "captions.jsonl",
            progress=True,
        )
        run.save(output / "retrieval.json")
        if as_json:
            typer.echo(run.model_dump_json())
        else:
            Console().print(captions_table(run))
        talk.print(f"answers: {output}", soft_wrap=True, highlight=False)
        return
    if shots is not None and bank is None:
        raise UsageError("shots are taken from a bank", where="--shots", remedy="add --bank DIRECTORY")
    choices_for = truthfulness_named(truthfulness or (), n=n, seed=seed)
    if choices_for is not None and not task:
        idle = {
            "--images": images,
            "--history": history,
            "--max-new-tokens": max_new_tokens,
            "--references": references or None,
        }
        if wrong := [option for option, given in idle.items() if given is not None]:
            raise UsageError(
                f"{', '.join(wrong)} would be without effect: nothing is shown or generated",
                where="--truthfulness",
                remedy="leave it out, or name tasks as well (--task)",
            )
    asked = requested(task or (), images=images, n=n, seed=seed)
    if bank is not None and references:
        raise UsageError(
            "references are not weighed behind demonstrations", where="--references", remedy="leave one out"
        )
    if references and asked.harness is not None and not (asked.names or asked.data):
        raise UsageError(
            "would be without effect: the harness scores its tasks itself",
            where="--references",
            remedy="name a task of alula's, such as data:FILE",
        )
    if bank is not None and (base is not None or asked.harness is not None or choices_for is not None):
        raise UsageError(
            "demonstrations are shown to one model, before questions of alula's own",
            where="--bank",
            remedy="leave --base, lm_eval tasks and --truthfulness out; compare two evaluations, one with --bank",
        )
    session = run_session(
        model,
        lambda name: load_model(name, dtype=dtype_named(dtype), device=device_named(device), policies=policies),
        lambda processor: choose_tasks(
            processor,
            names=asked.names,
            data=asked.data,
            images=images,
            n=n,
            seed=seed,
            history=history,  # type: ignore[arg-type]
            on_bad=asked.on_bad,  # type: ignore[arg-type]
            objects=asked.objects,
            more=asked.harness is not None or choices_for is not None,
        ),
        base=base,
        load_base=lambda name: load_model(name, dtype=dtype_named(dtype), device=device_named(device)),
        harness=asked.harness,
        choices_for=choices_for,
        template=settings,
        shots=None if bank is None else partial(shots_in, bank, count=shots, seed=seed, template=settings),
        references=references,
        output=output,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=True,
    )
    command = command_line()
    if session.paired is None:
        html = run_report(session.tuned, command=command)
        tables = [run_table(session.tuned), *run_ratio_tables(session.tuned)]
    else:
        outcome = comparison_outcome(session.paired, command=command, seconds=session.seconds)
        html = comparison_report(outcome, session.tuned)
        tables = [experiment_table(outcome), *paired_ratio_tables(outcome.methods["tuned"])]
        if session.alone is not None:
            tables += [run_table(session.alone), *run_ratio_tables(session.alone)]
    if session.skipped:
        talk.print(
            f"asked of {model} alone, since {base} takes no images (video, audio): {', '.join(session.skipped)}. To "
            "compare these too, name a base that sees, such as the host before tuning (RUN/stages/01-align/model)",
            highlight=False,
            soft_wrap=True,
        )
    for result in filter(None, (session.tuned, session.base)):
        for answers in result.tasks.values():
            for note in answers.notes:
                talk.print(f"{result.model}, {answers.title}: {note}", highlight=False, soft_wrap=True, markup=False)
    if as_json:
        typer.echo((session.paired or session.tuned).model_dump_json())
    else:
        Console().print(*tables, sep="\n")
    if report:
        talk.print(f"report: {write_text(output / 'report.html', html)}", soft_wrap=True, highlight=False)
    talk.print(f"answers: {output}", soft_wrap=True, highlight=False)
