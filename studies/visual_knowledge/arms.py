"""The arms: ways to learn from the same two bodies of data, pictures of named things and instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RATE, FULL_RATE = 5e-3, 1e-3
"""learning rates: of all adapters, and of full tuning"""
STORING, MIXING = 110, 120
"""steps of either stage"""
BATCH = 8
BEFORE = "before"
"""the untuned model"""
CLOSE = 0.01
"""adapters may differ by this share in trained parameters"""

_WIDTH, _RANK, _LORA, _WINGS = 65, 16, 32, 22
"""sizes that give all adapters as many weights to train: width and rank of MKS2, ranks of LoRA and of Wings"""
_MKS2 = {"memory_width": _WIDTH, "rank": _RANK, "retrieval": 64}
_MLP = {"rank": _LORA, "targets": ["gate_proj", "up_proj", "down_proj"]}
# the paper's gate: with the exact one a question without an image is answered by the host, bit for bit
_LEARNERS = {"rank": _WINGS, "router": "mass", "gate": "paper", "normalize": True}


@dataclass(frozen=True)
class Arm:
    """One way to learn.

    Attributes:
        captions: what stage 1 shows, a source of the microworld.
        method: of tuning, or "joint": MKS2 mixed from the first step, with both bodies of data in one stage.
    """

    name: str
    label: str
    description: str
    method: str = "mks2"
    captions: str = "named_caption"

    @property
    def is_adapter(self) -> bool:
        """Whether it trains as many weights as the other adapters; full tuning cannot."""
        return self.method != "full"

    def stages(self, world: int) -> list[dict[str, Any]]:
        """The recipe's stages.

        Args:
            world: seed of the named things.
        """
        shown: dict[str, Any] = {"microworld": self.captions, "seed": world}
        # short questions alone: others would fill every batch up to their length
        replayed = {"microworld": "text", "families": ["facts", "arithmetic", "comparison"], "weight": 1.0}
        asked: list[dict[str, Any]] = [{"microworld": "named", "seed": world, "weight": 3.0}, replayed]
        if self.method == "joint":
            weight = sum(source["weight"] for source in asked) * STORING / MIXING
            parts = ("mks2.memory", "mks2.lora", "mks2.router")
            settings = {"mks2": {**_MKS2, "mode": "mix", "retrieval": None}}
            return [_stage("mix", "mks2", parts, [*asked, {**shown, "weight": weight}], STORING + MIXING, settings)]
        first, second, settings = _PARTS[self.method]
        more = {"mks2": {"mode": "mix"}} if self.method == "mks2" else {}
        return [
            _stage("store", self.method, first, [shown], STORING, settings),
            _stage("mix", self.method, second, asked, MIXING, more),
        ]


_PARTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]] = {
    "mks2": (("mks2.memory", "mks2.retrieval"), ("mks2.lora", "mks2.router"), {"mks2": {**_MKS2, "mode": "store"}}),
    "lora": (("lora",), ("lora",), {"lora": _MLP}),
    "wings": (("wings",), ("wings",), {"wings": _LEARNERS}),
    "full": (("llm",), ("llm",), {}),
}


def _stage(
    name: str, method: str, parts: tuple[str, ...], sources: list[dict[str, Any]], steps: int, more: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "method": method,
        "train": dict.fromkeys(parts, FULL_RATE if method == "full" else RATE),
        "data": {"sources": sources},
        "steps": steps,
        "batch_size": BATCH,
        "log_every": 20,
        "save_every": 1000,
        **more,
    }


ARMS = (
    Arm("mks2", "MKS2", "a memory stored from pictures and captions, then mixed with the MLP"),
    Arm("joint", "MKS2 without stage 1", "memory, adapters and router trained at once on both bodies of data",
        "joint"),
    Arm("lora", "LoRA on the MLP", "no memory and no mixture: as many weights as low-rank updates of the MLP", "lora"),
    Arm("blind", "MKS2, captions alone", "stage 1 has the captions without their pictures", captions="named_blind"),
    Arm("shuffled", "MKS2, shuffled pairs", "stage 1 has captions with pictures of other things",
        captions="named_shuffled"),
    Arm("full", "full tuning", "every weight of the decoder, seven times as many", "full"),
    Arm("wings", "Wings", "learners beside attention, also without an image (the paper's gate)", "wings"),
    Arm("told", "MKS2, told in words", "positive control: captions of stage 1 say how things look",
        captions="named_told"),
)  # fmt: skip
