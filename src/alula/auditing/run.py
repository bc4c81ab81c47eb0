"""The audit itself: one pass of all probes, the control passes, the text answers, one model in memory at a time."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alula.anatomy import Anatomy
from alula.auditing import memory
from alula.auditing.measuring import CHECKPOINT_SECONDS, measure
from alula.auditing.plan import Plan
from alula.auditing.record import Audit, Memory, TextAnswers
from alula.auditing.samples import Chosen, choose
from alula.auditing.text import AFTER_IMAGE, BARE, asking, tasks_of
from alula.data import Collator, Quarantine
from alula.errors import DataError, HostError
from alula.evaluation import Comparison, RunResult, Task, compare, evaluate
from alula.evaluation.conditions import conditions, decisive, fingerprint
from alula.evaluation.pairing import compare_scores
from alula.evaluation.progress import Bar, bar
from alula.evaluation.prompts import takes_images
from alula.evaluation.runner import evaluating
from alula.hosts.context import context_length
from alula.hosts.decoding import Decoding
from alula.hosts.host import tokenizer_of
from alula.inputs import Intake
from alula.jobs import add_session, claim, refuse_others
from alula.probes import (
    Alignment,
    AttentionShift,
    Geometry,
    LensResult,
    Overlap,
    Probe,
    Resampling,
    VocabularyLens,
    noise_prompt,
    untrained_connector,
)
from alula.training.environment import readable_environment

Loader = Callable[[str], tuple[Any, Any]]
"""a model's name -> (model, processor)"""

_PROBES: Mapping[str, Callable[..., Probe]] = {
    "attention": AttentionShift,
    "alignment": Alignment,
    "geometry": Geometry,
    "lens": VocabularyLens,
    "overlap": Overlap,
}


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
    chosen = choose(plan) if plan.probing else None
    tasks = tasks_of(plan) if "text" in plan.sections else []
    model, processor = load(plan.model)
    if not takes_images(processor):
        raise HostError(
            f"{type(model).__name__} takes no images, and an audit looks at what images do",
            where=plan.model,
            remedy="audit an image host (`alula eval` is for text LLMs), or build one with alula.build_host",
        )
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
    text = None
    if tasks:
        tuned = _answers(plan, model, processor, tasks, "model", plan.model, progress)
        del model, anatomy  # before the base is loaded
        text = _text(plan, tuned, load, tasks, processor, progress)
    return Audit(
        model=plan.model,
        base=plan.base,
        title=_title(plan.model),
        facts=plan.facts(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        environment=readable_environment(),
        seconds=add_session(plan.output, time.perf_counter() - began),
        text=text,
        **facts,
        **found,
    )


# -- probes -----------------------------------------------------------------------------------------------------------


def _probe(
    plan: Plan, model: Any, processor: Any, anatomy: Anatomy, chosen: Chosen, progress: bool, every: float
) -> dict[str, Any]:
    """Everything that is measured on images, as fields of an `Audit`."""
    bad = Quarantine(plan.output / "unusable.jsonl")
    bad.path.unlink(missing_ok=True)  # of an earlier call; every call looks at all conversations
    collate = Collator(processor, labels=False, template=plan.told, context=context_length(model), quarantine=bad)
    state = conditions(model, Decoding(), plan.batch_size)
    identity = {"weights": fingerprint(model), "samples": chosen.digest, **decisive(state)}
    passes = _passes(plan, model, anatomy)
    total = chosen.count(plan.batch_size)
    done: dict[str, dict[str, Probe]] = {}
    with bar(total * len(passes), progress) as advancing:
        for name, (probes, around, whole) in passes.items():
            with whole():
                done[name] = measure(
                    model,
                    chosen.batches(collate, plan.batch_size),
                    probes,
                    plan.output / "measured" / name,
                    total=total,
                    identity=identity,
                    around=around,
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
        every_probe = [probe for probes in done.values() for probe in probes.values()]
        how = Resampling(seed=plan.seed)
        results: dict[str, Any] = {
            # masks are made from the weights, which a probe read from a file does not know
            name: probe.result(how, model=model) if isinstance(probe, Overlap) else probe.result(how)
            for name, probe in done["model"].items()
        }
    if "lens" in results:
        results["words"] = _words(results["lens"], processor)
    return {
        **results,
        "controls": {
            name: probe.result(how) for name, probes in done.items() if name != "model" for probe in probes.values()
        },
        "data": chosen.title,
        "measured": len(chosen.indices) - unusable,
        "without_image": chosen.without_image,
        "unusable": chosen.unusable + unusable,
        "memory": Memory(memory.held(every_probe), memory.bound(every_probe, anatomy), memory.peak()),
    }


def _advance(advancing: Bar, label: str, count: int) -> None:
    advancing.advance(label, count)


_Pass = tuple[dict[str, Probe], Callable[[int], AbstractContextManager[Any]], Callable[[], AbstractContextManager[Any]]]
"""probes, what surrounds batch n, what surrounds the pass"""


def _passes(plan: Plan, model: Any, anatomy: Anatomy) -> dict[str, _Pass]:
    def nothing(number: int = 0) -> AbstractContextManager[Any]:
        return nullcontext()

    found: dict[str, _Pass] = {}
    probes = {name: _PROBES[name](seed=plan.seed) for name in plan.probing}
    found["model"] = (probes, nothing, nothing)
    if "alignment" in plan.probing and plan.controls:
        # noise by number of batch, so that a pass that was killed goes on with the noise it would have had
        seed = plan.seed * 1_000_003
        found["noise"] = (
            {"alignment": Alignment(seed=plan.seed)},
            lambda number: noise_prompt(model, seed=seed + number),
            nothing,
        )
        if anatomy.projector is not None and _can_start_afresh(model):
            found["untrained"] = (
                {"alignment": Alignment(seed=plan.seed)},
                nothing,
                lambda: untrained_connector(model, seed=plan.seed),
            )
    return found


def _can_start_afresh(model: Any) -> bool:
    try:
        with untrained_connector(model):
            return True
    except HostError:
        return False


def _words(lens: LensResult, processor: Any) -> dict[int, str]:
    """The text of every token the lens names."""
    tokenizer = tokenizer_of(processor)
    named = {token for kind in lens.kinds.values() for state in kind.top for token, _ in state}
    named |= {tokens[0] for example in lens.examples for row in example.tokens for tokens in row}
    return {token: tokenizer.decode([token]) for token in sorted(named)}


# -- text -------------------------------------------------------------------------------------------------------------


def _answers(
    plan: Plan, model: Any, processor: Any, tasks: list[Task], role: str, name: str, progress: bool
) -> RunResult:
    # answers are short and prompts without images small: larger batches than those of the probes
    journal = plan.output / f"{role}-answers.jsonl"
    size = max(16, plan.batch_size)
    return evaluate(
        model,
        processor,
        tasks,
        name=name,
        batch_size=size,
        template=plan.told,
        journal=journal,
        progress=progress,
    )


def _text(plan: Plan, tuned: RunResult, load: Loader, tasks: list[Task], processor: Any, progress: bool) -> TextAnswers:
    after = _after_image(tuned)
    if plan.base is None:
        return TextAnswers(tuned, after_image=after)
    base, base_processor = load(plan.base)
    asker = asking(base_processor, processor)
    bare = [task for task in tasks if task.name == BARE]
    pairs = compare(_answers(plan, base, asker, bare, "base", plan.base, progress), tuned)
    return TextAnswers(tuned, pairs, after, isinstance(asker, Intake))


def _after_image(answers: RunResult) -> Comparison | None:
    """The same questions after an image (second) against bare (first), through one model."""
    if AFTER_IMAGE not in answers.tasks:
        return None
    # questions that fit into the context bare may not fit behind an image
    behind = {item.id.removesuffix("@image"): item for item in answers.tasks[AFTER_IMAGE].items}
    bare = [item for item in answers.tasks[BARE].items if item.id in behind]
    after = [behind[item.id] for item in bare]
    units = {mark: number for number, mark in enumerate(dict.fromkeys(item.prompt_hash for item in bare))}
    return compare_scores(
        np.array([item.score for item in bare]),
        np.array([item.score for item in after]),
        np.array([units[item.prompt_hash] for item in bare]),
    )


def _title(name: str) -> str:
    parts = Path(name).parts
    return "/".join(parts[-2:]) if os.path.isdir(name) else name
