"""The arms: ways to learn from the same two bodies of data, pictures of named things and instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RATE, FULL_RATE = 5e-3, 1e-3
"""learning rates: of all adapters, and of full tuning"""
STORING, MIXING = 150, 250
"""steps of either stage"""
BATCH = 8
ASKED, SHOWN, REPLAYED = 3.0, 3.0, 1.0
"""weights in stage 2: of questions about tutored things, of the captions of stage 1, and of old text"""
BEFORE = "before"
"""the untuned model"""
CLOSE = 0.01
"""adapters may differ by this share in trained parameters"""

_WIDTH, _RANK, _LORA, _WINGS = 65, 16, 32, 22
"""sizes that give all adapters as many weights to train: width and rank of MKS2, ranks of LoRA and of Wings"""
_MKS2: dict[str, Any] = {"memory_width": _WIDTH, "rank": _RANK, "retrieval": 64, "router_start": "neutral"}
_MLP = {"rank": _LORA, "targets": ["gate_proj", "up_proj", "down_proj"]}
# the paper's gate: with the exact one a question without an image is answered by the host, bit for bit
_LEARNERS = {"rank": _WINGS, "router": "mass", "gate": "paper", "normalize": True}


@dataclass(frozen=True)
class Arm:
    """One way to learn.

    Attributes:
        captions: what stage 1 shows, a source of the microworld.
        method: of tuning, or "joint": MKS2 mixed from the first step, with both bodies of data in one stage.
        contrasts: whether captions and pictures are compared, which only MKS2 can.
    """

    name: str
    label: str
    description: str
    method: str = "mks2"
    captions: str = "named_caption"
    contrasts: bool = True

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
        replayed = {"microworld": "text", "families": ["facts", "arithmetic", "comparison"], "weight": REPLAYED}
        asked: list[dict[str, Any]] = [{"microworld": "named", "seed": world, "weight": ASKED}, replayed]
        if self.method == "joint":
            settings = {"mks2": {**_MKS2, "mode": "mix", "retrieval": None}}
            parts = ("mks2.memory", "mks2.lora", "mks2.router")
            every = [*asked, {**shown, "weight": _joint_weight()}]
            return [_stage("mix", "mks2", parts, every, STORING + MIXING, settings)]
        first, second, settings = _PARTS[self.method]
        more = {"mks2": {"mode": "mix"}} if self.method == "mks2" else {}
        if not self.contrasts:
            first = tuple(part for part in first if part != "mks2.retrieval")
            settings = {"mks2": {**settings["mks2"], "retrieval": None}}
        return [
            _stage("store", self.method, first, [shown], STORING, settings),
            _stage("mix", self.method, second, [*asked, {**shown, "weight": SHOWN}], MIXING, more),
        ]


def _joint_weight() -> float:
    """Of captions, where one stage shows as many of everything as two do."""
    of_stage = (ASKED + REPLAYED + SHOWN) / MIXING
    return STORING * of_stage + SHOWN


def constants() -> dict[str, Any]:
    """Everything that decides how arms are trained, as JSON values: part of what a directory's trainings share."""
    return {
        "stages": [STORING, MIXING],
        "batch": BATCH,
        "rates": [RATE, FULL_RATE],
        "weights": [ASKED, SHOWN, REPLAYED],
        "adapters": {"mks2": _MKS2, "lora": _MLP, "wings": _LEARNERS},
    }


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
    Arm("plain", "MKS2, no contrast", "stage 1 by captions alone, as the other adapters learn it", contrasts=False),
    Arm("full", "full tuning", "every weight of the decoder, seven times as many", "full"),
    Arm("wings", "Wings", "learners beside attention, also without an image (the paper's gate)", "wings"),
    Arm("told", "MKS2, told in words", "positive control: words say how things look, and no picture is shown",
        captions="named_told"),
)  # fmt: skip
