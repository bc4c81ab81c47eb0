"""One model through tasks that are scored by likelihood."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alula.chat_template import TemplateSettings
from alula.data.samples import text_part, user
from alula.errors import EvaluationError, UsageError
from alula.evaluation import token_ids
from alula.evaluation.conditions import conditions, fingerprint, refuse_steps
from alula.evaluation.likelihood.engine import log_likelihoods
from alula.evaluation.likelihood.questions import ChoiceTask, Question
from alula.evaluation.likelihood.scores import Scored, count_groups, ratios_of, score
from alula.evaluation.plain_text import PlainText
from alula.evaluation.ratios import figures
from alula.evaluation.results import ItemResult, Part, RunResult, TaskResult, TooLong, Turn
from alula.evaluation.runner import check_sizes
from alula.hosts.context import context_length
from alula.hosts.decoding import Decoding
from alula.hosts.opening import opening_of
from alula.hosts.prompted import refuse_lost_prompt
from alula.inputs import Intake
from alula.progress import bar
from alula.seam import evaluating

_JOINT = " | "
_NEITHER = "neither: equally likely"
Openings = Mapping[bool, Sequence[str]]
"""tokens that go before a text: of chat prompts (True) and of plain text"""


def openings_of(processor: Any) -> Openings:
    """What the model's own tokenizer writes before a text."""
    return {chat: opening_of(processor, chat=chat) for chat in (False, True)}


def evaluate_likelihood(
    model: Any,
    processor: Any,
    tasks: Sequence[ChoiceTask],
    *,
    name: str = "model",
    batch_size: int = 32,
    template: TemplateSettings | None = None,
    openings: Openings | None = None,
    progress: bool = False,
) -> RunResult:
    """Weigh the options of every question by how likely the model holds them, and score the tasks.

    Items come with the score and with what is needed for the figures beside it (`ratios_of`), so that `compare` pairs
    two models in all of them. Questions that do not fit into the context with one of their options are left out
    (`TaskResult.too_long`).

    Args:
        model: a causal LLM or an image host (asked in words), PEFT-wrapped or grafted alike. It is put in eval mode for
            the run and left as it was found.
        processor: its processor or tokenizer.
        name: how results call the model.
        batch_size: texts per forward, similar lengths together, padded on the right.
        template: variables for the chat template beside the messages, of tasks that are put through it.
        openings: what goes before texts that do not start with it, see `openings_of`; a model that is compared with
            another is asked with the other's.
        progress: draw a progress bar on stderr.

    Raises:
        UsageError: no tasks, two of one name, a batch of no size, a model without the chat template that a task wants,
            settings of a template that no task passes, or a policy that tells steps from prompts.
        EvaluationError: no question of a task fits into the context, a prompt would start with BOS twice, or the
            model's likelihoods are not numbers.
    """
    check_sizes(batch_size, None)
    template = template or TemplateSettings()
    if not tasks:
        raise UsageError("no tasks to run")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UsageError(f"two tasks are called {max(names, key=names.count)!r}")
    chat = any(task.chat for task in tasks)
    if template.arguments and not chat:
        raise UsageError(
            "plain prompts pass no template, so its settings would be without effect",
            where="template",
            remedy="leave them out, or put prompts through the template (chat=true)",
        )
    refuse_lost_prompt(model)
    refuse_steps(model)
    started = time.perf_counter()
    intake = Intake.of(processor, template if chat else None)
    if chat and intake.chat_template is None:
        raise UsageError(
            "has no chat template", where=type(processor).__name__, remedy="ask in plain text: leave chat=true out"
        )
    tokenizer = intake.tokenizer
    written = openings_of(intake.processor) if openings is None else openings
    asking = {kind: _Asking(intake, PlainText(tokenizer, written[kind]), chat=kind) for kind in {t.chat for t in tasks}}
    state = conditions(model, Decoding(), batch_size, template.recorded(intake.processor) if chat else {})
    pad = next((int(id) for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0)
    results = {}
    total = sum(len(q.options) * (2 if q.reverse else 1) for task in tasks for q in task.questions)
    with evaluating(model), bar(total, progress) as advancing:
        for task in tasks:

            def advance(count: int, title: str = task.title) -> None:
                advancing.advance(f"{name}: {title}", count)

            def weigh(pairs: Sequence[Any]) -> list[float]:
                return log_likelihoods(model, pairs, pad=pad, batch_size=batch_size, advance=advance)

            results[task.name] = _run(task, asking[task.chat], weigh, context_length(model))
    return RunResult(
        model=name,
        fingerprint=fingerprint(model),
        conditions=state,
        tasks=results,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Asking:
    """From a text and an option to the ids of a context and of its ending."""

    intake: Intake
    plain: PlainText
    chat: bool

    def pairs(self, text: str, options: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        if not self.chat:
            return [self.plain.pair(text, f" {option}") for option in options]
        context = self.intake.text([user(text)], True)
        return [self.plain.pair(context, self._ending(text, context, option)) for option in options]

    def _ending(self, text: str, context: str, option: str) -> str:
        """What the template writes of an answer, up to its last word; the answer alone where that cannot be told."""
        turns = [user(text), {"role": "assistant", "content": [text_part(option)]}]
        whole = self.intake.text(turns, False)
        at = whole.find(option, len(context)) if whole.startswith(context) else -1
        return option if at < 0 else whole[len(context) : at + len(option)]


def _run(task: ChoiceTask, asking: _Asking, weigh: Any, context: int | None) -> TaskResult:
    kept, pairs, too_long = [], [], []
    for question in task.questions:
        rows = [asking.pairs(question.text, question.options)]
        if question.reverse:
            rows.append(asking.pairs(question.reverse, question.options))
        size = max(len(start) + len(ending) for row in rows for start, ending in row)
        if context is not None and size > context + 1:  # the last token is no input
            too_long.append(TooLong(id=question.id, family=_family(task), tokens=size))
        else:
            kept.append(question)
            pairs.append(rows)
    if not kept:
        raise EvaluationError(
            f"none of its questions fits into the model's context of {context} tokens; the shortest takes "
            f"{min(item.tokens for item in too_long)}",
            where=f"task {task.name!r}",
        )
    values = iter(weigh([pair for rows in pairs for row in rows for pair in row]))
    found = [[[next(values) for _ in row] for row in rows] for rows in pairs]
    reverse = [rows[1] for rows in found] if task.shape == "pair" else []
    scored = score(task.shape, kept, [rows[0] for rows in found], reverse)
    if task.groups:
        count_groups(kept, scored)
    items = [_item(task, *each) for each in zip(kept, pairs, scored, strict=True)]
    ratios = ratios_of(task.shape, groups=task.groups)
    return TaskResult(
        name=task.name,
        title=task.title,
        max_new_tokens=0,
        settings={**task.settings, "shape": task.shape, "chat": task.chat, "opening": asking.plain.opening},
        items=items,
        too_long=too_long,
        context=context,
        ratios=ratios,
        figures=figures(items, ratios),
    )


def _item(task: ChoiceTask, question: Question, rows: Any, scored: Scored) -> ItemResult:
    ids = [[*start, *ending] for row in rows for start, ending in row]
    asked = [question.text, question.reverse, question.options, question.right, ids]
    return ItemResult(
        id=question.id,
        family=_family(task),
        prompt_hash=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        token_ids=token_ids.write(ids),
        gold=_JOINT.join(question.options[index] for index in question.right),
        answer=_NEITHER if scored.said is None else question.options[scored.said],
        score=scored.score,
        cluster=question.cluster,
        tags=dict(question.tags),
        counts=scored.counts,
        prompt=[Turn(role="user", content=[Part(text=question.text)])],
    )


def _family(task: ChoiceTask) -> str:
    return task.name.partition(":")[0]
