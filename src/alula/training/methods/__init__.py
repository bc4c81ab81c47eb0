"""Ways to tune, one file each. A new one is a file here and a line below; recipes know none of them by name.

Packages that are installed beside alula add theirs by the entry point group ``alula.methods``, each the instance of a
`Method`.
"""

from alula.plugins import Registry
from alula.training.methods.base import Method, Tunable
from alula.training.methods.full import Full
from alula.training.methods.lora import Lora
from alula.training.methods.prefix import Prefix
from alula.training.methods.projector import Projector
from alula.training.methods.wings import Wings

_REGISTRY: Registry[Method] = Registry("alula.methods", "method of training")
for _method in (Projector(), Full(), Lora(), Prefix(), Wings()):
    _REGISTRY.register(_method.name, _method)

METHODS = {method.name: method for method in map(_REGISTRY.get, _REGISTRY.names()) if method is not None}
"""by name; a recipe's stages have a section of settings for each"""

__all__ = ["METHODS", "Method", "Tunable"]
