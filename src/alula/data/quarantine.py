"""Keeping account of the bad samples a run steps over (``on_bad: skip``)."""

from __future__ import annotations

import json
import os
from collections import Counter

from alula.data.errors import BadSampleError, Place
from alula.files import absolute, append_text, regular


class Quarantine:
    """A JSONL file of bad records: ``file``, ``line``, ``id``, ``kind``, ``reason``. Picklable.

    Every DataLoader worker and every rank appends to the same file, one whole line per write. A resumed run goes on
    in it; records met again are counted once.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = absolute(path)
        self._seen: set[str] = set()

    def add(self, error: BadSampleError) -> None:
        """Put a bad record on file (once per process)."""
        place = error.place or Place(file=error.where or "?")
        entry = {"file": place.file, place.unit: place.line, "id": place.record}
        line = json.dumps({**entry, "kind": error.kind, "reason": error.message}, ensure_ascii=False)
        if line in self._seen:
            return
        self._seen.add(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_text(self.path, line + "\n")

    def entries(self) -> list[dict[str, object]]:
        """The different bad records on file; a last line cut short by a kill is passed over."""
        if not self.path.exists():
            return []
        found: dict[str, dict[str, object]] = {}
        for line in regular(self.path).read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                found.setdefault(line, json.loads(line))
            except json.JSONDecodeError:
                continue
        return list(found.values())

    def counts(self) -> dict[str, int]:
        """How many different bad records of each kind, most frequent first."""
        return dict(Counter(str(entry["kind"]) for entry in self.entries()).most_common())
