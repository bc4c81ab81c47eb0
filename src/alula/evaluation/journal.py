"""Finished items on disk, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from alula.errors import EvaluationError
from alula.evaluation.results import ItemResult
from alula.files import append_text, regular, write_text


class Journal:
    """An append-only JSONL file: a header that identifies the run, then one line per finished item.

    Args:
        path: the file; made (with its folder) where absent.
        identity: JSON values that must agree with the header for the finished items to count: the model's fingerprint,
            decoding and so on.

    Raises:
        EvaluationError: the file belongs to another run, or a line other than the last is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self._done: dict[tuple[str, str], ItemResult] = {}
        if self.path.exists():
            self._read(identity)
        else:
            write_text(self.path, json.dumps({"journal": identity}, sort_keys=True) + "\n")

    def finished(self, task: str, item_id: str, prompt_hash: str) -> ItemResult | None:
        """Return the item's result if it was answered under the same prompt."""
        result = self._done.get((task, item_id))
        return result if result is not None and result.prompt_hash == prompt_hash else None

    def add(self, task: str, results: list[ItemResult]) -> None:
        """Append the results of a batch and force them to disk."""
        lines = "".join(
            json.dumps({"task": task, "item": result.model_dump(mode="json")}, ensure_ascii=False) + "\n"
            for result in results
        )
        append_text(self.path, lines, sync=True)
        self._done.update({(task, result.id): result for result in results})

    def _read(self, identity: dict[str, Any]) -> None:
        content = regular(self.path).read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # killed while writing: the torn last line is answered again
            write_text(self.path, whole.decode(errors="replace"))
        # not splitlines(): answers may hold characters that it takes for ends of lines, such as U+2028
        header, *lines = whole.split(b"\n")[:-1] or [b""]
        try:
            found = json.loads(header)["journal"]
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError("is not a journal of answers", where=str(self.path), remedy="remove it") from error
        if found != json.loads(json.dumps(identity)):
            differing = [key for key in {**found, **identity} if found.get(key) != identity.get(key)]
            raise EvaluationError(
                f"holds the answers of another run ({', '.join(sorted(differing))} differ)",
                where=str(self.path),
                remedy="choose another output directory, or remove the file to start afresh",
            )
        for number, line in enumerate(lines, start=2):
            try:
                entry = json.loads(line)
                result = ItemResult.model_validate(entry["item"])
                self._done[entry["task"], result.id] = result
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(
                    "is damaged", where=f"{self.path}:{number}", remedy="remove the file to start afresh"
                ) from error
