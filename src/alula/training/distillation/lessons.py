"""What a teacher said to text questions, token by token, and where it is kept: a directory of two files.

```
lessons.json          the questions and the answers, for people, and what made them
lessons.safetensors   per token of all answers its id, the likeliest candidates and their log-probabilities
```
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alula.data.soft_labels import SoftLabels
from alula.errors import DataError
from alula.files import atomic_directory, read_json, write_json

_TEXTS, _TENSORS = "lessons.json", "lessons.safetensors"


@dataclass(frozen=True)
class Lessons:
    """Text questions with a teacher's answers.

    Attributes:
        questions, answers: texts, as many of one as of the other.
        lengths: (n,) int64 tokens per answer.
        ids: (T,) int64 of all answers' tokens.
        candidates: (T, K) int64 token ids, the likeliest first.
        logprobs: (T, K) float32 of the candidates.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    lengths: Tensor
    ids: Tensor
    candidates: Tensor
    logprobs: Tensor

    def __len__(self) -> int:
        return len(self.questions)

    def labels(self, index: int) -> SoftLabels:
        """Those of one answer."""
        start = int(self.lengths[:index].sum())
        place = slice(start, start + int(self.lengths[index]))
        return SoftLabels(self.ids[place], self.candidates[place], self.logprobs[place])

    @property
    def covered(self) -> float:
        """Mean share of a token's probability that its candidates have together."""
        return float(self.logprobs.double().exp().sum(dim=-1).clamp(max=1).mean())

    def counts(self) -> dict[str, int | float]:
        """What a record says of them."""
        return {
            "questions": len(self),
            "tokens": len(self.ids),
            "candidates": int(self.candidates.shape[1]),
            "covered": round(self.covered, 6),
        }

    def save(self, directory: Path, made: dict[str, Any]) -> None:
        """Write the directory, complete or not at all.

        Args:
            made: JSON values, what made them.
        """
        pairs = [{"question": q, "answer": a} for q, a in zip(self.questions, self.answers, strict=True)]
        tensors = {name: getattr(self, name).contiguous() for name in ("lengths", "ids", "candidates", "logprobs")}
        with atomic_directory(directory) as partial:
            write_json(partial / _TEXTS, {"made": made, "lessons": pairs})
            save_file(tensors, partial / _TENSORS)

    @classmethod
    def load(cls, directory: Path) -> Lessons:
        """Read a directory.

        Raises:
            DataError: it does not hold what `save` writes.
        """
        try:
            pairs = read_json(directory / _TEXTS)["lessons"]
            tensors = load_file(directory / _TENSORS)
            lessons = cls(
                tuple(str(pair["question"]) for pair in pairs), tuple(str(pair["answer"]) for pair in pairs), **tensors
            )
            tokens, n = len(lessons.ids), len(lessons)
            whole = lessons.lengths.shape == (n,) and int(lessons.lengths.sum()) == tokens
            if not (whole and lessons.candidates.shape == lessons.logprobs.shape and len(lessons.logprobs) == tokens):
                raise ValueError("texts and tensors do not fit together")
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"holds no answers to distill from: {error}",
                where=str(directory),
                remedy="remove it; it is made again",
            ) from error
        return lessons


def concatenated(labels: list[SoftLabels]) -> dict[str, Tensor]:
    """The tensors of `Lessons` from those of each answer."""
    return {
        "lengths": torch.tensor([len(each.ids) for each in labels]),
        "ids": torch.cat([each.ids for each in labels]),
        "candidates": torch.cat([each.candidates for each in labels]),
        "logprobs": torch.cat([each.logprobs for each in labels]),
    }
