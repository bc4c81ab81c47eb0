"""Wings: low-rank residual attention learners for eyes and words beside every attention block (arXiv 2406.03496)."""

from alula.grafts.registry import register
from alula.grafts.wings.config import WingsConfig
from alula.grafts.wings.graft import WingsGraft
from alula.grafts.wings.learners import LoRRA
from alula.grafts.wings.released import Release

register(WingsConfig, WingsGraft)

__all__ = ["LoRRA", "Release", "WingsConfig", "WingsGraft"]
