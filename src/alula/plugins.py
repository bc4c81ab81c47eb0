"""What packages installed beside alula bring: looked up by entry point, loaded when it is first asked for.

Groups: ``alula.grafts``, ``alula.policies``, ``alula.probes``, ``alula.sections``, ``alula.methods``, ``alula.models``,
``alula.sources``, ``alula.tasks``, ``alula.defaults``, ``alula.commands``, ``alula.towers``. Each group's own
registry says what its entries are.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

from alula.errors import UsageError

T = TypeVar("T")

MODELS = "alula.models"
"""group of models that go by a name"""
_TASKS = (
    "text_bare", "text_after_image", "text_after_text", "visual", "visual_unseen", "visual_later", "pictures", "film",
    "film_unseen", "sound", "sound_unseen", "points", "points_unseen", "depth", "depth_pictured", "normals",
    "normals_pictured", "motion", "response", "response_unseen", "dialogue", "interleaved", "pope", "chair",
)  # fmt: skip
_FLEDGLING = {
    MODELS: ("fledgling",),
    "alula.sources": ("microworld", "digits"),
    "alula.tasks": _TASKS,
    "alula.commands": ("quickstart", "fledgling"),
}
"""what the distribution alula-fledgling brings, so that whoever lacks it is told"""


@functools.cache
def _entries(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))  # reads a file of every installed package, so once


def names(group: str) -> tuple[str, ...]:
    """Names in a group, in alphabetical order; nothing is loaded."""
    return tuple(sorted({entry.name for entry in _entries(group)}))


def load(group: str, name: str) -> Any:
    """What the group has under that name; None where it has nothing.

    Raises:
        UsageError: another package has it and does not load, or two packages have it.
    """
    found = {entry.value: entry for entry in _entries(group) if entry.name == name}
    if len(found) > 1:
        raise UsageError(
            f"several packages bring {name!r} for {group}: {' and '.join(sorted(found))}",
            remedy="uninstall all but one of them",
        )
    return next((_loaded(entry) for entry in found.values()), None)


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:
        raise UsageError(
            f"{entry.name!r} for {entry.group}, of {_package(entry)}, does not load: {type(error).__name__}: {error}",
            where=entry.value,
            remedy="mend or uninstall the package that brings it",
        ) from error


def brings(group: str, value: str) -> bool:
    """Whether an installed package names ``value`` (``package.module:Thing``) in a group, under whatever name."""
    return any(entry.value == value for entry in _entries(group))


def origin(group: str, name: str) -> str:
    """Who brings what the group has under that name, for messages: the package and its entry point."""
    return " and ".join(f"{_package(entry)} ({entry.value})" for entry in _entries(group) if entry.name == name)


def _package(entry: EntryPoint) -> str:
    return "another package" if entry.dist is None else f"the package {entry.dist.name} {entry.dist.version}"


def remedy(group: str, name: str) -> str | None:
    """How to get what the group lacks under that name, where alula's second distribution has it."""
    return "pip install 'alula[fledgling]'" if name in _FLEDGLING.get(group, ()) else None


class Registry(Generic[T]):
    """Things of one kind by name: those that were registered, and those of packages installed beside alula.

    An entry of the group is the thing itself, or a module that registers it when it is imported.

    Args:
        group: of entry points.
        what: what such a thing is called in messages, such as "graft".
    """

    def __init__(self, group: str, what: str) -> None:
        self.group, self.what = group, what
        self._things: dict[str, T] = {}

    def register(self, name: str, thing: T) -> None:
        """Make ``thing`` known.

        Raises:
            UsageError: another thing has that name.
        """
        if self._things.setdefault(name, thing) != thing:
            raise UsageError(f"there is a {self.what} {name!r} already", remedy="give this one another name")

    def get(self, name: object) -> T | None:
        """The thing of that name; None where there is none.

        Raises:
            UsageError: the package that brings it does not load.
        """
        if not isinstance(name, str):
            return None
        if name not in self._things:
            found = load(self.group, name)
            if found is not None and not isinstance(found, ModuleType):
                self.register(name, found)
            if found is not None and name not in self._things:
                raise UsageError(
                    f"{name!r} for {self.group}, of {origin(self.group, name)}, registers nothing under that name",
                    remedy="mend or uninstall the package that brings it",
                )
        return self._things.get(name)

    def names(self) -> tuple[str, ...]:
        """Names of all there are, in the order they were registered, then those of packages; nothing is loaded."""
        brought = names(self.group)
        return (*(name for name in self._things if name not in brought), *brought)

    def loaded(self) -> tuple[T, ...]:
        """Those that were registered or asked for so far."""
        return tuple(self._things.values())
