"""By what perceptual tokens are chosen that stay: a criterion is a file here and a line in `Criteria`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from alula.policies.criteria.attention import InstructionAttention, LastQueryAttention
from alula.policies.criteria.base import Criterion, Scored, named
from alula.policies.criteria.candidates import Candidates, Group, Layout, Per, Scene
from alula.policies.criteria.conditional_dpp import ConditionalDPP
from alula.policies.criteria.duplicates import Duplicates
from alula.policies.criteria.grid import Grid
from alula.policies.criteria.max_min_diversity import MaxMinDiversity
from alula.policies.criteria.merging import Contextual, Merge, Nearest, check_merge
from alula.policies.criteria.pooling import Pooling
from alula.policies.criteria.random import Random
from alula.policies.criteria.rope_free_attention import RopeFreeAttention
from alula.policies.criteria.tower import TowerAttention, TowerSimilarity

Criteria = Annotated[
    LastQueryAttention
    | InstructionAttention
    | RopeFreeAttention
    | MaxMinDiversity
    | ConditionalDPP
    | Duplicates
    | Random
    | Grid
    | Pooling
    | TowerAttention
    | TowerSimilarity,
    Field(discriminator="name"),
    BeforeValidator(named),
]
"""a criterion as a setting: itself, its name alone, or a mapping of its settings with its name"""

__all__ = [
    "Candidates",
    "ConditionalDPP",
    "Contextual",
    "Criteria",
    "Criterion",
    "Duplicates",
    "Grid",
    "Group",
    "InstructionAttention",
    "LastQueryAttention",
    "MaxMinDiversity",
    "Layout",
    "Merge",
    "Nearest",
    "Per",
    "Pooling",
    "Random",
    "RopeFreeAttention",
    "Scene",
    "Scored",
    "TowerAttention",
    "TowerSimilarity",
    "check_merge",
]
