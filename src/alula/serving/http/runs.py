"""Reports and audits of a runs folder: which there are, and each of them under an address that is signed, since a tab
of a browser shows no token. What is not in the folder, or is reached through a link, is not there."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import html
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alula.serving.http.problems import Problem

MOST_DEPTH = 6
"""folders below one another that are looked into"""
MOST_FILES = 500
"""reports that are listed, the newest"""
MOST_SEEN = 20_000
"""entries of folders that are looked at"""
_HEAD = 8_192
"""bytes of a report in which its title stands"""
_TITLE = re.compile(rb"<title>(.*?)</title>", re.DOTALL | re.IGNORECASE)
_KINDS = ("audit", "speed", "comparison", "compress", "retention")
"""what a report is, by a word of its title, its name or its folder's; others are reports"""

# a report has scripts and styles of its own; sandboxed it is of no origin, and reaches neither page nor server
POLICY = (
    "sandbox allow-scripts allow-popups; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; media-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Runs:
    """A runs folder.

    Args:
        root: the folder; None: there is none to show.
        prefix: of the addresses of its files.
    """

    def __init__(self, root: Path | None, prefix: str) -> None:
        self.root, self._prefix = None if root is None else root.resolve(), prefix
        self._secret = secrets.token_bytes(32)

    def listed(self) -> dict[str, Any]:
        """Its reports, the newest first."""
        if self.root is None:
            return {"folder": None, "entries": []}
        found = sorted(self._files(self.root, 0, [MOST_SEEN]), key=lambda each: -each[1].st_mtime)[:MOST_FILES]
        return {
            "folder": self.root.name,
            "entries": [entry for path, facts in found for entry in self._entry(path, facts)],
        }

    def read(self, path: str, key: str) -> bytes:
        """The report at a path below the folder.

        Args:
            key: its signature, from its address.

        Raises:
            Problem: 404, whatever is wrong.
        """
        is_signed = hmac.compare_digest(self._signature(path).encode(), key.encode())
        if self.root is None or not is_signed:
            raise _missing()
        place = self.root / path
        # signed is what was listed; links may have come since
        if place.resolve() != place or not place.is_relative_to(self.root):
            raise _missing()
        try:
            descriptor = os.open(place, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except OSError:
            raise _missing() from None
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _missing()
            return file.read()

    def _files(self, folder: Path, depth: int, left: list[int]) -> Iterator[tuple[Path, os.stat_result]]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            return
        for entry in entries:
            left[0] -= 1
            if left[0] < 0:
                return
            if entry.name.startswith(".") or entry.is_symlink() or not _is_text(entry.name):
                continue
            if entry.is_dir() and depth < MOST_DEPTH:
                yield from self._files(Path(entry.path), depth + 1, left)
            elif entry.name.endswith(".html") and entry.is_file():
                with contextlib.suppress(OSError):  # it went meanwhile
                    yield Path(entry.path), entry.stat()

    def _entry(self, place: Path, facts: os.stat_result) -> Iterator[dict[str, Any]]:
        """What is told of a report; nothing where it cannot be read (any more)."""
        assert self.root is not None
        path = place.relative_to(self.root).as_posix()
        try:
            with place.open("rb") as file:
                found = _TITLE.search(file.read(_HEAD))
        except OSError:
            return
        title = html.unescape(found[1].decode("utf-8", "replace")).strip() if found else ""
        words = f"{title} {path}".lower()
        yield {
            "title": title[:200] or place.stem,
            "kind": next((kind for kind in _KINDS if kind in words), "report"),
            "path": path,
            "url": f"{self._prefix}{quote(path)}?key={self._signature(path)}",
            "modified": int(facts.st_mtime),
            "bytes": facts.st_size,
        }

    def _signature(self, path: str) -> str:
        return hmac.new(self._secret, path.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def _is_text(name: str) -> bool:
    """Whether a name can be written into an address and an answer: file systems also hold names that are no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _missing() -> Problem:
    return Problem("there is no such report", status=404, code="report_not_found")
