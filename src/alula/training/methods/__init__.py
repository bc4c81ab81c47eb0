"""Ways to tune, one file each. A new one is a file here and a line below; recipes know none of them by name.

Packages that are installed beside alula add theirs by the entry point group ``alula.methods``, each the instance of a
`Method`.
"""

from alula.errors import UsageError
from alula.plugins import Registry, origin
from alula.training.methods.aim import Aim
from alula.training.methods.base import Method, Tunable
from alula.training.methods.browse import Browse
from alula.training.methods.experts import Experts
from alula.training.methods.full import Full
from alula.training.methods.lora import Lora
from alula.training.methods.mks2 import MKS2
from alula.training.methods.prefix import Prefix
from alula.training.methods.projector import Projector
from alula.training.methods.teal import Teal
from alula.training.methods.universal import Universal
from alula.training.methods.wings import Wings

_REGISTRY: Registry[Method] = Registry("alula.methods", "method of training")
for _method in (
    Projector(),
    Full(),
    Lora(),
    Prefix(),
    Wings(),
    Experts(),
    MKS2(),
    Aim(),
    Browse(),
    Universal(),
    Teal(),
):
    _REGISTRY.register(_method.name, _method)


def _checked(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: another package brings it, and it does not load or is no method.
    """
    method: object = _REGISTRY.get(name)
    if not isinstance(method, Method):
        problem = "is no instance of alula.training.methods.Method"
    elif missing := [key for key in ("name", "parts", "defining") if not hasattr(method, key)]:
        problem = f"does not say its {missing[0]}"
    elif method.name != name:
        problem = f"calls itself {method.name!r}"
    else:
        return method
    raise UsageError(
        f"{name!r} for {_REGISTRY.group}, of {origin(_REGISTRY.group, name)}, {problem}",
        remedy="mend or uninstall the package that brings it",
    )


METHODS = {name: _checked(name) for name in _REGISTRY.names()}
"""by name; a recipe's stages have a section of settings for each"""

__all__ = ["METHODS", "Method", "Tunable"]
