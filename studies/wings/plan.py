"""The plan of the Wings ablation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from studies.arms import Ablation, ArmsPlan
from studies.wings.arms import WINGS


@dataclass(frozen=True)
class WingsPlan(ArmsPlan):
    """The ablation of Wings' parts."""

    ablation: ClassVar[Ablation] = WINGS
