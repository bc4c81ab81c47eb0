"""AIM: demonstrations that shrink to what their words took from their pictures."""

from alula.grafts.aim.config import AimConfig
from alula.grafts.aim.graft import FUSED, FUSED_AT, AimGraft
from alula.grafts.registry import register

register(AimConfig, AimGraft)

__all__ = ["FUSED", "FUSED_AT", "AimConfig", "AimGraft"]
