"""Experts: low-rank or full updates of a decoder's matrices that act where an image is in play, and nowhere else."""

from alula.grafts.experts.config import ExpertsConfig
from alula.grafts.experts.graft import ExpertsGraft
from alula.grafts.experts.peft_layout import export_lora
from alula.grafts.registry import register

register(ExpertsConfig, ExpertsGraft)

__all__ = ["ExpertsConfig", "ExpertsGraft", "export_lora"]
