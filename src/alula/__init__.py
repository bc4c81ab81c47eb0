"""alula: give a language model eyes without costing it its words.

    import alula

    model, processor = alula.build_host("path/to/llm", "path/to/vision")
    graft = alula.attach(model, alula.WingsConfig(rank=64))
    ...
    alula.save(model, "my-adapter")
    model, processor = alula.load_model("my-adapter")

Names are loaded when first used, so that `import alula` stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Anatomy": "alula.anatomy",
    "Modality": "alula.tokens",
    "Role": "alula.tokens",
    "TokenMap": "alula.tokens",
    "WingsConfig": "alula.grafts",
    "attach": "alula.grafts",
    "build_host": "alula.hosts",
    "detach": "alula.grafts",
    "grafts_of": "alula.grafts",
    "load": "alula.grafts",
    "load_host": "alula.hosts",
    "load_model": "alula.loading",
    "paired": "alula.evaluation",
    "save": "alula.grafts",
    "taps": "alula.seam",
    "train": "alula.training",
}

# the redundant aliases tell type checkers that these are public
if TYPE_CHECKING:
    from alula.anatomy import Anatomy as Anatomy
    from alula.evaluation import paired as paired
    from alula.grafts import WingsConfig as WingsConfig
    from alula.grafts import attach as attach
    from alula.grafts import detach as detach
    from alula.grafts import grafts_of as grafts_of
    from alula.grafts import load as load
    from alula.grafts import save as save
    from alula.hosts import build_host as build_host
    from alula.hosts import load_host as load_host
    from alula.loading import load_model as load_model
    from alula.seam import taps as taps
    from alula.tokens import Modality as Modality
    from alula.tokens import Role as Role
    from alula.tokens import TokenMap as TokenMap
    from alula.training import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'alula' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
