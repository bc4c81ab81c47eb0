"""Trainable parts attached to decoder layers. Detaching one restores the host bit for bit."""

from alula.grafts.aim import AimConfig
from alula.grafts.base import Graft, GraftConfig
from alula.grafts.browse import BrowseConfig, read_conditions
from alula.grafts.experts import ExpertsConfig
from alula.grafts.lifecycle import attach, compile_layers, detach, grafts_of
from alula.grafts.mks2 import MKS2Config
from alula.grafts.registry import register
from alula.grafts.storage import load_adapter, save_adapter
from alula.grafts.teal import TealConfig
from alula.grafts.wings import WingsConfig

__all__ = [
    "AimConfig",
    "BrowseConfig",
    "ExpertsConfig",
    "Graft",
    "GraftConfig",
    "MKS2Config",
    "TealConfig",
    "WingsConfig",
    "attach",
    "compile_layers",
    "detach",
    "grafts_of",
    "load_adapter",
    "read_conditions",
    "register",
    "save_adapter",
]
