"""Ways to tune, one file each. A new one is a file here and a line below; recipes know none of them by name.

Packages that are installed beside alula add theirs by the entry point group ``alula.methods``, each the instance of a
`Method`.
"""

from importlib.metadata import entry_points

from alula.errors import UsageError
from alula.training.methods.base import Method, Tunable
from alula.training.methods.full import Full
from alula.training.methods.lora import Lora
from alula.training.methods.prefix import Prefix
from alula.training.methods.projector import Projector
from alula.training.methods.wings import Wings

METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a way to tune.

    Raises:
        UsageError: there is one of that name.
    """
    if method.name in METHODS:
        raise UsageError(f"there is a method {method.name!r} already", remedy="give it another name")
    METHODS[method.name] = method


for _method in (Projector(), Full(), Lora(), Prefix(), Wings()):
    register(_method)
for _entry in entry_points(group="alula.methods"):
    try:
        register(_entry.load())
    except Exception as error:
        raise UsageError(
            f"the method {_entry.name!r} of another package does not load: {type(error).__name__}: {error}",
            where=_entry.value,
            remedy="mend or uninstall the package that brings it",
        ) from error

__all__ = ["METHODS", "Method", "Tunable", "register"]
