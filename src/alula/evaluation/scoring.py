"""Comparing answers with references."""

from __future__ import annotations

import unicodedata

from alula.evaluation.items import TaskItem


def normalise(text: str) -> str:
    """Return ``text`` with case folded, Unicode NFKC, runs of white space as one blank and outer punctuation removed.

    Signs, currency and percent marks inside or before a number stay: ``-3`` and ``3`` are different answers.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(" \"'`*").rstrip(".,;:! \"'`*")


def exact_match(item: TaskItem, answer: str) -> float:
    """Return 1.0 where answer and gold agree after `normalise`, else 0.0."""
    return float(normalise(answer) == normalise(item.gold))
