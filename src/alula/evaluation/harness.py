"""Tasks of lm-evaluation-harness (extra ``eval``), put to any model alula loads and kept item by item.

The harness makes the prompts, the few-shot examples and the metrics; what comes back is a `RunResult` like that of
`alula.evaluation.evaluate`, so two models can be paired and flips looked at. Only text goes through: image tasks of the
harness are refused by it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from alula.bounds import check_count, check_seed
from alula.chat_template import TemplateSettings
from alula.errors import EvaluationError, UsageError
from alula.evaluation import token_ids
from alula.evaluation.conditions import conditions, fingerprint
from alula.evaluation.results import ItemResult, Part, RunResult, TaskResult, TooLong, Turn
from alula.evaluation.runner import check_sizes
from alula.hosts.configs import first_line
from alula.hosts.context import context_length
from alula.hosts.decoding import Decoding
from alula.hosts.host import tokenizer_of
from alula.hosts.opening import opening_of
from alula.hosts.prompted import refuse_lost_prompt
from alula.seam import evaluating

_NORMALISED = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}
"""metrics of multiple choice that divide log-likelihoods by the length of the choice"""
_JOINT = " | "


@dataclass(frozen=True)
class HarnessTasks:
    """Which harness tasks to ask, and how.

    Args:
        names: tasks, groups or tags the harness knows, or paths of task YAMLs; ``name:metric`` scores by that metric
            instead of the first one of the task that gives every item a score between 0 and 1.
        include: folder with task YAMLs of one's own; they go before tasks of the same name that the harness ships.
        num_fewshot: examples before each question instead of the task's own number (a task that fixes 0 keeps it).
        chat: put prompts through the model's chat template.
        n: only the first ``n`` items of each task.
        seed: of the few-shot examples and of everything a task draws.
    """

    names: Sequence[str]
    include: str | os.PathLike[str] | None = None
    num_fewshot: int | None = None
    chat: bool = False
    n: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError("no task named", where="lm-eval")
        check_seed(self.seed, "lm-eval: seed")
        if self.n is not None:
            check_count(self.n, "lm-eval: n")
        if self.include is not None and not Path(self.include).is_dir():
            raise UsageError("no such folder of task files", where=str(self.include))

    def check(self) -> None:
        """Look the names up, without a model and without reading any data.

        Raises:
            UsageError: the extra ``eval`` is not installed, or a name is unknown (similar ones are proposed).
        """
        for spec in self.names:
            self._manager(_split(spec)[0])

    def load(self, spec: str) -> dict[str, Any]:
        """The harness' tasks behind one of ``names``, by leaf name, freshly made.

        Raises:
            UsageError: as `check`. EvaluationError: the task or its data cannot be loaded.
        """
        name, _ = _split(spec)
        manager = self._manager(name)
        try:
            tasks: dict[str, Any] = manager.load([name])["tasks"]
        except Exception as error:  # a task file may hold and raise anything; so may the download of its data
            raise EvaluationError(
                f"the task cannot be loaded: {first_line(error)}",
                where=f"lm-eval task {name!r}",
                remedy="its data must be on this machine or within reach of it",
            ) from error
        for task in tasks.values():
            own = task.get_config("num_fewshot")
            if self.num_fewshot is not None and own != 0:
                task.set_config(key="num_fewshot", value=self.num_fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.seed)
        return tasks

    def _manager(self, name: str) -> Any:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise UsageError(
                "tasks of lm-evaluation-harness need the extra `eval`", remedy="pip install 'alula[eval]'"
            ) from None
        known: list[str] = []
        # the harness' own index of many thousand files is only read for names that are not local
        for defaults in (False, True):
            include = str(self.include) if self.include is not None else None
            if defaults or include or Path(name).is_file():
                manager = TaskManager(include_path=include, include_defaults=defaults)
                if name in manager.task_index or (not defaults and Path(name).is_file()):
                    return manager
                known += manager.all_tasks
        close = difflib.get_close_matches(name, known, n=4)
        raise UsageError(
            f"lm-evaluation-harness has no task {name!r}",
            where=str(self.include) if self.include is not None else None,
            remedy=f"did you mean {', '.join(close)}?" if close else "see: lm_eval ls tasks",
        )


def run_harness(
    model: Any,
    processor: Any,
    tasks: HarnessTasks,
    *,
    name: str = "model",
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    template: TemplateSettings | None = None,
    opening: Sequence[str] | None = None,
) -> RunResult:
    """Put harness tasks to a text LLM, an image host (as a text model), or either with an adapter.

    Scores move with the batch size in the last digits, so it is fixed, never found out by trying, and recorded. Answers
    are generated as the task says, otherwise greedily; the checkpoint's own generation defaults do not count.

    Items that do not fit into the model's context are left out (`TaskResult.too_long`), and so are those to which the
    task gives NaN for a score (`TaskResult.unscored`).

    Args:
        processor: the model's processor or tokenizer; left as it is.
        max_new_tokens: bounds generated answers instead of each task's own limit.
        template: variables for the chat template beside the messages.
        opening: tokens that go before every text that does not start with them, such as ``("<s>",)``. By default what
            the language model's own tokenizer writes (`alula.hosts.opening.opening_of`); a model that is compared with
            another is asked with the other's.

    Raises:
        UsageError: the extra is missing, a task is unknown, or it has no such metric; settings of a template that is
            not used, or does not read them.
        EvaluationError: a task cannot be loaded or run, or gives no scores per item; none of its items fits into the
            context; a prompt would start with BOS twice; the model's likelihoods are NaN.
    """
    check_sizes(batch_size, max_new_tokens)
    tasks.check()
    from alula.evaluation.harness_model import HarnessModel

    started = time.perf_counter()
    if tasks.chat and getattr(processor, "chat_template", None) is None:
        raise UsageError("has no chat template", where=type(processor).__name__, remedy="leave out chat=true")
    template = template or TemplateSettings()
    if template.arguments and not tasks.chat:
        raise UsageError(
            "plain prompts pass no template, so its settings would be without effect",
            where="template",
            remedy="leave them out, or put prompts through the template (chat=true)",
        )
    refuse_lost_prompt(model)
    told = template.recorded(processor) if tasks.chat else {}
    state = conditions(model, Decoding(), batch_size, told)
    packages = {package: version(package) for package in ("lm_eval", "datasets")}
    results = {}
    with evaluating(model), _quiet(), _seeded(tasks.seed):
        written = opening_of(processor, chat=tasks.chat) if opening is None else tuple(opening)
        tokenizer = tokenizer_of(processor)
        for spec in tasks.names:
            wrapped = HarnessModel(model, tokenizer, processor, batch_size, template=template, opening=written)
            results[spec] = _run(wrapped, spec, tasks, max_new_tokens)
    return RunResult(
        model=name,
        fingerprint=fingerprint(model),
        conditions=state.model_copy(update={"versions": {**state.versions, **packages}}),
        tasks=results,
        seconds=time.perf_counter() - started,
    )


def _run(model: Any, spec: str, wanted: HarnessTasks, max_new_tokens: int | None) -> TaskResult:
    from lm_eval.evaluator import evaluate

    where = f"lm-eval task {spec!r}"
    leaves = wanted.load(spec)
    if max_new_tokens is not None:
        for task in leaves.values():
            if task.OUTPUT_TYPE == "generate_until":
                task.set_config(key="generation_kwargs", value={"max_gen_toks": max_new_tokens}, update=True)
    try:
        output = evaluate(
            lm=model,
            task_dict={"tasks": leaves, "groups": {}, "group_map": {}},
            limit=wanted.n,
            bootstrap_iters=0,
            apply_chat_template=wanted.chat,
            fewshot_as_multiturn=wanted.chat,
        )
    except (AssertionError, ValueError, KeyError, TypeError, RuntimeError, NotImplementedError) as error:
        raise EvaluationError(f"the harness failed: {first_line(error)}", where=where) from error
    items, unscored, too_long, about = [], [], [], {}
    for leaf, task in leaves.items():
        samples = sorted(output["samples"][leaf], key=lambda sample: sample["doc_id"])
        kept = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        metric = _metric(task, kept, _split(spec)[1], where)
        sizes = [max(model.too_long(each) or 0 for each in sample["arguments"]) for sample in kept]
        lost = [(sample, size) for sample, size in zip(kept, sizes, strict=True) if size]
        too_long += [TooLong(id=_id(leaf, sample), family=leaf, tokens=size) for sample, size in lost]
        kept = [sample for sample, size in zip(kept, sizes, strict=True) if not size]
        unscored += [_id(leaf, sample) for sample in kept if math.isnan(sample[metric])]
        items += [_item(leaf, task, sample, metric, model) for sample in kept if not math.isnan(sample[metric])]
        about[leaf] = {
            "version": output["versions"].get(leaf),
            "metric": metric,
            "filter": samples[0]["filter"],
            "num_fewshot": task.get_config("num_fewshot"),
            "output_type": task.OUTPUT_TYPE,
            "generation": json.loads(json.dumps(task.get_config("generation_kwargs"), default=str)),
        }
    if not items:
        _refuse_nothing_scored(unscored, too_long, model.max_length, where)
    generated = any(task.OUTPUT_TYPE == "generate_until" for task in leaves.values())
    return TaskResult(
        name=spec,
        title=spec,
        max_new_tokens=_limit(leaves, model) if generated else 0,
        settings={
            "harness": about,
            "chat": wanted.chat,
            "n": wanted.n,
            "seed": wanted.seed,
            "opening": model.opening,
        },
        items=items,
        unscored=unscored,
        too_long=too_long,
        context=context_length(model.model),
    )


def _metric(task: Any, samples: Sequence[Mapping[str, Any]], wished: str | None, where: str) -> str:
    """The metric that scores items: the wished one, or the task's first that gives each a number in [0, 1].

    NaN counts as a number here: which metric is taken must not depend on what one model answers.
    """
    offered = [entry["metric"] for entry in task.get_config("metric_list") or () if isinstance(entry["metric"], str)]
    better = task.higher_is_better()
    usable = [
        metric
        for metric in dict.fromkeys([*offered, *samples[0]["metrics"]])
        if better.get(metric, True) and all(_is_share(sample.get(metric)) for sample in samples)
    ]
    if wished is not None and wished not in usable:
        raise UsageError(
            f"no metric {wished!r} that scores single items", where=where, remedy=f"choose among {', '.join(usable)}"
        )
    if not usable:
        raise EvaluationError(
            f"none of its metrics ({', '.join(samples[0]['metrics'])}) scores single items between 0 and 1",
            where=where,
            remedy="items are what is compared: choose a task with accuracy or exact match",
        )
    return wished or usable[0]


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_) and (0 <= float(value) <= 1 or math.isnan(value))


def _refuse_nothing_scored(unscored: Sequence[str], too_long: Sequence[TooLong], context: int, where: str) -> NoReturn:
    """Say why no item is left: prompts beyond the context, or scores that are NaN.

    The harness' own multiple choice with several right answers (truthfulqa_mc2) divides probabilities that are all 0
    where every choice is long or the model finds it unlikely beyond the range of floats.
    """
    if not unscored:
        raise EvaluationError(
            f"none of its items fits into the model's context of {context} tokens; the shortest takes "
            f"{min(item.tokens for item in too_long)}",
            where=where,
            remedy="ask with fewer examples, or a task of shorter questions",
        )
    named = f"{', '.join(unscored[:5])}{', ...' if len(unscored) > 5 else ''}"
    raise EvaluationError(
        f"its score is not a number for all {len(unscored)} items that could be asked ({named})",
        where=where,
        remedy="choose another metric (NAME:METRIC) or task, or look whether the model is broken",
    )


def _id(leaf: str, sample: Mapping[str, Any]) -> str:
    return f"{leaf}/{sample['doc_id']}"


def _item(leaf: str, task: Any, sample: Mapping[str, Any], metric: str, model: Any) -> ItemResult:
    answer, gold = _exchange(task, sample, metric)
    said = model.thought(sample["arguments"][0])
    unfinished = said is not None and not said.finished
    # the harness' own prompt hash is of the first request's context: options and generation settings count too
    asked = [sample["doc_hash"], sample["prompt_hash"], sample["target_hash"], sample["arguments"]]
    return ItemResult(
        id=_id(leaf, sample),
        family=leaf,
        prompt_hash=hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest(),
        gold=gold,
        answer=answer,
        score=0.0 if unfinished else float(sample[metric]),
        thought=said.thought if said is not None else "",
        unfinished=unfinished,
        token_ids=token_ids.write([model.asked(arguments) for arguments in sample["arguments"]]),
        prompt=[Turn(role="user", content=[Part(text=str(sample["arguments"][0][0]))])],
    )


def _exchange(task: Any, sample: Mapping[str, Any], metric: str) -> tuple[str, str]:
    """The model's answer and the reference, as texts."""
    target, replies = sample["target"], sample["filtered_resps"]
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(sample["doc"])
        if task.multiple_input:  # several contexts for one ending: the answer is which
            target = task.doc_to_text(sample["doc"])
        size = _NORMALISED.get(metric, lambda choice: 1)
        likelihoods = [reply[0] / size(choice) for reply, choice in zip(replies, choices, strict=False)]
        return choices[int(np.argmax(likelihoods))], _named(target, choices)
    if task.OUTPUT_TYPE == "generate_until":
        choices = task.doc_to_choice(sample["doc"]) if task.get_config("doc_to_choice") is not None else []
        return _JOINT.join(map(str, replies)), _named(target, choices)
    likelihood, greedy = replies[0]
    return f"log-likelihood {likelihood:.4f}{', greedy' if greedy else ''}", _named(target, [])


def _named(target: Any, choices: Sequence[str]) -> str:
    """A reference as text: the choice an index stands for, or all of several references."""
    if isinstance(target, list | tuple):
        return _JOINT.join(_named(one, choices) for one in target)
    if isinstance(target, int) and 0 <= target < len(choices):
        return choices[target]
    return str(target)


def _limit(leaves: Mapping[str, Any], model: Any) -> int:
    from lm_eval.models.utils import normalize_gen_kwargs

    given = [task.get_config("generation_kwargs") or {} for task in leaves.values()]
    return max(normalize_gen_kwargs(settings, model.max_gen_toks)["max_gen_toks"] for settings in given)


def _split(spec: str) -> tuple[str, str | None]:
    """``name:metric`` -> (name, metric); a path keeps its colons."""
    name, colon, metric = spec.rpartition(":")
    return (name, metric) if colon and not Path(spec).is_file() else (spec, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs warnings about inputs passed on purpose, such as a model that is not a path."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that task files draw from, and leave them as they were found."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
