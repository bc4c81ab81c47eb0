"""CHAIR (Rohrbach et al., EMNLP 2018): the objects a description names that are not in the picture.

``chair_i`` is the share of named objects that are not there, ``chair_s`` the share of descriptions that name one such
object or more. Both fall when less is said, so recall and length stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alula.data.annotations import AnnotatedPicture, Annotations
from alula.data.samples import user
from alula.draws import Draw
from alula.errors import EvaluationError
from alula.evaluation.items import ItemTask, Task, TaskItem
from alula.evaluation.mentions import ObjectWords, count_words
from alula.evaluation.results import Ratio

PROMPT = "Please describe this image in detail."
RATIOS = (
    Ratio(
        name="chair_i",
        title="CHAIR_i: named, not there",
        over={"invented": 1},
        under={"mentions": 1},
        better="lower",
    ),
    Ratio(
        name="chair_s",
        title="CHAIR_s: descriptions with such",
        over={"inventing": 1},
        under={"descriptions": 1},
        better="lower",
    ),
    Ratio(name="recall", title="recall", over={"recalled": 1}, under={"objects": 1}, better="higher"),
    Ratio(name="length", title="words each", over={"words": 1}, under={"descriptions": 1}, unit="number"),
)


def chair_of_annotations(
    annotations: Annotations,
    n: int | None = None,
    seed: int = 0,
    *,
    words: ObjectWords | None = None,
    prompt: str = PROMPT,
    max_new_tokens: int = 128,
    settings: Mapping[str, str] | None = None,
) -> Task:
    """CHAIR over annotated pictures.

    What is in a picture is what its annotations name and, as published, what people's captions of it name. Pictures
    with nothing in them are left out.

    Args:
        n: this many pictures, drawn by ``seed``; all by default.
        words: what names objects; by default the categories' own names, which finds fewer than the published synonyms.
        max_new_tokens: bounds a description. Longer ones name more, and more that is not there.
        settings: kept beside the results, such as the names of the files.

    Raises:
        EvaluationError: ``words`` lack a category, or no picture has an object in it.
    """
    words = words or ObjectWords(dict.fromkeys(annotations.categories, ()))
    lacking = [name for name in annotations.categories if words.object_of(name) is None]
    if lacking:
        raise EvaluationError(
            f"the synonyms do not hold the category {lacking[0]!r}"
            + (f" and {len(lacking) - 1} more" * (len(lacking) > 1)),
            where="task 'chair'",
            remedy="add a line for it",
        )
    pictures = []
    for picture in annotations.pictures:
        objects = {words.object_of(name) for name in picture.objects}
        objects.update(name for caption in picture.captions for name in words.find(caption))
        if objects:
            known = frozenset(name for name in objects if name is not None)
            pictures.append(AnnotatedPicture(picture.id, picture.image, known, picture.captions))
    if not pictures:
        raise EvaluationError("no picture has an object in it", where="task 'chair'")
    Draw("chair pictures", seed).shuffle(pictures)
    about = {"n": n, "seed": seed, "prompt": prompt, **(settings or {})}
    return chair_task(pictures[:n], words, prompt, max_new_tokens, about)


def chair_task(
    pictures: Sequence[AnnotatedPicture],
    words: ObjectWords,
    prompt: str,
    max_new_tokens: int,
    settings: Mapping[str, object],
) -> Task:
    """The task of describing ``pictures``, whose ``objects`` are what is there; counted for CHAIR's ratios."""
    shown = {picture.id: picture.objects for picture in pictures}

    def count(item: TaskItem, answer: str | None) -> dict[str, float]:
        if answer is None:  # no description: nothing invented, and nothing recalled either
            return {"objects": float(len(shown[item.id]))}
        return count_objects(answer, shown[item.id], words)

    def score(item: TaskItem, answer: str) -> float:
        counts = count(item, answer)
        return float(counts["mentions"] > 0 and not counts["invented"])

    return ItemTask(
        name="chair",
        title="descriptions without invented objects (CHAIR)",
        source=[
            TaskItem(
                id=picture.id,
                family="description",
                messages=[user(prompt, picture.image)],
                gold=", ".join(sorted(picture.objects)),
                tags={"kind": "visual"},
            )
            for picture in pictures
        ],
        scorer=score,
        max_new_tokens=max_new_tokens,
        settings=settings,
        ratios=RATIOS,
        counter=count,
        answers=False,
    )


def count_objects(description: str, objects: frozenset[str], words: ObjectWords) -> dict[str, float]:
    """Return what CHAIR's ratios sum, for one description of a picture that shows ``objects``.

    Every mention counts, repeated ones too; an object is recalled once however often it is named.
    """
    named = words.find(description)
    invented = sum(name not in objects for name in named)
    return {
        "descriptions": 1.0,
        "mentions": float(len(named)),
        "invented": float(invented),
        "inventing": float(invented > 0),
        "objects": float(len(objects)),
        "recalled": float(len(objects & set(named))),
        "words": float(count_words(description)),
    }
