"""POPE (Li et al., EMNLP 2023): "is there a dog in the image?", asked of what is there and of what is not.

The negatives tell its settings apart: ``random`` (any object that is absent), ``popular`` (the most frequent absent
one) and ``adversarial`` (the absent one that most often goes with the object asked about just before).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from alula.data.annotations import AnnotatedPicture, Annotations, YesNoQuestion
from alula.data.samples import user
from alula.draws import Draw
from alula.errors import EvaluationError, UsageError
from alula.evaluation.items import ItemTask, Task, TaskItem
from alula.evaluation.results import Ratio

SETTINGS = ("random", "popular", "adversarial")
CONFUSABLE = "confusable"
"""of objects whose names are several words, such as "red circle": absent, but one of its words is there"""
PER_PICTURE = 6
"""questions per picture and setting, half of them yes"""
Reading = Literal["published", "strict"]
_ALL = {"tp": 1.0, "fp": 1.0, "tn": 1.0, "fn": 1.0, "unread_yes": 1.0, "unread_no": 1.0}
RATIOS = (
    Ratio(name="accuracy", title="accuracy", over={"tp": 1, "tn": 1}, under=_ALL, better="higher"),
    Ratio(name="precision", title="precision", over={"tp": 1}, under={"tp": 1, "fp": 1}, better="higher"),
    Ratio(name="recall", title="recall", over={"tp": 1}, under={"tp": 1, "fn": 1, "unread_yes": 1}, better="higher"),
    Ratio(name="f1", title="F1", over={"tp": 2}, under={"tp": 2, "fp": 1, "fn": 1, "unread_yes": 1}, better="higher"),
    Ratio(name="yes_rate", title="said yes", over={"tp": 1, "fp": 1}, under=_ALL),
    Ratio(name="neither", title="said neither", over={"neither": 1}, under=_ALL, better="lower"),
)


def pope_of_annotations(
    annotations: Annotations,
    n: int | None = None,
    seed: int = 0,
    *,
    negatives: Sequence[str] = SETTINGS,
    reading: Reading = "published",
    settings: Mapping[str, str] | None = None,
) -> Task:
    """POPE over annotated pictures, made as published.

    Pictures with at least three different objects are asked about, in an order drawn by ``seed``; counts of objects
    are over all pictures of ``annotations``.

    Args:
        n: about this many questions, on whole pictures; all of them by default.
        reading: see `read_yes_no`.
        settings: kept beside the results, such as the names of the files.

    Raises:
        EvaluationError: no picture has enough objects.
    """
    fit = [picture for picture in annotations.pictures if len(picture.objects) >= PER_PICTURE // 2]
    if not fit:
        raise EvaluationError(f"no picture has {PER_PICTURE // 2} different objects to ask about", where="task 'pope'")
    Draw("pope pictures", seed).shuffle(fit)
    chosen = fit if n is None else fit[: pictures_for(n, negatives)]
    items = pope_items(
        chosen,
        annotations.categories,
        annotations.pictures,
        negatives,
        seed=seed,
        template="Is there {} in the image?",
    )
    return pope_task("pope", "objects in pictures (POPE)", items, reading, n=n, seed=seed, **(settings or {}))


def pope_of_questions(
    questions: Iterable[YesNoQuestion], n: int | None = None, *, reading: Reading = "published"
) -> Task:
    """POPE over questions read from files; each file is a setting of its own, ``n`` its first questions."""
    items: list[TaskItem] = []
    taken: Counter[str] = Counter()
    for question in questions:
        setting = next((name for name in SETTINGS if name in question.file.lower()), question.file)
        taken[question.file] += 1
        if n is None or taken[question.file] <= n:
            items.append(
                TaskItem(
                    id=question.id,
                    family=setting,
                    messages=[user(question.text, question.image)],
                    gold=question.label,
                    cluster=question.picture,
                    tags={"kind": "visual"},
                )
            )
    return pope_task("pope_questions", "objects in pictures (POPE, from files)", items, reading, n=n, files=list(taken))


def pope_items(
    pictures: Sequence[AnnotatedPicture],
    categories: Sequence[str],
    counted: Sequence[AnnotatedPicture],
    negatives: Sequence[str],
    *,
    seed: int,
    template: str,
) -> list[TaskItem]:
    """Return the questions about ``pictures``: three of what is there per setting, each followed by one of what is not.

    All settings ask about the same present objects. An absent one is asked about once per picture and setting; ties of
    popularity go by name.

    Args:
        categories: what may be asked about.
        counted: the pictures whose objects are counted for ``popular`` and ``adversarial``.
        template: holds ``{}`` for the object with its article.

    Raises:
        UsageError: an unknown setting. EvaluationError: a picture lacks too few objects.
    """
    unknown = [name for name in negatives if name not in (*SETTINGS, CONFUSABLE)]
    if unknown:
        raise UsageError(
            f"there is no kind of negatives {unknown[0]!r}", remedy=f"choose among {', '.join((*SETTINGS, CONFUSABLE))}"
        )
    popular, beside = _popularity(counted, categories)
    items = []
    for picture in pictures:
        asked = Draw("pope", seed, picture.id).sample(sorted(picture.objects), PER_PICTURE // 2)
        for setting in negatives:
            draw = Draw("pope", seed, picture.id, setting)
            absent = [name for name in categories if name not in picture.objects]
            for rank, present in enumerate(asked):
                if not absent:
                    raise EvaluationError("shows too many of the objects to ask about others", where=picture.id)
                other = _absent(setting, absent, present, picture.objects, popular, beside, draw)
                absent.remove(other)
                for name, gold in ((present, "yes"), (other, "no")):
                    items.append(
                        TaskItem(
                            id=f"{picture.id}#{setting}-{rank}-{gold}",
                            family=setting,
                            messages=[user(template.format(_article(name)), picture.image)],
                            gold=gold,
                            cluster=picture.id,
                            tags={"kind": "visual", "object": name},
                        )
                    )
    return items


def read_yes_no(answer: str, reading: Reading = "published") -> str | None:
    """Return the ``"yes"`` or ``"no"`` of an answer's first sentence, or None.

    Args:
        reading: ``"published"``: no where the sentence holds *no* or *not*, otherwise yes, whatever it says, as in
            POPE's own script (case is ignored here); ``"strict"``: the first *yes*, *no* or *not*, otherwise None.
    """
    words = re.findall(r"[a-z']+", re.split(r"[.!?\n]", answer.strip().lower(), maxsplit=1)[0])
    if reading == "published":
        return "no" if {"no", "not"} & set(words) else "yes"
    said = next((word for word in words if word in ("yes", "no", "not") or word.endswith("n't")), None)
    return said if said in (None, "yes") else "no"


def _count(item: TaskItem, answer: str | None, reading: Reading) -> dict[str, float]:
    if answer is None:
        return {f"unread_{item.gold}": 1.0, "neither": 1.0}
    neither = {"neither": 1.0} if read_yes_no(answer, "strict") is None else {}
    match item.gold, read_yes_no(answer, reading):
        case label, None:
            return {f"unread_{label}": 1.0, **neither}
        case "yes", said:
            return {"tp" if said == "yes" else "fn": 1.0, **neither}
        case _, said:
            return {"fp" if said == "yes" else "tn": 1.0, **neither}


def pope_task(name: str, title: str, items: Sequence[TaskItem], reading: Reading, **settings: object) -> Task:
    """The task of ``items`` (`pope_items`), answers read by ``reading`` (`read_yes_no`) and counted as POPE does."""
    return ItemTask(
        name=name,
        title=title,
        source=items,
        scorer=lambda item, answer: float(read_yes_no(answer, reading) == item.gold),
        max_new_tokens=16,
        settings={**settings, "reading": reading},
        ratios=RATIOS,
        counter=lambda item, answer: _count(item, answer, reading),
    )


def pictures_for(n: int, negatives: Sequence[str]) -> int:
    """Whole pictures for about ``n`` questions."""
    return max(1, round(n / (PER_PICTURE * max(1, len(negatives)))))


def _popularity(
    pictures: Sequence[AnnotatedPicture], categories: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """The categories by how many pictures show them, and for each those shown with it, most often first."""
    shown = Counter(name for picture in pictures for name in picture.objects)
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for picture in pictures:
        for name in picture.objects:
            together[name].update(other for other in picture.objects if other != name)
    popular = sorted(categories, key=lambda name: (-shown[name], name))
    beside = {name: sorted(others, key=lambda other: (-others[other], other)) for name, others in together.items()}
    return popular, beside


def _absent(
    setting: str,
    absent: Sequence[str],
    present: str,
    shown: frozenset[str],
    popular: Sequence[str],
    beside: Mapping[str, Sequence[str]],
    draw: Draw,
) -> str:
    """An object that is not there; any where the setting has none to offer."""
    if setting == CONFUSABLE:
        there = {word for name in shown for word in name.split()}
        options = [name for name in absent if there & set(name.split())]
        return draw.choice(options or absent)
    ranked = {"random": (), "popular": popular, "adversarial": beside.get(present, ())}[setting]
    left = set(absent)
    return next((name for name in ranked if name in left), None) or draw.choice(absent)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
