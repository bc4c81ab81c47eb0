"""The audit itself: one pass of all probes, the control passes, the text answers, one model in memory at a time."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from alula.anatomy import Anatomy
from alula.auditing import memory
from alula.auditing.measuring import CHECKPOINT_SECONDS, measure
from alula.auditing.plan import Plan
from alula.auditing.record import Audit, Memory
from alula.auditing.samples import Chosen, choose
from alula.auditing.sections import Measurement, Pass
from alula.data import Collator, Quarantine
from alula.errors import DataError, HostError, UsageError
from alula.evaluation import Defaults, RunResult, Task, compare, defaults_for, evaluate
from alula.evaluation.conditions import conditions, decisive, fingerprint
from alula.evaluation.prompts import takes, takes_images
from alula.evaluation.references import References
from alula.evaluation.session import asking
from alula.hosts.context import context_length
from alula.hosts.decoding import Decoding
from alula.inputs import Intake
from alula.jobs import add_session, claim, refuse_others
from alula.probes import Probe, Resampling
from alula.progress import Bar, bar
from alula.seam import evaluating, needs_roles
from alula.training.environment import readable_environment

Loader = Callable[[str], tuple[Any, Any]]
"""a model's name -> (model, processor)"""


def audit(
    plan: Plan,
    load: Loader,
    *,
    command: str = "",
    progress: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Audit:
    """Measure a model as the plan says.

    What is finished is kept under ``plan.output``: answers as they come, measurements every ``checkpoint_seconds``. A
    call that was stopped, killed included, goes on from there when it is made again, to the same figures.

    Args:
        load: loads a model by name; the base only after the model is gone.
        command: noted in the record.
        progress: draw progress bars with the time left on stderr.

    Raises:
        HostError: the model takes no images, or is of a class that alula does not know. DataError: no usable
            conversation shows an image. UsageError: the output holds something else.
    """
    began = time.perf_counter()
    refuse_others(plan.output, plan.facts(), "audit")
    chosen, asked = _named(plan, None, ()) if plan.names_all else (None, {})  # before a model is loaded
    model, processor = load(plan.model)
    if not takes_images(processor):
        raise HostError(
            f"{type(model).__name__} takes no images, and an audit looks at what images do",
            where=plan.model,
            remedy="audit an image host (`alula eval` is for text LLMs), or build one with alula.build_host",
        )
    if not plan.names_all:
        defaults = defaults_for(processor)
        chosen, asked = _named(plan, defaults, () if defaults is None else defaults.tasks(takes(processor)))
    plan.told.keywords(processor)  # refuses what the template does not read
    claim(plan.output, plan.facts(), "audit")
    anatomy = Anatomy.of(model)
    with evaluating(model):
        found = {} if chosen is None else _probe(plan, model, processor, anatomy, chosen, progress, checkpoint_seconds)
    state = conditions(model, Decoding(), plan.batch_size)
    facts = {
        "model_class": type(anatomy.host).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": anatomy.num_layers,
        "device": state.device,
        "dtype": state.dtype,
    }
    results = found.pop("results", {})
    if asked:
        answers = {
            name: _answers(
                plan, model, processor, tasks, plan.questions[name].of_base(tasks), "model", plan.model, progress
            )
            for name, tasks in asked.items()
        }
        del model, anatomy  # before the base is loaded
        results |= _questions(plan, answers, load, asked, processor, progress)
    return Audit(
        model=plan.model,
        base=plan.base,
        title=_title(plan.model),
        facts=plan.facts(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        environment=readable_environment(),
        seconds=add_session(plan.output, time.perf_counter() - began),
        results=results,
        **facts,
        **found,
    )


def _named(plan: Plan, defaults: Defaults | None, tasks: Sequence[str]) -> tuple[Chosen | None, dict[str, list[Task]]]:
    """What the model is shown and asked: what the plan names, else what comes with the model."""
    chosen = choose(plan, defaults) if plan.measurements else None
    asked = {name: each.tasks(plan.text, plan.items, plan.seed, tasks) for name, each in plan.questions.items()}
    return chosen, asked


# -- probes -----------------------------------------------------------------------------------------------------------


def _probe(
    plan: Plan, model: Any, processor: Any, anatomy: Anatomy, chosen: Chosen, progress: bool, every: float
) -> dict[str, Any]:
    """Everything that is measured on images, as fields of an `Audit`."""
    bad = Quarantine(plan.output / "unusable.jsonl")
    bad.path.unlink(missing_ok=True)  # of an earlier call; every call looks at all conversations
    measurements = plan.measurements
    passes = _passes(plan, model, anatomy)
    watching = [probe for probes, _ in passes.values() for probe in probes.values()]
    collate = Collator(
        processor,
        labels=False,
        roles=needs_roles(model) or any(probe.needs_roles for probe in watching),
        template=plan.told,
        context=context_length(model),
        quarantine=bad,
    )
    state = conditions(model, Decoding(), plan.batch_size)
    identity = {"weights": fingerprint(model), "samples": chosen.digest, **decisive(state)}
    total = chosen.count(plan.batch_size)
    done: dict[str, dict[str, Probe]] = {}
    with bar(total * len(passes), progress) as advancing:
        for name, (probes, surroundings) in passes.items():
            with surroundings.whole():
                done[name] = measure(
                    model,
                    chosen.batches(collate, plan.batch_size),
                    probes,
                    plan.output / "measured" / name,
                    total=total,
                    identity=identity,
                    around=surroundings.around,
                    done=partial(_advance, advancing, f"{_title(plan.model)}: {name}"),
                    every=every,
                )
        unusable = len(bad.entries())
        if unusable == len(chosen.indices):
            raise DataError(
                f"none of the {unusable} conversations with images can be used",
                where=str(bad.path),
                remedy="each line says what is wrong with one of them",
            )
        advancing.advance(f"{_title(plan.model)}: figures", 0)
        taken = [(name, probe) for probes in done.values() for name, probe in probes.items()]
        how = Resampling(seed=plan.seed)
        results = {
            name: measurement.result(
                {of: probes[name] for of, probes in done.items() if name in probes}, how, model, processor
            )
            for name, measurement in measurements.items()
        }
    bound = memory.bound(((measurements[name], probe) for name, probe in taken), anatomy)
    return {
        "results": results,
        "data": chosen.title,
        "measured": len(chosen.indices) - unusable,
        "without_image": chosen.without_image,
        "unusable": chosen.unusable + unusable,
        "memory": Memory(memory.held(probe for _, probe in taken), bound, memory.peak()),
    }


def _advance(advancing: Bar, label: str, count: int) -> None:
    advancing.advance(label, count)


def _passes(plan: Plan, model: Any, anatomy: Anatomy) -> dict[str, tuple[dict[str, Probe], Pass]]:
    """Probes and surroundings of every pass: of the model as it is, and of each control."""
    measurements = plan.measurements
    found = {"model": ({name: _made(plan, name, each) for name, each in measurements.items()}, Pass())}
    for name, each in measurements.items() if plan.controls else ():
        for control, surroundings in each.controls(model, anatomy, plan.seed).items():
            found[control] = ({name: _made(plan, name, each)}, surroundings)
    return found


def _made(plan: Plan, section: str, measurement: Measurement) -> Probe:
    own = plan.probes.get(section, {})
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    legal = [field.name for field in dataclasses.fields(measurement.probe) if field.init]  # type: ignore[arg-type]
    unknown = next((key for key in settings if key not in legal), None)
    if unknown is not None:
        close = difflib.get_close_matches(unknown, legal, n=1)
        raise UsageError(
            "unknown setting" + (f"; did you mean {close[0]}?" if close else ""),
            where=f"--probe {section}.{unknown}",
            remedy=f"settings of {section}: {', '.join(legal)}",
        )
    return measurement.probe(**{"seed": plan.seed, **settings})


# -- questions ---------------------------------------------------------------------------------------------------------


def _answers(
    plan: Plan,
    model: Any,
    processor: Any,
    tasks: list[Task],
    weighed: list[Task],
    role: str,
    name: str,
    progress: bool,
) -> RunResult:
    """The answers to the tasks, and of those ``weighed`` how likely the references are."""
    # answers are short and prompts without images small: larger batches than those of the probes
    journal = plan.output / f"{role}-answers.jsonl"
    size = max(16, plan.batch_size)
    chosen, why_not = [task.name for task in weighed], None
    try:
        References(model, processor, plan.told)
    except UsageError as error:  # a template that marks no answers can be asked all the same
        chosen, why_not = [], f"{error.where}: {error.message}" if error.where else error.message
    run = evaluate(
        model,
        processor,
        tasks,
        name=name,
        batch_size=size,
        template=plan.told,
        references=chosen,
        journal=journal,
        progress=progress,
    )
    if why_not is None:
        return run
    told = {task.name: run.tasks[task.name].model_copy(update={"unweighed": [why_not]}) for task in weighed}
    return run.model_copy(update={"tasks": {**run.tasks, **told}})


def _questions(
    plan: Plan,
    answers: dict[str, RunResult],
    load: Loader,
    asked: dict[str, list[Task]],
    processor: Any,
    progress: bool,
) -> dict[str, Any]:
    """What the sections that ask make of the answers, beside the base's where there is one."""
    if plan.base is None:
        return {name: each.result(answers[name], None, False) for name, each in plan.questions.items()}
    base, base_processor = load(plan.base)
    asker = asking(base_processor, processor)
    results = {}
    for name, each in plan.questions.items():
        common = each.of_base(asked[name])
        theirs = _answers(plan, base, asker, common, common, "base", plan.base, progress)
        results[name] = each.result(answers[name], compare(theirs, answers[name]), isinstance(asker, Intake))
    return results


def _title(name: str) -> str:
    parts = Path(name).parts
    return "/".join(parts[-2:]) if os.path.isdir(name) else name
