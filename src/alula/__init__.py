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
    "Kind": "alula.rows",
    "Role": "alula.rows",
    "RowMap": "alula.rows",
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

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from alula.anatomy import Anatomy
    from alula.evaluation import paired
    from alula.grafts import WingsConfig, attach, detach, grafts_of, load, save
    from alula.hosts import build_host, load_host
    from alula.loading import load_model
    from alula.rows import Kind, Role, RowMap
    from alula.seam import taps
    from alula.training import train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'alula' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
