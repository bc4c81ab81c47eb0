"""The examination every fledgling sits: its language model's answers, and what its tower's rows tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)

import alula_fledgling as fledgling
from alula.hosts.directories import locate
from alula_fledgling.raising.schooling import Progress
from alula_fledgling.raising.scoring import CONDITIONS, score_text
from alula_fledgling.raising.tower import probe_tower
from alula_fledgling.weights import check_whole

SEED = 20_261_120
"""Of the examination's items, so that fledglings of all seeds sit the same one."""

_PROBED_IMAGES = 1000


def examine(
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tower: SiglipVisionModel,
    *,
    num_items: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score both parts.

    Args:
        num_items: held-out text items per family and condition.
        progress: told of every finished condition.

    Returns:
        ``text``: condition -> mean, lowest, families (accuracies in 0..1) and items_per_family; ``tower_probe``: split
        -> attribute -> accuracy.
    """
    text: dict[str, Any] = {}
    for place, condition in enumerate(CONDITIONS):
        scores = score_text(llm, tokenizer, num_items=num_items, seed=SEED, condition=condition)
        text[condition] = {
            "mean": round(scores.mean, 4),
            "lowest": round(scores.lowest, 4),
            "families": {family: round(value, 4) for family, value in scores.families.items()},
            "items_per_family": num_items,
        }
        if progress is not None:
            progress(place + 1, len(CONDITIONS), {condition: scores.mean})
    probes = probe_tower(tower, num_images=_PROBED_IMAGES, seed=SEED)
    rounded = {split: {name: round(value, 4) for name, value in one.items()} for split, one in probes.items()}
    return {"text": text, "tower_probe": rounded}


def examine_directory(
    directory: Path | None, *, num_items: int, device: torch.device, progress: Progress | None = None
) -> dict[str, Any]:
    """Examine the fledgling in ``directory`` (by default the one that ships with alula).

    Raises:
        HostError: it holds no fledgling, or one with a part missing or damaged.
    """
    folder = directory or fledgling.directory()
    check_whole(folder)
    for part in ("llm", "vision"):
        locate(folder / part, part)
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm", device_map=str(device))
    tower = SiglipVisionModel.from_pretrained(folder / "vision", device_map=str(device))
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    return examine(llm, tokenizer, tower, num_items=num_items, progress=progress)
