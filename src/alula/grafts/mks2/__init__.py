"""MKS2: a visual memory in the feed-forward place of decoder layers, and a soft mixture of it and the MLP.

Li et al., "Modular Visual Memory and Soft Mixtures of Multimodal Experts" (arXiv 2311.15759; docs/methods/mks2.md).
"""

from alula.grafts.mks2.config import MKS2Config
from alula.grafts.mks2.graft import MKS2Graft
from alula.grafts.registry import register

register(MKS2Config, MKS2Graft)

__all__ = ["MKS2Config", "MKS2Graft"]
