"""Interleaved dialogues from two files of questions, text turns and turns with images, paired by what they ask about.

A setting is the order of a dialogue's turns, T for text and V for visual: ``TTV`` asks two text questions, then one
about an image. The last turn is the one that counts. The dialogues of all settings with the same last kind end with the
same questions, so that their scores differ by what came before alone.

The construction follows Zhang et al. 2024 (Wings, section 4.2), whose benchmark is not public, and adds the settings in
which text follows an image.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alula.data.errors import RecordError
from alula.data.images import ImageRef
from alula.data.samples import Sample, message_text, text_part
from alula.data.shapes import escaped
from alula.data.sources import Source
from alula.draws import shuffled_index
from alula.errors import DataError, UsageError
from alula.files import write_text

History = Literal["gold", "generated"]
Embed = Callable[[Sequence[str]], Any]
"""texts -> one row per text, a numpy array or scipy sparse matrix (texts, features); rows need not have unit length"""

PAPER_SETTINGS = ("T", "TT", "TTT", "TTV", "TV", "V")
SETTINGS = (*PAPER_SETTINGS, "VT", "VTT", "VVT")
"""the paper's six, and text questions after images"""

_DIGITS = 6
"""similarities are compared to so many decimals: sums of floats differ in the last ones from machine to machine"""
_BLOCK = 256


@dataclass(frozen=True)
class Question:
    """One user turn with its reference answer.

    Attributes:
        kind: ``"T"`` or ``"V"``.
        id: of the record it was taken from.
        content: the user turn's parts.
        answer: the reference.
    """

    kind: str
    id: str
    content: tuple[dict[str, Any], ...]
    answer: str

    @cached_property
    def text(self) -> str:
        """What is asked, white space evened out."""
        return " ".join(message_text({"content": self.content}).split())

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """Its pictures in reading order."""
        return tuple(part["image"] for part in self.content if part["type"] == "image")

    @cached_property
    def key(self) -> str:
        """A hash (hex) of all that makes the question, the same wherever the files lie."""
        parts = [self.kind, self.id, self.text, self.answer, *(_identity(image) for image in self.images)]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Dialogue:
    """Questions in order, the last of which is scored; ``similarity`` of each earlier one to the last."""

    questions: tuple[Question, ...]
    similarity: tuple[float, ...]
    history: History

    @property
    def setting(self) -> str:
        """Its order of turns, such as ``"TTV"``."""
        return "".join(question.kind for question in self.questions)

    @property
    def id(self) -> str:
        """The setting and a hash of the parts and of the way the history is answered."""
        keys = [question.key for question in self.questions]
        digest = hashlib.blake2b("|".join([self.history, *keys]).encode(), digest_size=8)
        return f"{self.setting}-{digest.hexdigest()}"

    def record(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """The dialogue as a JSON record of messages; image files under ``folder`` are named relative to it."""
        messages: list[dict[str, Any]] = []
        for question in self.questions:
            content = [_stored(part, folder) for part in question.content]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [text_part(question.answer)]})
        if "V" not in self.setting:  # beside images, which are parts, all text is text
            for message in messages:
                message["content"] = [_escaped(part) for part in message["content"]]
        return {
            "id": self.id,
            "setting": self.setting,
            "history": self.history,
            "parts": [question.id for question in self.questions],
            "similarity": list(self.similarity),
            "messages": messages,
        }


def questions(source: Source, kind: str) -> list[Question]:
    """The first question and answer of every record of ``source``, equal ones once; later turns are left out.

    Args:
        kind: ``"T"`` for questions without an image, ``"V"`` for those with one.

    Raises:
        RecordError: a record has no answered question, or an image where there should be none (or the reverse).
        UsageError: the source never ends.
    """
    if source.size is None:
        raise UsageError("never ends", where=source.name, remedy="give the source a limit")
    found = (_question(source[index], kind) for index in range(source.size))
    return list({question.key: question for question in found}.values())


def interleave(
    text: Sequence[Question],
    visual: Sequence[Question],
    *,
    settings: Sequence[str] = SETTINGS,
    n: int | None = None,
    history: History = "gold",
    seed: int = 0,
    embed: Embed | None = None,
) -> Iterator[Dialogue]:
    """Pair questions into dialogues: before each last question, the most similar others of the kinds the setting asks.

    The most similar one stands next to the last question, and so on backwards. No dialogue asks two text questions of
    one text or two visual ones about one picture, where an earlier answer could give a later one away. Nothing is drawn
    but the choice of last questions, so the dialogues are a pure function of the arguments.

    Args:
        text, visual: the questions to draw from, see `questions`.
        settings: orders of turns such as ``("T", "TTV")``.
        n: dialogues per setting; by default every question of the last turn's kind ends one.
        history: whether the model is to see reference answers in the history (``"gold"``) or its own.
        seed: chooses the last questions where ``n`` is less than there are.
        embed: texts -> vectors; by default `tfidf`.

    Yields:
        dialogues, setting by setting.

    Raises:
        UsageError: an unknown setting or history, or ``n`` below 1. DataError: too few questions.
    """
    pools = {"T": text, "V": visual}
    _check(pools, settings, n, history)
    vectors = _unit_rows((embed or tfidf)([question.text for pool in pools.values() for question in pool]))
    if vectors.shape[0] != len(text) + len(visual):
        raise DataError(f"the embedding gave {vectors.shape[0]} vectors for {len(text) + len(visual)} questions")
    rows = {"T": vectors[: len(text)], "V": vectors[len(text) :]}
    for setting in settings:
        last = setting[-1]
        size = len(pools[last])
        # the first questions of one shuffle: a smaller n takes a subset of a larger
        ends = [shuffled_index(index, size, seed) for index in range(min(n or size, size))]
        needed = Counter(setting[:-1])
        nearest = {kind: _nearest(pools, rows, last, ends, kind, count) for kind, count in needed.items()}
        for place, end in enumerate(ends):
            left = {kind: iter(nearest[kind][place]) for kind in needed}
            earlier = [(pools[kind], *next(left[kind])) for kind in reversed(setting[:-1])][::-1]
            yield Dialogue(
                questions=(*(pool[index] for pool, index, _ in earlier), pools[last][end]),
                similarity=tuple(similarity for _, _, similarity in earlier),
                history=history,
            )


def write_dialogues(dialogues: Iterator[Dialogue] | Sequence[Dialogue], path: str | os.PathLike[str]) -> Counter[str]:
    """Write dialogues as JSONL messages, atomically, and return their number by setting.

    Image files that lie under the file's folder are named relative to it, others by absolute path; pictures that were
    bytes stand inline as base64.
    """
    folder, counts, lines = os.path.dirname(os.path.abspath(path)), Counter[str](), []
    for dialogue in dialogues:
        counts[dialogue.setting] += 1
        lines.append(json.dumps(dialogue.record(folder), ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    return counts


def tfidf(texts: Sequence[str]) -> Any:
    """Sparse TF-IDF rows over groups of 2 to 4 characters within words, which need no tokenizer for any language."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True).fit_transform(texts)


def sentence_encoder(name: str) -> Embed:
    """An embedding by a sentence-transformers model: a local folder or hub id.

    Raises:
        UsageError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UsageError(
            "pairing with an encoder needs sentence-transformers",
            where=name,
            remedy="pip install sentence-transformers, or leave the encoder out to pair by TF-IDF",
        ) from None
    model = SentenceTransformer(name)
    return lambda texts: model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)


def _question(sample: Sample, kind: str) -> Question:
    turns = [message for message in sample.messages if message["role"] != "system"]
    if len(turns) < 2:
        raise RecordError("the question has no reference answer", place=sample.place)
    shown = any(part["type"] == "image" for part in turns[0]["content"])
    if shown != (kind == "V"):
        fault = "shows no image" if kind == "V" else "shows an image"
        raise RecordError(
            f"the first question {fault}", place=sample.place, remedy="keep text-only and visual questions in two files"
        )
    return Question(kind, sample.id, tuple(turns[0]["content"]), message_text(turns[1]).strip())


def _check(pools: dict[str, Sequence[Question]], settings: Sequence[str], n: int | None, history: str) -> None:
    if history not in ("gold", "generated"):
        raise UsageError(f"history {history!r} is not one of 'gold', 'generated'")
    if n is not None and n < 1:
        raise UsageError(f"the number of dialogues per setting must be at least 1, not {n}")
    if not settings:
        raise UsageError("no settings", remedy=f"name some of {', '.join(SETTINGS)}, or other orders of T and V")
    for setting in settings:
        if not setting or set(setting) - set(pools):
            raise UsageError(f"setting {setting!r} is not an order of turns T and V", remedy=f"such as {SETTINGS[3]}")
        for kind, count in Counter(setting).items():
            if count > len(pools[kind]):
                name = "text" if kind == "T" else "visual"
                raise DataError(f"setting {setting} needs {count} {name} questions, there are {len(pools[kind])}")


def _unit_rows(vectors: Any) -> Any:
    from sklearn.preprocessing import normalize

    return normalize(vectors if hasattr(vectors, "tocsr") else np.asarray(vectors, dtype=np.float64))


def _nearest(
    pools: dict[str, Sequence[Question]],
    rows: dict[str, Any],
    last: str,
    ends: Sequence[int],
    kind: str,
    count: int,
) -> list[list[tuple[int, float]]]:
    """For each last question the ``count`` most similar of ``kind`` with their similarity, best first."""
    pool, found = pools[kind], []
    for start in range(0, len(ends), _BLOCK):
        block = list(ends[start : start + _BLOCK])
        similar = _dense(rows[last][block] @ rows[kind].T).round(_DIGITS)
        for end, row in zip(block, similar, strict=True):
            chosen: list[tuple[int, float]] = []
            others = [pools[last][end]]
            for index in np.argsort(-row, kind="stable"):  # of equals the one that comes first in its file
                if len(chosen) == count:
                    break
                if not any(_tells(pool[index], other) for other in others):
                    chosen.append((int(index), float(row[index])))
                    others.append(pool[index])
            if len(chosen) < count:
                what = "text questions" if kind == "T" else "pictures"
                raise DataError(
                    f"too few different {what} to put {count} of kind {kind} before {pools[last][end].id}",
                    remedy="give more of them, or shorter settings",
                )
            found.append(chosen)
    return found


def _dense(matrix: Any) -> NDArray[np.float64]:
    return matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)


def _tells(earlier: Question, last: Question) -> bool:
    """Whether ``earlier``, with its answer, could give away the answer to ``last``."""
    if earlier.kind != last.kind:
        return False
    if last.kind == "T":
        return earlier.text.casefold() == last.text.casefold()
    return bool({*map(_identity, earlier.images)} & {*map(_identity, last.images)})


def _identity(image: ImageRef) -> str:
    """What tells one picture of a file from another without reading it: its name there, or its bytes."""
    return image.name if image.data is None else hashlib.blake2b(image.data, digest_size=16).hexdigest()


def _escaped(part: dict[str, Any]) -> dict[str, Any]:
    return text_part(escaped(part["text"])) if part["type"] == "text" else part


def _stored(part: dict[str, Any], folder: str | os.PathLike[str]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    image: ImageRef = part["image"]
    if image.data is not None:
        return {"type": "image", "base64": base64.b64encode(image.data).decode()}
    if image.path is None:
        raise DataError(f"image {image.name!r} has no file to name", remedy="export the source to files first")
    inside = os.path.commonpath([image.path, os.path.abspath(folder)]) == os.path.abspath(folder)
    return {"type": "image", "image": os.path.relpath(image.path, folder) if inside else image.path}
