"""Which models a server begins with, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alula.errors import UsageError
from alula.serving.http.loading import ADAPTER

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+:@-]{0,127}")
_OF_RUNS = ("final", "latest", "model", "host", "checkpoint")
"""directories of a run whose names say nothing of what is in them"""


@dataclass(frozen=True)
class Entry:
    """A model to load: the name it was given, if any; and where it is, a directory, a hub id or a name that a package
    brings."""

    name: str | None
    path: str

    @property
    def called(self) -> str:
        """What it is called where nothing stands in its way."""
        return self.name or _called(self.path)

    @property
    def is_adapter(self) -> bool:
        """Whether it stands on another."""
        return (Path(self.path) / ADAPTER).is_file()


def lineup(texts: Sequence[str]) -> list[Entry]:
    """Read ``NAME=PATH`` and ``PATH``; bases before adapters.

    Raises:
        UsageError: a name that cannot stand in a request, or one that stands twice.
    """
    entries = []
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            if equals and "/" not in name:
                raise UsageError(
                    f"{name!r} is no name of a model", where=text, remedy="letters, digits and . _ + : @ -"
                )
            name, path = "", text
        if not path:
            raise UsageError("no directory is given", where=text, remedy="write NAME=DIRECTORY")
        entries.append(Entry(name or None, path))
    names = [entry.called for entry in entries if entry.name is not None or not entry.is_adapter]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two models are called {name!r}", remedy=f"name one: other=DIRECTORY, not {name}=")
    return sorted(entries, key=lambda entry: entry.is_adapter)


def adapter_name(entry: Entry, bases: Sequence[str]) -> str:
    """What an adapter is called.

    Args:
        bases: that are served.

    Raises:
        UsageError: it has no name and there is no base, or there are several.
    """
    if entry.name is not None:
        return entry.name
    if not bases:
        raise UsageError(
            "is an adapter, and the model that it is put on is not served",
            where=entry.path,
            remedy=f"name that model beside it: alula serve BASE {entry.path}",
        )
    if len(bases) > 1:
        raise UsageError(
            f"is an adapter, and could be put on any of {', '.join(bases)}",
            where=entry.path,
            remedy=f"say on which, and how it is called: BASE+NAME={entry.path}, such as "
            f"{bases[0]}+{_called(entry.path)}={entry.path}",
        )
    return f"{bases[0]}+{_called(entry.path)}"


def _called(path: str) -> str:
    """A name for what lies at a path: its last part that says something."""
    parts = [part for part in Path(path).parts if part not in ("/", ".", "..")]
    told = [part for part in parts if part not in _OF_RUNS] or parts
    return re.sub(r"[^A-Za-z0-9._@-]+", "-", told[-1]).lstrip("._-+@") or "model" if told else "model"
