"""What captions are worth beside those of people: BLEU-4 (by sacrebleu) and CIDEr-D."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from alula.errors import EvaluationError

_WORDS = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_ORDERS, _SIGMA = 4, 6.0
Grams = list[Counter[tuple[str, ...]]]


def require_bleu() -> Any:
    """sacrebleu's metric, a class.

    Raises:
        EvaluationError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise EvaluationError("BLEU needs sacrebleu", remedy="pip install 'alula[eval]'") from error
    return BLEU


def bleu4(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """Corpus BLEU-4 in [0, 100], lower case, and the signature by which sacrebleu says how it was computed.

    Raises:
        EvaluationError: sacrebleu is not installed.
    """
    most = max(map(len, references))
    streams = [[each[at] if at < len(each) else None for each in references] for at in range(most)]
    metric = require_bleu()(lowercase=True)
    score = metric.corpus_score(list(captions), streams)
    return float(score.score), str(metric.get_signature())


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return _WORDS.findall(text.lower())


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al., CVPR 2015, as COCO's evaluation computes it: n-grams of one to four
    words weighed by how few pictures' references hold them, counts clipped, a Gaussian of the difference in length
    with a sigma of 6, times 10).

    The rareness of an n-gram is counted among the pictures at hand, so that one picture alone scores 0. Words are told
    apart by `words`, not by COCO's tokenizer.
    """
    of_captions = [_grams(words(text)) for text in captions]
    of_references = [[_grams(words(text)) for text in each] for each in references]
    seen: Counter[tuple[str, ...]] = Counter()
    for each in of_references:
        seen.update({gram for grams in each for order in grams for gram in order})
    pictures = math.log(len(captions))

    def weighed(grams: Grams) -> list[dict[tuple[str, ...], float]]:
        return [{gram: count * (pictures - math.log(max(1, seen[gram]))) for gram, count in n.items()} for n in grams]

    found = []
    for mine, theirs in zip(of_captions, of_references, strict=True):
        own, total = weighed(mine), 0.0
        for reference in theirs:
            other = weighed(reference)
            delta = sum(mine[0].values()) - sum(reference[0].values())
            total += math.exp(-(delta**2) / (2 * _SIGMA**2)) * sum(map(_cosine, own, other)) / _ORDERS
        found.append(10 * total / len(theirs))
    return found


def _grams(text: list[str]) -> Grams:
    return [Counter(zip(*(text[start:] for start in range(n)), strict=False)) for n in range(1, _ORDERS + 1)]


def _cosine(own: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    """Of a caption's weights with a reference's, of which no n-gram counts for more than the reference has of it."""
    norms = math.sqrt(sum(v * v for v in own.values()) * sum(v * v for v in other.values()))
    product = sum(min(value, other[gram]) * other[gram] for gram, value in own.items() if gram in other)
    return product / norms if norms else 0.0
