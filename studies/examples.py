"""What a study shows of its models: conversations with their pictures, and what was answered in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alula.evaluation.results import Record, Turn
from alula.reports.document import Answer, Example, Examples


class Said(Record):
    """An answer, judged."""

    text: str
    right: bool


class Shown(Record):
    """A conversation and its answers.

    Attributes:
        family: what is asked about.
        prompt: pictures inline.
        gold: the right answer.
        answers: way -> answer.
    """

    family: str
    prompt: list[Turn]
    gold: str
    answers: dict[str, Said]


def examples(shown: Sequence[Shown], ways: Mapping[str, str], families: Mapping[str, str] | None = None) -> Examples:
    """The block of a report.

    Args:
        ways: what each way is called, in order; others are left out.
        families: what each family is called; by default what it is.
    """
    return Examples(
        [
            Example(
                (families or {}).get(each.family, each.family),
                each.prompt,
                each.gold,
                [
                    Answer(label, each.answers[way].text, each.answers[way].right)
                    for way, label in ways.items()
                    if way in each.answers
                ],
            )
            for each in shown
        ]
    )
