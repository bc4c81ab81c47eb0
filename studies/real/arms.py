"""The ways of tuning: stages of a recipe from one aligned connector, on the same pictures, at the same rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RATE = 5e-4
"""of every part that is trained, unless the arm is about the rate"""
ALIGN_RATE = 1e-3
RANK = 32
"""of LoRA and of Wings' learners"""
MLP = ("gate_proj", "up_proj", "down_proj")

Stage = Mapping[str, Any]
Stages = Callable[[int, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], list[dict[str, Any]]]
"""steps, sources of the task, sources of captions alone, text replay -> stages of a recipe"""


@dataclass(frozen=True)
class Arm:
    """One way of tuning.

    Attributes:
        name: under which it is kept, and asked for.
        label: its name for people.
        stages: makes its stages.
        replays: a quarter of its samples are text.
    """

    name: str
    label: str
    stages: Stages
    replays: bool = False


def _one(method: str, train: Mapping[str, float], replay: bool = False, **settings: Any) -> Stages:
    def stages(
        steps: int, task: Mapping[str, Any], captions: Mapping[str, Any], text: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        data = {**task, "text_replay": dict(text)} if replay else dict(task)
        return [{"name": "tune", "method": method, "train": dict(train), "data": data, "steps": steps, **settings}]

    return stages


def _mks2(
    steps: int, task: Mapping[str, Any], captions: Mapping[str, Any], text: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Half of the steps store captioned pictures, half mix the memory in for the task."""
    first = max(1, steps // 2)
    return [
        {
            "name": "store",
            "method": "mks2",
            "train": {"mks2": RATE, "projector": RATE},
            "mks2": {"mode": "store", "memory_width": None, "retrieval": 128, "rank": RANK},
            "data": dict(captions),
            "steps": first,
        },
        {
            "name": "mix",
            "method": "mks2",
            "train": {"mks2.lora": RATE, "mks2.router": RATE},
            "mks2": {"mode": "mix"},
            "data": dict(task),
            "steps": max(1, steps - first),
        },
    ]


_WINGS: dict[str, Any] = {"wings": {"rank": RANK}}

ARMS = (
    Arm("projector", "connector only", _one("projector", {"projector": RATE})),
    Arm("full", "full tuning", _one("full", {"llm": RATE, "projector": RATE})),
    Arm("lora", "LoRA", _one("lora", {"lora": RATE, "projector": RATE}, lora={"rank": RANK})),
    Arm("wings", "Wings", _one("wings", {"wings": RATE, "projector": RATE}, **_WINGS)),
    Arm("full-replay", "full tuning with replay", _one("full", {"llm": RATE, "projector": RATE}, replay=True), True),
    Arm("full-tenth", "full tuning at a tenth", _one("full", {"llm": RATE / 10, "projector": RATE})),
    Arm(
        "lora-mlp",
        "LoRA on the MLP",
        _one("lora", {"lora": RATE, "projector": RATE}, lora={"rank": RANK, "targets": list(MLP)}),
    ),
    Arm(
        "wings-llm",
        "Wings with the decoder at a tenth",
        _one("wings", {"wings": RATE, "projector": RATE, "llm": RATE / 10}, **_WINGS),
    ),
    Arm("mks2", "MKS2", _mks2),
)
"""in the order of what is to be known first"""
