"""Evaluating models by name: which tasks a model can take, and what is written where."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alula.chat_template import TemplateSettings
from alula.data.interleave import History
from alula.demonstrations import Shot
from alula.errors import UsageError
from alula.evaluation.defaults import defaults_for
from alula.evaluation.hallucination import HALLUCINATION, ObjectFiles, object_tasks
from alula.evaluation.harness import HarnessTasks, run_harness
from alula.evaluation.items import Task, has_answers, media_of
from alula.evaluation.likelihood import ChoiceTask, evaluate_likelihood, openings_of
from alula.evaluation.own_data import data_task
from alula.evaluation.pairing import compare
from alula.evaluation.prompts import takes, takes_images
from alula.evaluation.registry import named_tasks
from alula.evaluation.results import PairedRun, RunResult, TaskResult
from alula.evaluation.runner import evaluate
from alula.files import restore_directories
from alula.hosts.host import tokenizer_of
from alula.hosts.opening import opening_of
from alula.inputs import Intake

Loader = Callable[[str], tuple[Any, Any]]
"""a model's name -> (model, processor)"""


@dataclass(frozen=True)
class Session:
    """What an evaluation by name left behind; ``base`` and ``paired`` are None where there is no base."""

    tuned: RunResult
    base: RunResult | None
    paired: PairedRun | None
    skipped: Sequence[str]
    """tasks the base could not take, so that they are not compared"""
    seconds: float

    @property
    def alone(self) -> RunResult | None:
        """What the model answered that was not compared; None where everything was."""
        tasks = {name: task for name, task in self.tuned.tasks.items() if name in self.skipped}
        return self.tuned.model_copy(update={"tasks": tasks}) if tasks else None


def choose_tasks(
    processor: Any,
    *,
    names: Sequence[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    n: int | None = None,
    seed: int = 0,
    history: History | None = None,
    on_bad: Literal["fail", "skip"] = "fail",
    objects: ObjectFiles | None = None,
    more: bool = False,
) -> list[Task]:
    """Return the tasks a model is to answer.

    Args:
        processor: the model's; where nothing at all is named, its model is asked the questions that come with it
            (`alula.evaluation.defaults`).
        names: tasks by name (`alula.evaluation.registry`), and those of `HALLUCINATION` over ``objects``; by default
            those of ``objects`` where it is given.
        data: a file or folder of the user's own; ``images`` is its image folder.
        n: items per task; all of ``data`` and what each named task itself says by default.
        seed: draws the items of named tasks.
        history: earlier answers in dialogues as written (``"gold"``) or the model's own (``"generated"``); by default
            as written, or as the records of ``data`` say.
        on_bad: what becomes of bad records of ``data`` (`data_task`).
        objects: the user's own files for the tasks of `HALLUCINATION`.
        more: the model is also asked other questions than these.

    Raises:
        UsageError: an unknown name, or nothing to ask. DataError: unusable data.
    """
    objects = objects or ObjectFiles()
    if names is None and objects:
        names = HALLUCINATION if objects.annotations is not None else ()
    if names is None and (data is not None or more):
        names = ()
    if names is None:
        defaults = defaults_for(processor)
        if defaults is None:
            raise UsageError(
                "say what to ask: no questions come with this model",
                where="--task",
                remedy="--task data:FILE (your own conversations), --task lm_eval:NAME, --task pope:FILE, or a task by "
                "name; `alula eval --help` lists them",
            )
        names = defaults.tasks(takes(processor))
    about = [name for name in names if name in HALLUCINATION and objects.annotations is not None]
    tasks = named_tasks([name for name in names if name not in about], n=n, seed=seed, history=history)
    tasks += object_tasks(about, objects, n=n, seed=seed)
    if data is not None:
        tasks.append(data_task(data, images=images, n=n, history=history, on_bad=on_bad))
    return tasks


def asking(base_processor: Any, processor: Any) -> Any:
    """The processor to ask a base with: the tuned host's own words where the base is a text LLM that shares its
    vocabulary, else the base's."""
    if takes_images(base_processor):
        return base_processor
    own, host = tokenizer_of(base_processor).get_vocab(), tokenizer_of(processor).get_vocab()
    # tokens added for the host, such as its image placeholder, do not occur in text
    shared = all(host.get(token) == number for token, number in own.items())
    return Intake(processor, text_only=True) if shared else base_processor


def run_session(
    model: str,
    load: Loader,
    tasks_for: Callable[[Any], list[Task]],
    *,
    base: str | None = None,
    load_base: Loader | None = None,
    harness: HarnessTasks | None = None,
    choices_for: Callable[[Any], Sequence[ChoiceTask]] | None = None,
    template: TemplateSettings | None = None,
    shots: Callable[[Any, Any], Sequence[Shot]] | None = None,
    references: bool = False,
    output: str | os.PathLike[str] | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    progress: bool = False,
) -> Session:
    """Put the tasks to ``model``, and to ``base`` where there is one, and compare.

    Only one model is held in memory at a time. With ``output``, finished items are kept there as they come, and a later
    call goes on from them (tasks of the harness start anew).

    Args:
        load: loads a model by name.
        tasks_for: chooses the tasks, given the processor of ``model``; there may be none where there is ``harness`` or
            ``choices_for``.
        load_base: loads ``base``, where that is done otherwise.
        harness: tasks of lm-evaluation-harness asked as well, of both models behind the tokens that the tokenizer of
            ``base`` writes before a text.
        choices_for: chooses tasks scored by likelihood, asked as well, likewise.
        template: variables for both models' chat templates beside the messages.
        shots: gives encoded demonstrations for the model and its processor, behind which it is asked.
        references: weigh how likely the references of ``tasks_for`` are as well (`alula.evaluation.evaluate`), of
            those whose references are answers.

    Returns:
        the session; with ``output`` also written there as ``tuned.json``, ``base.json`` and ``paired.json``.
    """
    started = time.perf_counter()
    load_base = load_base or load
    folder = Path(output) if output is not None else None
    if folder is not None:
        restore_directories(folder)  # of a killed call
    if harness is not None:
        harness.check()
    options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}

    def ask(role: str, name: str, tasks: list[Task]) -> RunResult:
        parts = []
        if tasks or (harness is None and not choices):
            journal = folder / f"{role}-answers.jsonl" if folder is not None else None
            parts.append(
                evaluate(
                    loaded,
                    processor,
                    tasks,
                    name=name,
                    template=template,
                    shots=shown,
                    references=[task.name for task in tasks if has_answers(task)] if references else (),
                    journal=journal,
                    progress=progress,
                    **options,
                )
            )
        chat = any(task.chat for task in choices)
        # plain prompts pass no template, which is refused only where nothing passes it
        passed = bool(tasks) or chat or (harness is not None and harness.chat)
        if harness is not None:
            told = template if harness.chat or not passed else None
            parts.append(run_harness(loaded, processor, harness, name=name, template=told, opening=opening, **options))
        if choices:
            told = template if chat or not passed else None
            parts.append(
                evaluate_likelihood(
                    loaded,
                    processor,
                    choices,
                    name=name,
                    batch_size=batch_size,
                    template=told,
                    openings=openings,
                    progress=progress,
                )
            )
        return _joined(parts)

    # what the base's tokenizer writes before a text is read before anything is asked: both models get it
    opening, openings = None, None
    if base is not None and (harness is not None or choices_for is not None):
        of_base = load_base(base)[1]
        opening = opening_of(of_base, chat=harness.chat) if harness is not None else None
        openings = openings_of(of_base)
    loaded, processor = load(model)
    tasks = tasks_for(processor)
    if references and tasks and not any(map(has_answers, tasks)):
        named = ", ".join(task.name for task in tasks)
        raise UsageError(
            f"the references of {named} are no answers, but what is looked for in them",
            where="references",
            remedy="leave it out, or name a task whose questions have answers",
        )
    shown: Sequence[Shot] = () if shots is None else shots(loaded, processor)
    choices = [] if choices_for is None else list(choices_for(processor))
    tuned = ask("tuned", model, tasks)
    shown = ()
    of_tuned = processor
    del loaded, processor
    before, pairs, skipped = None, None, []
    if base is not None:
        loaded, processor = load_base(base)
        if getattr(processor, "chat_template", None) is None:  # a base LLM, which the host gave one
            processor = asking(processor, of_tuned)
        skipped = [task.name for task in tasks if not _shown(task) <= takes(processor)]
        common = [task for task in tasks if task.name not in skipped]
        if not common and harness is None and not choices:
            raise UsageError(
                f"{base} does not take what every task shows",
                where="--base",
                remedy="compare with a host of the same media, or choose text tasks",
            )
        before = ask("base", base, common)
        pairs = compare(before, tuned)
    if folder is not None:
        for name, record in (("tuned", tuned), ("base", before), ("paired", pairs)):
            if record is not None:
                record.save(folder / f"{name}.json")
    return Session(tuned, before, pairs, skipped, time.perf_counter() - started)


def _joined(parts: Sequence[RunResult]) -> RunResult:
    """The tasks of several runs of one model as one run; the last names all packages that took part."""
    tasks: dict[str, TaskResult] = {}
    for part in parts:
        twice = tasks.keys() & part.tasks.keys()
        if twice:
            raise UsageError(f"two tasks are called {min(twice)!r}")
        tasks |= part.tasks
    # plain prompts tell a template nothing, all others the same
    told = next((part.conditions.template for part in parts if part.conditions.template), {})
    return parts[-1].model_copy(
        update={
            "conditions": parts[-1].conditions.model_copy(update={"template": told}),
            "tasks": tasks,
            "seconds": sum(part.seconds for part in parts),
        }
    )


def _shown(task: Task) -> set[str]:
    """The media a task shows."""
    return {kind for item in task.items() for kind, _ in media_of(item.messages)}
