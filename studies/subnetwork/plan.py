"""What the study of subnetworks prunes, asks and heals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alula.bounds import check_count
from alula.errors import UsageError
from studies.plan import TunedPlan

CALIBRATIONS = ("both", "image", "words", "padded", "magnitude", "random")
"""what masks are found by: all tokens of pictures' and of text prompts; image tokens; prompts of text alone; as both,
with the padding of the published code; no data; chance"""
TASKS = ("caption", "visual", "dialogue", "text")
"""streams of the microworld, each a task of the alpha-SubNet"""
RULES = ("intersection", "pooled", "magnitude", "random", "majority", "union")
"""one mask for all tasks: kept by all of them; its rivals of the same sparsity; and the milder rules"""
HEALINGS = ("visual", "both")
"""what is trained on after pruning: questions about pictures, or half of them text"""
LOOKED = 0.5
"""the sparsity at which masks are compared and tasks share"""


@dataclass(frozen=True)
class SubnetworkPlan(TunedPlan):
    """Trained models without some of their weights.

    Attributes:
        sparsities: of the decoder's matrices.
        healed: the sparsity that is healed.
        samples: that masks are calibrated on, of each stream.
        items: questions of text, and as many about pictures.
        task_seed: of the questions.
    """

    sparsities: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7)
    healed: float = 0.7
    samples: int = 32
    items: int = 160
    task_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < sparsity < 1 for sparsity in (*self.sparsities, self.healed)) or not self.sparsities:
            raise UsageError("a sparsity is a share between 0 and 1", remedy="such as --sparsities 0.3,0.5,0.7")
        check_count(self.samples, "samples")
        check_count(self.items, "items")

    @property
    def facts(self) -> dict[str, Any]:
        return {
            **super().facts,
            "study": "subnetwork",
            "healed": self.healed,
            "samples": self.samples,
            "items": self.items,
            "task_seed": self.task_seed,
        }
