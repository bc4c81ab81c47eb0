"""The arms: the same conversations with their pictures and without, by three ways of tuning, and by kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

STEPS, STEPS_OF_KIND = 80, 40
"""of every training on all conversations, 2,560 of them, and on one kind of them"""
RATE = 2e-3
"""that every part is trained at; the published runs, too, have one rate for all ways of tuning"""
RANK = 64
"""of LoRA, the published one"""

Way = Literal["full", "lora", "lora-ends"]
WAYS: Mapping[Way, str] = {
    "full": "full tuning",
    "lora": "LoRA",
    "lora-ends": "LoRA, embeddings and head",
}
"""ways of tuning; the last is what the published "LoRA" runs did"""
KINDS: Mapping[str, tuple[str, ...]] = {
    "all": (),
    "caption": ("caption",),
    "question": ("colour", "shape", "position", "existence", "digits"),
    "reasoning": ("relation", "count"),
}
"""kinds of conversation -> families of the microworld's visual questions: LLaVA's descriptions, conversations and
reasoning (comparing, counting); all of them in turn"""


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        way: of tuning, a key of `WAYS`.
        kind: of conversation, a key of `KINDS`.
        sees: whether the pictures are shown; otherwise the words alone are trained on.
    """

    way: Way
    kind: str
    sees: bool

    @property
    def name(self) -> str:
        """Under which it is kept, and asked for."""
        return "-".join([self.way, *([] if self.kind == "all" else [self.kind]), "visual" if self.sees else "text"])

    @property
    def label(self) -> str:
        """Its name for people."""
        kind = "" if self.kind == "all" else f", {self.kind}s" if self.kind != "reasoning" else ", reasoning"
        return f"{WAYS[self.way]}{kind}, {'with pictures' if self.sees else 'words alone'}"

    @property
    def pair(self) -> str:
        """What it shares with the arm that differs in the pictures alone."""
        return self.name.removesuffix("-visual").removesuffix("-text")

    @property
    def recipe(self) -> str:
        """The packaged recipe it is made from."""
        return "full" if self.way == "full" else "lora"

    @property
    def changes(self) -> dict[str, Any]:
        """Keys of the recipe that it changes. The projector is trained where there is something for it to do."""
        parts = {"full": ("llm",), "lora": ("lora",), "lora-ends": ("lora", "embeddings")}[self.way]
        trained = (*parts, "projector") if self.sees else parts
        source: dict[str, Any] = {"microworld": "visual", "split": "train"}
        if KINDS[self.kind]:
            source["families"] = list(KINDS[self.kind])
        if not self.sees:
            source["text_only"] = True
        settings = {} if self.way == "full" else {"stages.0.lora": {"rank": RANK, "embeddings": "embeddings" in parts}}
        return {
            "stages.0.train": dict.fromkeys(trained, RATE),
            "stages.0.data.sources": [source],
            "stages.0.steps": STEPS if self.kind == "all" else STEPS_OF_KIND,
            **settings,
        }


ARMS = (
    *(Arm(way, "all", sees) for way in WAYS for sees in (True, False)),
    *(Arm("full", kind, sees) for kind in KINDS if kind != "all" for sees in (True, False)),
)
