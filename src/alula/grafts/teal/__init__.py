"""TEAL: codes of images and sounds behind the text's vocabulary, read and written by a frozen language model.

Yang et al., "TEAL: Tokenize and Embed ALL for Multi-modal Large Language Models" (arXiv 2311.04589;
docs/methods/teal.md).
"""

from alula.grafts.registry import register
from alula.grafts.teal.config import CodesSpec, TealConfig
from alula.grafts.teal.constraint import CodeConstraint
from alula.grafts.teal.graft import GENERATES, INTERLEAVED, TealGraft

register(TealConfig, TealGraft)

__all__ = ["GENERATES", "INTERLEAVED", "CodeConstraint", "CodesSpec", "TealConfig", "TealGraft"]
