"""Training an arm, and measuring it: how well held-out captions are told by their own item, and by another's."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from alula.data import Collator
from alula.files import write_json
from alula.hosts.stops import stop_ids
from alula.loading import load_model
from alula.media import MEDIA
from alula.training import train
from studies.passes import held_out
from studies.universal.plan import ARMS, UniversalPlan

_BATCH = 32


def train_first(plan: UniversalPlan, seed: int) -> None:
    """Align images alone."""
    train(plan.first(seed), quiet=True)


def measure_arm(plan: UniversalPlan, seed: int, arm: str) -> None:
    """Train an arm's models and measure them; what was done before is left as it is."""
    path = plan.measured(seed, arm)
    if path.is_file():
        return
    found: dict[str, Any] = {}
    for name, media in ARMS[arm].models(arm, plan.captions).items():
        train(plan.recipe_of(seed, arm, name), quiet=True)
        found |= {medium: told(plan, str(plan.model(seed, name)), medium) for medium in media}
    write_json(path, found)


@torch.no_grad()
def told(plan: UniversalPlan, directory: str, medium: str) -> dict[str, list[float]]:
    """Loss of each held-out caption of a medium, in nats per token: behind its own item, and behind another's."""
    model, processor = load_model(directory)
    collator = Collator(processor, stops=stop_ids(model, processor.tokenizer))
    samples = held_out(plan.captions[medium], plan.items, plan.task_seed)
    keyword = MEDIA[medium].inputs[0]
    found: dict[str, list[float]] = {"own": [], "others": []}
    for start in range(0, len(samples), _BATCH):
        batch = dict(collator(samples[start : start + _BATCH]))
        labels = batch.pop("labels")
        for item in found:
            shown = batch[keyword] if item == "own" else batch[keyword].roll(1, dims=0)
            logits = model(**{**batch, keyword: shown}).logits
            found[item] += caption_losses(logits, labels).tolist()
    return found


def caption_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean loss over the tokens that are to be told: logits (B, S, V), labels (B, S) with -100 elsewhere -> (B,)."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
    return losses.sum(dim=1) / (labels[:, 1:] != -100).sum(dim=1)
