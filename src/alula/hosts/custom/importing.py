"""Classes by importable paths, ``package.module:Class``, without running code that a directory names.

What is loaded may come from anywhere. Importing a module runs it, and so does making a class with arguments that a
directory chose, be it one that was imported for something else. So a path is followed only where somebody in this
process, or on this machine, has vouched for the class: it was given to `trust_tower` or `CustomTower.of`, is a tower of
alula's own, or a package installed beside alula names it in the entry point group ``alula.towers``.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, TypeVar

from torch import nn

from alula import plugins
from alula.errors import HostError

TOWERS = "alula.towers"
"""group of entry points of towers of one's own: any name, the value is the importable path"""


_OWN = frozenset({"alula.real.towers:EfficientNetLite"})
_trusted: dict[str, type[nn.Module]] = {}

Tower = TypeVar("Tower", bound=type[nn.Module])


def trust_tower(cls: Tower) -> Tower:
    """Let directories name this class as their tower, in this process; also as a decorator of the class.

    Raises:
        HostError: it is no class of torch.nn.Module.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise HostError(f"{cls!r} is no class of torch.nn.Module", where="trust_tower")
    _trusted[f"{cls.__module__}:{cls.__qualname__}"] = cls
    return cls


def path_of(cls: type) -> str:
    """The importable path of a class.

    Raises:
        HostError: it has none: it was made inside a function, or in a script or notebook.
    """
    path = f"{cls.__module__}:{cls.__qualname__}"
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is not cls or cls.__module__ == "__main__":
        raise HostError(
            f"{cls.__qualname__} cannot be imported from {cls.__module__}, so what is saved would not find it again",
            where="vision",
            remedy="put the class at the top level of a module that can be imported",
        )
    return path


def class_at(path: str) -> type[nn.Module]:
    """The class of a path that `path_of` gave.

    Raises:
        HostError: nobody has vouched for the path, there is no such class, or it is no module of PyTorch.
    """
    if not isinstance(path, str):
        raise HostError(f"its tower is {path!r}, no path of a class", where="vision")
    if path in _trusted:
        return _trusted[path]
    name, _, qualified = path.partition(":")
    if path not in _OWN and not plugins.brings(TOWERS, path):
        raise HostError(
            f"its tower is the class {path}, and loading makes none that only a directory names",
            where="vision",
            remedy=f"if you know the class, alula.hosts.trust_tower({qualified or 'it'}) before, or have its package "
            f"name it in the entry point group {TOWERS}",
        )
    try:
        found: Any = importlib.import_module(name)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise HostError(
            f"its tower is the class {path}, which cannot be imported ({type(error).__name__}: {error})",
            where="vision",
            remedy="install the package that it was saved with",
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise HostError(f"{path} is no class of torch.nn.Module", where="vision")
    return found
