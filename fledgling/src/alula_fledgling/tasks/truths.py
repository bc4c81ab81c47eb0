"""Truthfulness and ethics in the microworld, scored by likelihood as TruthfulQA and ETHICS are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from alula.bounds import check_count, check_seed
from alula.evaluation.likelihood import ChoiceTask, Question
from alula_fledgling.microworld import truths

NO_YES = ("no", "yes")
_DEFAULT = 200
_TITLES = {
    "commonsense": "telling and taking (commonsense)",
    "justice": "what a rule gives (justice)",
    "deontology": "promises (deontology)",
    "virtue": "traits (virtue)",
    "utilitarianism": "the better of two (utilitarianism)",
}


def truthfulness(n: int | None = None, seed: int = 0) -> list[ChoiceTask]:
    """All seven tasks, of about ``n`` questions each: whole groups, 200 by default.

    Raises:
        UsageError: ``n`` or ``seed`` out of bounds.
    """
    count = _DEFAULT if n is None else n
    check_count(count, "truthfulness: n")
    check_seed(seed, "truthfulness: seed")
    tasks = [
        *_claims(count, seed),
        *(_judged(name, count, seed) for name in truths.JUDGEMENTS),
        _pairs(count, seed),
    ]
    return [replace(task, chat=True, settings={"n": count, "seed": seed}) for task in tasks]


def _claims(count: int, seed: int) -> Sequence[ChoiceTask]:
    claims = [truths.claim(seed, index) for index in range(count)]
    found = []
    for name, shape in (("mc1", "one"), ("mc2", "mass")):
        questions = []
        for index, claim in enumerate(claims):
            right = claim.right[:1] if shape == "one" else claim.right
            # in an order that says nothing: the right ones stand first, last or between
            options = sorted({*right, *claim.wrong})
            chosen = tuple(options.index(answer) for answer in right)
            tags = {"kind": "text", "premise": claim.kind}
            id = f"{name}-{seed}-{index}"
            questions.append(Question(id, claim.question, tuple(options), chosen, tags=tags))
        found.append(ChoiceTask(f"microworld_{name}", f"microworld, {name}", shape, questions))  # type: ignore[arg-type]
    return found


def _judged(name: str, count: int, seed: int) -> ChoiceTask:
    made = truths.JUDGEMENTS[name]
    listed: list[truths.Judgement] = []
    for index in itertools.count():
        if len(listed) >= count:
            break
        listed += made(seed, index)
    grouped = name != "commonsense"
    questions = [
        Question(
            f"{name}-{seed}-{number}",
            each.question,
            NO_YES,
            (int(each.yes),),
            cluster=f"{name}-{seed}-group-{each.group}" if grouped else "",
            tags={"kind": "text"},
        )
        for number, each in enumerate(listed)
    ]
    return ChoiceTask(f"microworld_{name}", f"microworld, {_TITLES[name]}", "yes", questions, groups=grouped)


def _pairs(count: int, seed: int) -> ChoiceTask:
    questions = []
    for index in range(count):
        pair = truths.utilitarianism(seed, index)
        first = index // 3 % 2 == 0
        one, other = _asked(pair.better, pair.worse), _asked(pair.worse, pair.better)
        text, reverse = (one, other) if first else (other, one)
        id = f"utilitarianism-{seed}-{index}"
        questions.append(Question(id, text, NO_YES, (int(first),), reverse=reverse, tags={"kind": "text"}))
    title = f"microworld, {_TITLES['utilitarianism']}"
    return ChoiceTask("microworld_utilitarianism", title, "pair", questions)


def _asked(first: str, second: str) -> str:
    return f"1: {first} 2: {second} Is 1 better than 2?"
