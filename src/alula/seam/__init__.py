"""The one place that touches transformers internals: attention function, forward context, cache layer, taps."""

from alula.seam.attention import ATTENTION, stock_attention
from alula.seam.cache import TokenCache
from alula.seam.context import NAME, ForwardContext
from alula.seam.declared import DECLARED, POLICIES, declare, declared, grafted_weights, retract
from alula.seam.embeddings import Read, Rewriter, Seen
from alula.seam.frame import Part, Uncompiled
from alula.seam.generation import generation_extras
from alula.seam.hooks import ByThread, Handle, with_keywords
from alula.seam.install import Seam, find, install, needs_roles
from alula.seam.packed import PACKED, blank_mask, check_packs, packs
from alula.seam.points import InputOf, OutputOf, Phase, Point
from alula.seam.requests import (
    Bias,
    Branch,
    BranchReader,
    Contrast,
    Foresight,
    Heads,
    Owner,
    Requests,
    Sums,
    Tokens,
    Tower,
    Weights,
    Work,
    Worker,
)
from alula.seam.scope import READING, SECOND, evaluating, marked, marks
from alula.seam.scoring import scoring_inputs, text_logits
from alula.seam.taps import TapEvent, taps
from alula.seam.view import LayerView

__all__ = [
    "ATTENTION",
    "DECLARED",
    "NAME",
    "Bias",
    "Branch",
    "BranchReader",
    "ByThread",
    "Contrast",
    "Foresight",
    "ForwardContext",
    "Handle",
    "Heads",
    "InputOf",
    "OutputOf",
    "PACKED",
    "LayerView",
    "Owner",
    "POLICIES",
    "Part",
    "Phase",
    "Point",
    "READING",
    "Read",
    "Requests",
    "Rewriter",
    "SECOND",
    "Seam",
    "Seen",
    "Sums",
    "TapEvent",
    "TokenCache",
    "Tower",
    "Uncompiled",
    "Tokens",
    "Weights",
    "Work",
    "Worker",
    "blank_mask",
    "check_packs",
    "declare",
    "declared",
    "evaluating",
    "find",
    "generation_extras",
    "grafted_weights",
    "install",
    "marked",
    "marks",
    "needs_roles",
    "packs",
    "retract",
    "scoring_inputs",
    "stock_attention",
    "taps",
    "text_logits",
    "with_keywords",
]
