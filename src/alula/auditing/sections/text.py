"""Answers to text: bare and after an image, against the base's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alula.auditing.finding import Finding, Status
from alula.auditing.record import Audit
from alula.auditing.sections.base import Questions, Section
from alula.errors import UsageError
from alula.evaluation import (
    Comparison,
    Estimate,
    PairedResult,
    PairedRun,
    RatioComparison,
    RunResult,
    Task,
    data_task,
    named_tasks,
)
from alula.evaluation.items import media_of
from alula.evaluation.pairing import compare_scores
from alula.evaluation.ratios import ALL
from alula.evaluation.references import REFERENCES
from alula.evaluation.results import Record
from alula.reports import comparison_outcome
from alula.reports.document import Block, Cell, Table
from alula.reports.experiment import item_flips, text_families
from alula.reports.summary import Summary
from alula.reports.wording import STARRED, bounds, percent, probability, ratio_of_perplexities
from alula.stats import wilson

BARE, AFTER_IMAGE = "text_bare", "text_after_image"
KEPT = 0.99
"""share of the base's text skill that counts as kept, as in the project's retention budget"""
_FEWEST = 10
"""units (questions, dialogues) that a bootstrap needs to say anything: of one, its interval has no width"""


@dataclass(frozen=True)
class TextAnswers:
    """Answers to text.

    Attributes:
        run: the model's answers.
        pairs: compared with the base's; None without a base.
        after_image: the model's answers after an image compared with its own to the bare question; None where the
            questions were not asked after an image.
        in_its_words: the base was asked in the model's own template and tokens.
    """

    run: RunResult
    pairs: PairedRun | None = None
    after_image: Comparison | None = None
    in_its_words: bool = False


def _tasks(own: Path | None, items: int, seed: int, defaults: Sequence[str]) -> list[Task]:
    """The user's own questions, or those that come with the model, bare and after an unrelated image."""
    if own is not None:
        task = data_task(own, name=BARE, title=own.name, n=items)
        if shown := [item.id for item in task.items() if any(media_of(item.messages))]:
            raise UsageError(
                f"its question {shown[0]!r} shows something, and text questions are of words alone",
                where=f"--text {own}",
                remedy="name it with --data, which is shown to the model; ask about words with --text",
            )
        return [task]
    if BARE not in defaults:
        raise UsageError(
            "say what to ask: no text questions come with this model",
            where="--text",
            remedy="--text FILE: conversations whose last turn is the reference answer; or leave section text out",
        )
    return named_tasks([name for name in (BARE, AFTER_IMAGE) if name in defaults], n=items, seed=seed)


def _of_base(tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if task.name == BARE]


def _answers(run: RunResult, pairs: PairedRun | None, in_its_words: bool) -> TextAnswers:
    return TextAnswers(run, pairs, _after_image(run), in_its_words)


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


def _verdict(audit: Audit, measured: TextAnswers) -> Finding | None:
    title = "Are the words still there?"
    after = measured.after_image
    hurt = after is not None and after.difference.high < 0
    extra = _behind(after, hurt=hurt) if after is not None else ""
    if measured.pairs is None:
        bare = measured.run.tasks[BARE]
        share = wilson(sum(item.score for item in bare.items), len(bare.items))
        return Finding(
            "text", title, Status.LOOK if hurt else Status.OPEN,
            f"{percent(share.value)} right ({bounds(share)})", "no base was given",
            f"It answers {percent(share.value)} of {len(bare.items)} text questions; how much of that tuning cost "
            f"cannot be said without the base.{extra}",
            "Name the model before tuning, or the LLM inside, with --base.",
        )  # fmt: skip
    whole = measured.pairs.tasks[BARE].overall
    kept = whole.retention
    identical = measured.pairs.tasks[BARE].identical_answers
    if kept is None:
        return _by_likelihood(title, measured.pairs.tasks[BARE], identical)
    figure = f"{percent(kept.value)} kept ({bounds(kept, whole.exact)})"
    against = (
        f"base {percent(whole.base.value)}; {whole.lost} lost, {whole.gained} gained, {probability(whole.p_value)}"
        + (f"; {STARRED}" if whole.exact else "")
    )
    lost_surely = surely_lost(whole)
    same = identical == whole.n
    low = 0.0 if math.isnan(kept.low) else kept.low
    if same or low >= KEPT:
        says = (
            _same(whole.n) + extra
            if same
            else f"It kept its words: at least {percent(low)} of what the base knows, with 95 % confidence.{extra}"
        )
        status, do = (Status.LOOK, _AFTER_IMAGE) if hurt else (Status.FINE, "Nothing to do.")
    elif lost_surely:
        says = (
            f"It lost words: {percent(kept.value)} of the base's text skill is left, and {whole.lost} lost against "
            f"{whole.gained} gained items is more than chance ({probability(whole.p_value)}).{extra}"
        )
        status = Status.ACT
        do = (
            "Read the lost items below for what they share. Then tune again with the LLM frozen (projector, Wings or "
            "LoRA), with a lower learning rate for the LLM, or with text replayed: docs/usage/training.md."
        )
    else:
        says = (
            f"It lost nothing that {whole.n} questions can prove, but the interval reaches down to "
            f"{percent(low)}, which is less than the {percent(KEPT, 0)} that would count as kept.{extra}"
        )
        status, do = Status.OPEN, f"Ask more questions to decide: --items {4 * whole.n}."
    return Finding("text", title, status, figure, against, says, do)


def _by_likelihood(title: str, pairs: PairedResult, identical: int) -> Finding:
    """Where the base is right nowhere, as chat models are that answer in sentences."""
    asked, against = pairs.overall.n, "the base answers none"
    if identical == asked:
        return Finding("text", title, Status.FINE, "the same answers", against, _same(asked), "Nothing to do.")
    start = (
        f"The base answers none of the {asked} questions in the reference's words, so that no loss can be told by "
        f"answers; {asked - identical} of them are not the base's."
    )
    ask = "Ask what the base answers in the reference's words and no others ('Answer in one word.'): --text FILE."
    change = _references(pairs)
    if change is None or change.base is None or change.tuned is None or change.difference is None:
        return Finding("text", title, Status.OPEN, "undefined", against, start, ask)
    times, lost = _times(change.difference), less_likely(pairs)
    figure = f"references x {times} as perplexing"
    against += f"; {change.base.value:.2f} nats per token of the references, after tuning {change.tuned.value:.2f}"
    held = f"{start} How likely it holds the references themselves can be told"
    if lost is None:
        says = f"{held}, but not by {asked} of them: a token x {times} as perplexing."
        return Finding("text", title, Status.OPEN, figure, against, says, f"Ask more questions: --items {4 * asked}.")
    if not lost:
        before = "more likely than" if change.difference.high < 0 else "as likely as"
        says = f"{held}: {before} before, a token x {times} as perplexing."
        return Finding("text", title, Status.FINE, figure, against, says, "Nothing to do.")
    says = f"{held}: less than before, a token x {times} as perplexing. Words were lost, or it answers another way."
    return Finding(
        "text", title, Status.LOOK, figure, against, says,
        "Read the answers of both (*-answers.jsonl). If they are worse, tune again with the LLM frozen (projector, "
        "Wings or LoRA), with a lower learning rate for the LLM, or with text replayed: docs/usage/training.md.",
    )  # fmt: skip


def less_likely(pairs: PairedResult) -> bool | None:
    """Whether tuning made references less likely, beyond what counts as kept; None where that cannot be told."""
    change = _references(pairs)
    if change is None or change.difference is None or len(set(pairs.columns.cluster)) < _FEWEST:
        return None
    if change.difference.high <= -math.log(KEPT):
        return False
    return True if change.difference.low > 0 else None


def _references(pairs: PairedResult) -> RatioComparison | None:
    """How likely both models hold the references, where that was weighed."""
    return pairs.figures.get(ALL, {}).get(REFERENCES.name)


def _times(nats: Estimate) -> str:
    """A difference in nats per token as a ratio of perplexities, with its interval; powers of e where it is large."""
    value, low, high = (ratio_of_perplexities(each, digits=3) for each in (nats.value, nats.low, nats.high))
    return f"{value} ({low} to {high})"


def _same(asked: int) -> str:
    return f"It kept its words: all {asked} answers are the base's, character for character."


def _behind(after: Comparison, *, hurt: bool) -> str:
    """What an image before the question does, in figures."""
    change = bounds(after.difference, after.exact)
    if hurt:
        return f" An image before the question costs {100 * -after.difference.value:.1f} points more ({change})."
    before, behind = percent(after.base.value), percent(after.tuned.value)
    points = f"{100 * after.difference.value:+.1f} points"
    return f" Behind an image it answers {behind} of the same questions and bare {before}: {points} ({change})."


def surely_lost(whole: Comparison) -> bool:
    """More lost than chance gives: by McNemar's test, and by the bootstrap, which knows what belongs together."""
    high = whole.difference.high
    return whole.p_value < 0.05 and whole.lost > whole.gained and high < 0


_AFTER_IMAGE = "Interleave text turns with images in tuning, or route by attention (Wings): docs/usage/training.md."


def _blocks(audit: Audit, measured: TextAnswers) -> list[Block]:
    blocks: list[Block] = []
    rows = []
    for name in (BARE, AFTER_IMAGE):
        task = measured.run.tasks.get(name)
        if task is not None:
            share = wilson(sum(item.score for item in task.items), len(task.items))
            rows.append([Cell(task.title), Cell(str(len(task.items))), Cell(percent(share.value), note=bounds(share))])
    columns = ["questions", "asked", "right"]
    pairs = measured.pairs
    weighed = _weighed(measured)
    if weighed:
        columns.append("nats per token of the reference")
        rows[0].append(weighed[0])
        for row in rows[1:]:
            row.append(Cell("", hint="references are weighed behind the bare question"))
    if pairs is not None:
        columns.append("base right")
        whole = pairs.tasks[BARE].overall
        rows[0].append(Cell(percent(whole.base.value), note=bounds(whole.base)))
        for row in rows[1:]:
            row.append(Cell("", hint="a text LLM is asked without images"))
        if weighed[1:]:
            columns += ["base's nats", "tuned - base"]
            rows[0] += weighed[1:]
            for row in rows[1:]:
                row += [Cell(""), Cell("")]
    caption = "Answers to text, greedy." + (
        " The base was asked in the model's own template, token by token the same." if measured.in_its_words else ""
    )
    blocks.append(Table(columns, rows, caption))
    if pairs is not None:
        only_bare = pairs.model_copy(update={"tasks": {BARE: pairs.tasks[BARE]}})
        summary = Summary(comparison_outcome(only_bare, command=audit.command, seconds=audit.seconds))
        kept = text_families(summary)
        blocks += kept.blocks if kept is not None else ()
        if pairs.tasks[BARE].overall.lost + pairs.tasks[BARE].overall.gained:
            blocks += item_flips(summary).blocks
    return blocks


def _weighed(measured: TextAnswers) -> list[Cell]:
    """How likely the references are for the model, for the base, and the difference; nothing where none was weighed."""
    own = measured.run.tasks[BARE].figures.get(ALL, {}).get(REFERENCES.name)
    change = None if measured.pairs is None else _references(measured.pairs.tasks[BARE])
    if own is None:
        return []
    if change is None or change.base is None or change.difference is None:
        return [_nats(own)]
    return [_nats(own), _nats(change.base), _nats(change.difference, "+")]


def _nats(estimate: Estimate, sign: str = "") -> Cell:
    return Cell(f"{estimate.value:{sign}.2f}", note=f"{estimate.low:{sign}.2f} to {estimate.high:{sign}.2f}")


def _notes(measured: TextAnswers) -> list[str]:
    """What the figures of text leave out."""
    own = [f"{task.title}: {note}" for task in measured.run.tasks.values() for note in task.notes]
    pairs = measured.pairs
    return [f"Note: {note}." for note in [*own, *(pairs.tasks[BARE].notes if pairs is not None else ())]]


def _export(measured: TextAnswers | None) -> dict[str, Any]:
    if measured is None:
        return {"text": None}
    pairs, after = measured.pairs, measured.after_image
    found = {
        "accuracy": {name: task.accuracy for name, task in measured.run.tasks.items()},
        "references": _values(measured.run.tasks[BARE])["figures"].get(ALL, {}),
        "notes": {name: task.notes for name, task in measured.run.tasks.items()},
        "paired": None if pairs is None else _values(pairs),
        "after_image": None if after is None else _values(after),
        "base_asked_in_model_words": measured.in_its_words,
    }
    return {"text": found}


def _values(record: Record) -> dict[str, Any]:
    """JSON values, with None for bounds that are not known."""
    values: dict[str, Any] = json.loads(record.model_dump_json())
    return values


TEXT = Section(
    name="text",
    result=TextAnswers,
    verdict=_verdict,
    blocks=_blocks,
    notes=_notes,
    export=_export,
    questions=Questions(
        _tasks, _of_base, _answers, lambda answers: f"{len(answers.run.tasks[BARE].items)} text questions"
    ),
)
