"""Classes by importable paths, ``package.module:Class``, without running code that a directory names.

What is loaded may come from anywhere, and importing a module runs it. So a path is followed only where somebody in this
process, or on this machine, has vouched for it: the module is imported already, is alula's own, or a package installed
beside alula names the class in the entry point group ``alula.towers``.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from alula import plugins
from alula.errors import HostError

TOWERS = "alula.towers"
"""group of entry points of towers of one's own: any name, the value is the importable path"""


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
    if not isinstance(path, str) or path.partition(":")[0].endswith("__main__"):  # a program, which would run
        raise HostError(f"its tower is {path!r}, no path of a class", where="vision")
    name, _, qualified = path.partition(":")
    if name not in sys.modules and not name.startswith("alula.") and not plugins.brings(TOWERS, path):
        raise HostError(
            f"its tower is the class {path}, and loading imports no module that only a directory names",
            where="vision",
            remedy=f"import {name or 'its module'} before, or have its package name the class in the entry point "
            f"group {TOWERS}",
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
