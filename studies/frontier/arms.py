"""The arms of the frontier: ways of giving one base eyes, from the same connector, on the same pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from studies.arms import Ablation, Arm, Column, Question, stage
from studies.arms.ablation import RATE, REPLAY, WINGS, wings

RANK = 64
MLP = ("gate_proj", "up_proj", "down_proj")
"""what experts call mlp, by the names of the fledgling's linears"""

DISTILL: dict[str, Any] = {
    "share": 0.25, "weight": 1.0, "prompts": {"microworld": "text"}, "count": 2400, "max_new_tokens": 48,
}  # fmt: skip
"""the section `distill` of stages that are held to what the base says to questions whose answers nobody looks at (the
fledgling writes none itself); its share is that of `REPLAY`"""


def _experts(tokens: str, rank: int | None = RANK, targets: tuple[str, ...] = ("attention", "mlp")) -> dict[str, Any]:
    # PEFT's LoRA is scaled by 2 in recipes (alpha is twice the rank); experts are scaled alike
    scaling = {} if rank is None else {"alpha": 2 * rank}
    settings = {"tokens": tokens, "rank": rank, **scaling, "targets": list(targets)}
    return stage("experts", {"experts": RATE, "projector": RATE}, experts=settings)


def _lora(**more: Any) -> dict[str, Any]:
    return stage("lora", {"lora": RATE, "projector": RATE}, **{"lora": {"rank": RANK}, **more})


def _stages(*stages: Mapping[str, Any]) -> dict[str, Any]:
    return {"stages": [{"batch_size": 32, "log_every": 5, "save_every": 100, **each} for each in stages]}


_BEST = _stages(
    {
        "name": "captions",
        "method": "wings",
        "train": {"wings.visual": RATE, "projector": RATE},
        "wings": WINGS,
        "data": {"sources": [{"microworld": "caption", "split": "train"}]},
        "steps": 200,
    },
    {
        "name": "tune",
        "method": "wings",
        "train": {"wings": RATE, "projector": RATE, "llm": RATE / 10},
        "data": {"sources": [{"microworld": "visual", "split": "train"}], "text_replay": REPLAY},
        "steps": 400,
    },
)

PLAIN = (
    Arm("projector", "connector only", "the decoder as it is, the connector trained on", "ways",
        changes=stage("projector", {"projector": RATE})),
    Arm("full", "full tuning", "LLaVA's way: every weight of the decoder, at the shared rate", "ways"),
    Arm("full-tenth", "full tuning at a tenth", "the decoder at a tenth of the rate, the connector at the whole of it",
        "ways", changes=stage("full", {"llm": RATE / 10, "projector": RATE})),
    Arm("full-replay", "full tuning with replay", "every weight, with a quarter of the samples text", "ways",
        changes={"stages.0.data.text_replay": REPLAY}),
    Arm("lora", "LoRA", "low-rank updates of all linears of the decoder's layers, rank 64 (PEFT)", "ways",
        recipe="lora"),
    Arm("lora-mlp", "LoRA on the MLP", "the same on gate, up and down projections alone", "ways",
        changes=_lora(lora={"rank": RANK, "targets": list(MLP)})),
    Arm("lora-replay", "LoRA with replay", "LoRA, with a quarter of the samples text", "ways",
        changes=_lora(**{"data.text_replay": REPLAY})),
    Arm("wings", "Wings", "frozen decoder, both learners (rank 64), mass router, exact gate, normalized inputs",
        "wings", recipe="wings"),
    Arm("wings-llm", "Wings with the decoder at a tenth", "the decoder trained as well, at a tenth of the shared rate",
        "wings", changes=wings({}, train={"llm": RATE / 10})),
    Arm("wings-best", "Wings as published", "visual learners and connector on captions (200 steps; the textual ones "
        "are there and still add nothing, the router stays as it began), then both learners, the router and the "
        "decoder at a tenth of the rate on pictures with a quarter of text (400 steps)", "wings", changes=_BEST),
    Arm("experts-image", "experts (image)", "updates of all linears, rank 64, for image tokens alone", "experts",
        changes=_experts("image")),
    Arm("experts-seen", "experts (seen)", "the same for every token from the first image on", "experts",
        changes=_experts("seen")),
    Arm("experts-turn", "experts (turn)", "from an image on to the end of the answer to its turn; turns "
        "without an image go through the base's own weights", "experts", changes=_experts("turn")),
    Arm("experts-turn-wide", "full experts (turn)", "the same with a whole matrix beside every linear", "experts",
        changes=_experts("turn", None)),
    Arm("experts-both", "experts (both)", "one of rank 32 for image tokens, another for text behind them: together as "
        "many parameters as one of rank 64", "experts", changes=_experts("both", RANK // 2)),
    Arm("experts-mlp", "experts (seen) on the MLP", "from the first image on, on gate, up and down projections alone",
        "experts", changes=_experts("seen", targets=("mlp",))),
    Arm("experts-image-128", "experts (image), rank 128", "for image tokens alone, as many parameters as full tuning "
        "trains", "experts", changes=_experts("image", 2 * RANK)),
    Arm("experts-wide", "full experts (image)", "a whole matrix beside every linear, for image tokens alone (CogVLM's "
        "visual expert)", "experts", changes=_experts("image", None)),
)  # fmt: skip


def _distilled(name: str) -> Arm:
    arm = next(each for each in PLAIN if each.name == name)
    return replace(
        arm,
        name=f"{name}-distill",
        label=f"distilled {arm.label}",
        description=f"{arm.description}; held to the base's own answers to text behind an image",
        group="distill",
        changes={**arm.changes, "stages.0.distill": DISTILL},
    )


DISTILLED = tuple(
    map(_distilled, ("full", "lora", "wings", "experts-image", "experts-seen", "experts-both", "experts-mlp"))
)
ARMS = (*PLAIN, *DISTILLED)


def _questions() -> tuple[Question, ...]:
    labels = {arm.name: arm.label for arm in ARMS}

    def against(arm: str, other: str) -> Question:
        return Question(f"{labels[arm]} against {labels[other]}", arm, other)

    kinds = [arm.name for arm in PLAIN if arm.group == "experts"]
    pairs = [(arm, other) for arm in kinds for other in ("full", "lora", "wings")]
    pairs += [("experts-mlp", "lora-mlp"), ("lora-mlp", "lora"), ("experts-mlp", "experts-seen")]
    pairs += [("experts-both", "experts-seen"), ("experts-both", "experts-image"), ("experts-wide", "experts-image")]
    pairs += [("experts-turn", "experts-seen"), ("experts-turn-wide", "experts-wide")]
    pairs += [("experts-image-128", "experts-image"), ("experts-image-128", "experts-wide")]
    pairs += [("full-tenth", "full"), ("full-replay", "full"), ("lora-replay", "lora"), ("lora", "full")]
    pairs += [
        ("wings-llm", "full-tenth"),
        ("wings-best", "wings"),
        ("wings-best", "full"),
        ("wings-best", "full-tenth"),
    ]
    pairs += [(arm.name, arm.name.removesuffix("-distill")) for arm in DISTILLED]
    pairs += [("full-distill", "full-replay"), ("lora-distill", "lora-replay")]
    pairs += [(f"{arm}-distill", "full") for arm in ("experts-seen", "experts-both", "experts-mlp")]
    return tuple(against(*pair) for pair in pairs)


FRONTIER = Ablation(
    name="frontier",
    title="Every word and full sight?",
    arms=ARMS,
    questions=_questions(),
    columns=(
        Column("text_bare", "text bare: kept", "text bare", "bare text", kept=True),
        Column("text_after_image", "behind an image: kept", "text behind an image", "text behind an image", kept=True),
        Column("dialogue", "in dialogues: kept", "text in dialogues", "text in dialogues", kept=True, kind="text"),
        Column("visual", "visual skill: right", "visual skill", "visual skill"),
        Column("visual_unseen", "unseen combinations: right", "unseen combinations", "unseen combinations"),
    ),
    groups={
        "ways": "Ways of tuning",
        "wings": "Wings",
        "experts": "Experts",
        "distill": "Held to the base's words",
    },
    references={
        "wings": ("full", "full-tenth", "lora"),
        "experts": ("full", "lora", "wings"),
        "distill": ("full", "full-replay", "lora-replay"),
    },
)
