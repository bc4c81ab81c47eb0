"""What was measured so far, on disk, so that a measurement that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alula.errors import FilesError, UsageError
from alula.files import append_text, regular, write_text

_TOLD = {
    "fingerprint": "other weights",
    "questions": "other questions, pictures, chat template or processor",
    "device": "another device",
    "backend": "another attention implementation",
    "dtype": "another precision",
    "clock": "another clock",
    "versions": "other versions of torch, transformers, peft or alula",
}


class Book:
    """An append-only JSONL file: a header that says of what, then one line per finished piece of work.

    Args:
        path: the file; made where absent.
        identity: JSON values that must agree with those of an earlier call.

    Raises:
        UsageError: it holds the measurements of something else. FilesError: it is damaged before its last line.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._done: dict[str, Any] = {}
        now = json.loads(json.dumps(dict(identity)))
        if not path.exists():
            write_text(path, json.dumps({"identity": now}) + "\n")
            return
        content = regular(path).read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # killed while writing: what the torn line says is measured again
            write_text(path, whole.decode(errors="replace"))
        try:
            head, *lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
            before = head["identity"]
            self._done = {line["key"]: line["value"] for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise FilesError("is damaged", where=str(path), remedy="remove it to start afresh") from error
        differing = [_TOLD.get(key, key) for key in {**now, **before} if before.get(key) != now.get(key)]
        if differing:
            raise UsageError(
                f"holds the measurements of {' and '.join(differing)}",
                where=str(path.parent),
                remedy="name another --output, or remove it",
            )

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def get(self, key: str) -> Any:
        """What was noted under ``key``, or None."""
        return self._done.get(key)

    def note(self, key: str, value: Any) -> Any:
        """Keep a JSON value and force it to disk; returns it as it will be read."""
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False, allow_nan=False)
        append_text(self.path, line + "\n", sync=True)
        self._done[key] = json.loads(line)["value"]
        return self._done[key]
