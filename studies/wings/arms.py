"""The arms of the ablation: ways of tuning one base on the same pictures, each a recipe with a few keys changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RATE = 2e-3
"""the rate every part of every arm is trained at, unless the arm is about the rate"""

WINGS = {"rank": 64, "router": "mass", "gate": "exact", "normalize": True}
"""the graft of the quickstart, from which each Wings arm departs in one respect"""

_REPLAY = {"ratio": 0.25, "sources": [{"microworld": "text"}]}


@dataclass(frozen=True)
class Arm:
    """One way of tuning.

    Attributes:
        name: under which it is kept, and asked for.
        label: its name for people.
        description: what it is.
        recipe: the packaged recipe it is made from.
        changes: keys of the recipe that it changes; with none it is a method of the quickstart.
        group: what it belongs to in figures, a name of `GROUPS`.
    """

    name: str
    label: str
    description: str
    group: str
    recipe: str = "full"
    changes: Mapping[str, Any] = field(default_factory=dict)


GROUPS = {
    "ways": "Ways of tuning",
    "parts": "Wings: learners, router, gate, decoder",
    "rank": "Wings: rank of the learners",
    "rate": "Wings: learning rate and length",
}


def _stage(method: str, train: Mapping[str, float], **more: Any) -> dict[str, Any]:
    return {f"stages.0.{key}": value for key, value in {"method": method, "train": dict(train), **more}.items()}


def _wings(changes: Mapping[str, Any], *, train: Mapping[str, float] | None = None) -> dict[str, Any]:
    rates = {"wings": RATE, "projector": RATE, **(train or {})}
    return _stage("wings", rates, wings={**WINGS, **changes})


ARMS = (
    Arm("projector", "connector only", "the decoder as it is, the connector trained on", "ways",
        changes=_stage("projector", {"projector": RATE})),
    Arm("full", "full tuning", "LLaVA's way: every weight of the decoder, at the shared rate", "ways"),
    Arm("full-10x", "full tuning, 10x rate", "the same at ten times the rate, the published mismatch", "ways",
        recipe="full-10x"),
    Arm("full-replay", "full tuning, text replay", "every weight, with a quarter of the samples text", "ways",
        changes={"stages.0.data.text_replay": _REPLAY}),
    Arm("lora", "LoRA", "low-rank updates of the decoder's linear layers, rank 64 (PEFT)", "ways", recipe="lora"),
    Arm("prefix", "prefix", "16 learned keys and values per layer (PEFT), at the shared rate", "ways",
        changes=_stage("prefix", {"prefix": RATE, "projector": RATE})),
    Arm("prefix-10x", "prefix, 10x rate", "the same with the prefix at ten times the rate", "ways",
        changes=_stage("prefix", {"prefix": 10 * RATE, "projector": RATE})),
    Arm("wings", "Wings (rank 64)", "frozen decoder, both learners, mass router, exact gate, normalized inputs", "ways",
        recipe="wings"),
    Arm("wings-visual", "only visual learners", "no textual learners, hence no router", "parts",
        changes=_wings({"learners": ["visual"]})),
    Arm("wings-textual", "only textual learners", "no visual learners, hence no router", "parts",
        changes=_wings({"learners": ["textual"]})),
    Arm("wings-constant", "constant router", "one learned pair of weights per layer", "parts",
        changes=_wings({"router": "constant"})),
    Arm("wings-attention", "attention router", "the paper's: a learned weight per key position", "parts",
        changes=_wings({"router": "attention"})),
    Arm("wings-paper-gate", "paper gate", "the textual learners always speak, also without an image", "parts",
        changes=_wings({"gate": "paper"})),
    Arm("wings-plain", "not normalized", "queries and input rows as they come, as in the paper", "parts",
        changes=_wings({"normalize": False})),
    Arm("wings-llm", "decoder tuned too", "the decoder trained as well, at a tenth of the shared rate", "parts",
        changes=_wings({}, train={"llm": RATE / 10})),
    Arm("wings-llm-equal", "decoder tuned alike", "the decoder trained at the shared rate, the paper's way", "parts",
        changes=_wings({}, train={"llm": RATE})),
    Arm("wings-rank-8", "rank 8", "learners of rank 8", "rank", changes=_wings({"rank": 8})),
    Arm("wings-rank-32", "rank 32", "learners of rank 32", "rank", changes=_wings({"rank": 32})),
    Arm("wings-rank-128", "rank 128", "learners of rank 128", "rank", changes=_wings({"rank": 128})),
    Arm("wings-rate-third", "a third of the rate", "the learners at a third of the shared rate", "rate",
        changes=_wings({}, train={"wings": RATE / 3})),
    Arm("wings-rate-3x", "3x rate", "the learners at three times the shared rate", "rate",
        changes=_wings({}, train={"wings": 3 * RATE})),
    Arm("wings-long", "twice as long", "twice the steps, on as many more samples", "rate",
        changes={**_wings({}), "stages.0.steps": 600}),
)  # fmt: skip
NAMES = tuple(arm.name for arm in ARMS)


@dataclass(frozen=True)
class Question:
    """A comparison the ablation is for: what it asks, and the arm with the answer against its reference."""

    asks: str
    arm: str
    against: str


QUESTIONS = (
    Question("Full tuning at ten times the rate (the published mismatch) against the shared rate", "full-10x", "full"),
    Question("Wings against full tuning at the same rate", "wings", "full"),
    Question("Wings against LoRA", "wings", "lora"),
    Question("Wings against text replay", "wings", "full-replay"),
    Question("Wings against a prefix", "wings", "prefix"),
    Question("Wings against training the connector alone", "wings", "projector"),
    Question("Text replay against none, full tuning", "full-replay", "full"),
    Question("Only visual learners instead of both", "wings-visual", "wings"),
    Question("Only textual learners instead of both", "wings-textual", "wings"),
    Question("A constant router instead of one by attention mass", "wings-constant", "wings"),
    Question("The paper's attention router instead of one by attention mass", "wings-attention", "wings"),
    Question("The paper's gate instead of the exact one", "wings-paper-gate", "wings"),
    Question("Learner inputs as in the paper instead of normalized", "wings-plain", "wings"),
    Question("The decoder tuned too instead of frozen", "wings-llm", "wings"),
    Question("The decoder tuned at the same rate, instead of frozen", "wings-llm-equal", "wings"),
    Question("Wings with the decoder tuned against full tuning, at the same rate", "wings-llm-equal", "full"),
    Question("Rank 8 instead of 64", "wings-rank-8", "wings"),
    Question("Rank 32 instead of 64", "wings-rank-32", "wings"),
    Question("Rank 128 instead of 64", "wings-rank-128", "wings"),
    Question("A third of the learning rate", "wings-rate-third", "wings"),
    Question("Three times the learning rate", "wings-rate-3x", "wings"),
    Question("Twice the steps", "wings-long", "wings"),
)  # fmt: skip
