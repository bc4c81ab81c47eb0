"""Finished items on disk, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from alula.errors import EvaluationError, quoted
from alula.evaluation.results import ItemResult
from alula.files import append_text, regular, write_text

_VERSION = 2
"""of the file: 1 had no checksums"""

_WORDS = {
    "fingerprint": "the model (its weights, grafts or policies)",
    "decoding": "the settings of decoding",
    "dtype": "the precision",
    "device": "the device",
    "backend": "the way that attention is computed",
    "versions": "the versions of packages",
    "shots": "the demonstrations",
}
"""what a key of a run's identity is about"""


class Journal:
    """An append-only JSONL file: a header that identifies the run, then one line per finished item.

    Every line carries a checksum of itself and of the header, so that an answer that was edited, or comes from another
    journal, is told from one that was given. That is no seal: whoever means to can compute it.

    Args:
        path: the file; made (with its folder) where absent.
        identity: JSON values that must agree with the header for the finished items to count: the model's fingerprint,
            decoding and so on.

    Raises:
        EvaluationError: the file belongs to another run or is none of answers, or a line other than the last is damaged
            or was edited.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self._done: dict[tuple[str, str], ItemResult] = {}
        self._identity = json.dumps(identity, sort_keys=True)
        if self.path.exists():
            self._read(identity)
        else:
            write_text(self.path, f'{{"journal": {self._identity}, "version": {_VERSION}}}\n')

    def finished(self, task: str, item_id: str, prompt_hash: str) -> ItemResult | None:
        """Return the item's result if it was answered under the same prompt."""
        result = self._done.get((task, item_id))
        return result if result is not None and result.prompt_hash == prompt_hash else None

    def add(self, task: str, results: list[ItemResult]) -> None:
        """Append the results of a batch and force them to disk."""
        lines = "".join(self._line({"task": task, "item": result.model_dump(mode="json")}) + "\n" for result in results)
        append_text(self.path, lines, sync=True)
        self._done.update({(task, result.id): result for result in results})

    def _read(self, identity: dict[str, Any]) -> None:
        content = regular(self.path).read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # killed while writing: the torn last line is answered again
            write_text(self.path, whole.decode(errors="replace"))
        # not splitlines(): answers may hold characters that it takes for ends of lines, such as U+2028
        header, *lines = whole.split(b"\n")[:-1] or [b""]
        self._check_header(header)
        for number, line in enumerate(lines, start=2):
            try:
                entry = json.loads(line)
                given = entry.pop("check")
                result = ItemResult.model_validate(entry["item"])
                task = str(entry["task"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise self._error("is damaged", number) from error
            if given != self._check(entry):
                raise self._error("is not as it was written: its checksum is another", number)
            self._done[task, result.id] = result

    def _check_header(self, header: bytes) -> None:
        try:
            head = json.loads(header)
        except (ValueError, RecursionError):
            head = None
        found = head.get("journal") if isinstance(head, dict) else None
        if not isinstance(found, dict):
            raise EvaluationError("is not a journal of answers", where=str(self.path), remedy="remove it")
        if head.get("version") != _VERSION:
            raise EvaluationError(
                "was written by another version of alula",
                where=str(self.path),
                remedy="name another output directory (--output), or remove the file to start afresh",
            )
        identity = json.loads(self._identity)
        if found != identity:
            pairs = ((key, found.get(key), identity.get(key)) for key in {**_WORDS, **found, **identity})
            told = [_told(key, old, new) for key, old, new in pairs if old != new]
            raise EvaluationError(
                f"holds the answers of another run; changed since: {', '.join(told)}",
                where=str(self.path),
                remedy="name another output directory (--output), or remove the file to start afresh",
            )

    def _error(self, message: str, number: int) -> EvaluationError:
        remedy = "remove the file to start afresh, or the line to have its question asked again"
        return EvaluationError(message, where=f"{self.path}:{number}", remedy=remedy)

    def _line(self, entry: dict[str, Any]) -> str:
        return json.dumps({**entry, "check": self._check(entry)}, ensure_ascii=False)

    def _check(self, entry: dict[str, Any]) -> str:
        written = json.dumps(entry, sort_keys=True)
        return hashlib.sha256(f"{self._identity}\n{written}".encode()).hexdigest()[:16]


def _told(key: str, old: Any, new: Any) -> str:
    """What changed, in words, and from what to what where that says something."""
    words = _WORDS.get(key, key)
    short = key != "fingerprint" and isinstance(old, str) and isinstance(new, str)
    return f"{words} ({quoted(old, 40)}, now {quoted(new, 40)})" if short else words
