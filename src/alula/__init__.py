"""alula: give a language model eyes without costing it its words.

    import alula

    model, processor = alula.build_host("path/to/llm", "path/to/vision")
    alula.save_host((model, processor), "my-host")
    graft = alula.attach(model, alula.WingsConfig(rank=64))
    ...
    alula.save_adapter(model, "my-adapter", base="my-host")
    model, processor = alula.load_model("my-adapter")

Names are loaded when first used, so that `import alula` stays cheap.
"""

from importlib import import_module
from sys import modules
from typing import TYPE_CHECKING, Any

from alula._version import __version__ as __version__

_HOMES = {
    "AimConfig": "alula.grafts",
    "BrowseConfig": "alula.grafts",
    "ExpertsConfig": "alula.grafts",
    "MKS2Config": "alula.grafts",
    "TealConfig": "alula.grafts",
    "TokenMap": "alula.tokens",
    "WingsConfig": "alula.grafts",
    "attach": "alula.grafts",
    "audit": "alula.auditing",
    "build_host": "alula.hosts",
    "compare": "alula.evaluation",
    "compile_layers": "alula.grafts",
    "detach": "alula.grafts",
    "evaluate": "alula.evaluation",
    "grafts_of": "alula.grafts",
    "highlight": "alula.steering",
    "load_adapter": "alula.grafts",
    "load_model": "alula.loading",
    "save_adapter": "alula.grafts",
    "save_host": "alula.hosts",
    "train": "alula.training",
}

__all__ = [*_HOMES]

# the redundant aliases tell type checkers that these are public
if TYPE_CHECKING:
    from alula.auditing import audit as audit
    from alula.evaluation import compare as compare
    from alula.evaluation import evaluate as evaluate
    from alula.grafts import AimConfig as AimConfig
    from alula.grafts import BrowseConfig as BrowseConfig
    from alula.grafts import ExpertsConfig as ExpertsConfig
    from alula.grafts import MKS2Config as MKS2Config
    from alula.grafts import TealConfig as TealConfig
    from alula.grafts import WingsConfig as WingsConfig
    from alula.grafts import attach as attach
    from alula.grafts import compile_layers as compile_layers
    from alula.grafts import detach as detach
    from alula.grafts import grafts_of as grafts_of
    from alula.grafts import load_adapter as load_adapter
    from alula.grafts import save_adapter as save_adapter
    from alula.hosts import build_host as build_host
    from alula.hosts import save_host as save_host
    from alula.loading import load_model as load_model
    from alula.steering import highlight as highlight
    from alula.tokens import TokenMap as TokenMap
    from alula.training import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'alula' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, and the rooms that were imported."""
    own = [name for name in globals() if name.startswith("__") or (f"{__name__}.{name}" in modules and name[0] != "_")]
    return sorted({*own, *_HOMES})
