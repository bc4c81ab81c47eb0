"""Raising the fledgling's eyes: a SigLIP-shaped tower trained on the microworld's pictures.

Two objectives share the tower. *Contrastive*, as in SigLIP (Zhai et al., 2023): the pooled picture is matched with its
caption, read by a small text encoder, by a sigmoid over all pairs of the batch. *Dense*: from the row of the patch a
thing is centred in, linear heads tell what it is (as towers trained with captions or self-distillation know it), from
the last hidden states and from the penultimate ones, which LLaVA reads. Pictures with unseen combinations of colour
and shape are never shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from alula.draws import Draw
from alula_fledgling.microworld.language import caption
from alula_fledgling.microworld.render import IMAGE_SIZE, centre_pixels, render_array
from alula_fledgling.microworld.scenes import (
    COLOURS,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    AnyScene,
    NumberScene,
    draw_number,
    draw_scene,
    split_of_scene,
)
from alula_fledgling.raising.muon import Muon
from alula_fledgling.raising.schooling import Progress, rate_factor

PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
MOST_THINGS = 5

OTHER_COLOURS = ("cyan", "pink", "brown", "grey")
"""Colours of some training pictures that no question names: shapes are learned apart from the six colours."""

ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "digit": tuple("0123456789")}
"""What is told of a patch; class 0 of each stands for "nothing of the kind is centred here"."""

_UNSEEN = tuple(sorted(UNSEEN_PAIRS))
_OTHER_PAIRS = tuple((colour, shape) for colour in OTHER_COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class TowerPlan:
    """Size of the tower's upbringing.

    Attributes:
        steps: optimiser steps.
        batch_size: pictures in a step.
        numbers: share of pictures that show a number.
        others: share of the scenes in colours that no question names.
        contrast: weight of the contrastive loss beside the dense one.
    """

    steps: int = 1000
    batch_size: int = 96
    matrix_lr: float = 0.02
    other_lr: float = 0.004
    warmup: float = 0.03
    decay: float = 0.5
    numbers: float = 0.35
    others: float = 0.3
    contrast: float = 0.5


def tower_config() -> SiglipVisionConfig:
    """A small SigLIP vision tower: 25 patches of 8 pixels."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )


def pictures(split: str, *, seed: int, numbers: float, others: float = 0.0) -> Iterator[AnyScene]:
    """Scenes and numbers of ``split`` ("train", "test" or "unseen") without end.

    Args:
        numbers: share of pictures that show a number.
        others: share of the training scenes whose things have colours no question names.
    """
    position = 0
    while True:
        draw = Draw("pictures", split, seed, position)
        position += 1
        scene: AnyScene
        if draw.chance(numbers):
            scene = draw_number(draw)
        else:
            first = draw.choice(_UNSEEN) if split == "unseen" else None
            scene = draw_scene(
                draw, draw.between(1, MOST_THINGS), pairs=SEEN_PAIRS, alike=draw.chance(0.3), first=first
            )
        new = split == "unseen" and not isinstance(scene, NumberScene)
        if new or split_of_scene(scene) == ("train" if split == "train" else "test"):
            yield scene


def patch_labels(scene: AnyScene) -> dict[str, np.ndarray]:
    """Per attribute the classes (GRID * GRID,) int64 of the patches; 0 where nothing of the kind is centred."""
    labels = {name: np.zeros(GRID * GRID, dtype=np.int64) for name in ATTRIBUTES}
    for patch, thing in _contents(scene):
        for name, value in thing.items():
            if value in ATTRIBUTES[name]:
                labels[name][patch] = 1 + ATTRIBUTES[name].index(value)
    return labels


def _contents(scene: AnyScene) -> list[tuple[int, dict[str, str]]]:
    """The patch each thing or digit is centred in, and its attributes."""
    if isinstance(scene, NumberScene):
        return [
            (y // PATCH_SIZE * GRID + x // PATCH_SIZE, {"digit": digit})
            for digit, (x, y) in zip(scene.digits, centre_pixels(scene), strict=True)
        ]
    # the outer rows and columns of the three by three grid are centred in the outer patches, the middle in the middle
    return [
        (2 * thing.row * GRID + 2 * thing.column, {"colour": thing.colour, "shape": thing.shape, "size": thing.size})
        for thing in scene.things
    ]


def pixels(scenes: list[AnyScene]) -> torch.Tensor:
    """Pixels (B, 3, H, W) float32 in -1..1, as the tower's image processor gives them."""
    array = np.stack([render_array(scene) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class _TextEncoder(nn.Module):
    """Caption ids (B, L) -> (B, width): one transformer layer over words and places, averaged."""

    def __init__(self, vocabulary: int, width: int, longest: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(longest, width) * 0.02)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = self.layer(self.words(ids) + self.places[: ids.shape[1]], src_key_padding_mask=~mask)
        return (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class _Upbringing(nn.Module):
    """The tower with everything that is thrown away once it is raised."""

    def __init__(self, config: SiglipVisionConfig, vocabulary: int, longest: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.tower = SiglipVisionModel(config)
        self.text = _TextEncoder(vocabulary, width, longest)
        self.temperature = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-5.0))
        self.heads = nn.ModuleList(
            nn.ModuleDict(
                {
                    "present": nn.Linear(width, 2),
                    **{name: nn.Linear(width, 1 + len(values)) for name, values in ATTRIBUTES.items()},
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, pixel_values: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contrastive and dense loss of a batch."""
        seen = self.tower(pixel_values, output_hidden_states=True)
        image = F.normalize(seen.pooler_output.float(), dim=-1)
        text = F.normalize(self.text(ids, mask).float(), dim=-1)
        logits = image @ text.T * self.temperature.exp() + self.bias
        signs = 2 * torch.eye(len(image), device=logits.device) - 1
        contrast = -F.logsigmoid(signs * logits).sum(-1).mean()
        dense = logits.new_zeros(())
        for rows, heads in zip((seen.last_hidden_state, self.norm(seen.hidden_states[-2])), self.heads, strict=True):
            for name, head in cast(nn.ModuleDict, heads).items():
                told = labels[name].flatten()
                if name != "present":  # asked only where there is something of the kind
                    told = torch.where(told > 0, told, -100)
                dense = dense + F.cross_entropy(head(rows).float().flatten(0, 1), told)
        return contrast, dense


def raise_tower(
    tokenizer: PreTrainedTokenizerFast,
    plan: TowerPlan,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> SiglipVisionModel:
    """Raise a vision tower from nothing; float32, evaluation mode, on ``device``."""
    torch.manual_seed(seed)
    longest = 64
    model = _Upbringing(tower_config(), len(tokenizer), longest).to(device).train()
    inside = [p for n, p in model.named_parameters() if n.startswith("tower.") and p.ndim == 2 and "embedding" not in n]
    chosen = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = [
        Muon(inside, lr=plan.matrix_lr, weight_decay=0.02, dtype=dtype),
        torch.optim.AdamW(others, lr=plan.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    source = pictures("train", seed=seed, numbers=plan.numbers, others=plan.others)
    for step in range(plan.steps):
        factor = rate_factor(step, plan.steps, plan.warmup, plan.decay)
        for optimiser, rate in zip(optimisers, (plan.matrix_lr, plan.other_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        scenes = [next(source) for _ in range(plan.batch_size)]
        words = tokenizer(
            [f" {caption(scene)}" for scene in scenes], return_tensors="pt", padding=True, padding_side="right"
        )
        ids, mask = words["input_ids"][:, :longest].to(device), words["attention_mask"][:, :longest].bool().to(device)
        labels = {name: values.to(device) for name, values in _stacked_labels(scenes).items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            contrast, dense = model(pixels(scenes).to(device), ids, mask, labels)
            loss = dense + plan.contrast * contrast
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, plan.steps, {"contrast": contrast.item(), "dense": dense.item()})
    return model.tower.eval()


@torch.inference_mode()
def probe_tower(
    tower: SiglipVisionModel, *, num_images: int, seed: int, layer: int = -2, ridge: float = 1.0
) -> dict[str, dict[str, float]]:
    """Linear probes on frozen patch rows: what of a picture can be read off the rows a connector gets.

    For every attribute a ridge regression to one-hot classes is fitted on the rows of training pictures' patches where
    something is centred and read by argmax at such patches; ``present`` tells these patches from all others.

    Args:
        num_images: pictures to fit on; half as many are read per split.
        layer: index into the tower's hidden states.

    Returns:
        split ("test", "unseen") -> attribute -> accuracy in 0..1.
    """
    rows, labels = _rows_and_labels(tower, "train", num_images, seed, layer)
    mean, scale = rows.mean(0), rows.std(0) + 1e-6
    weights = {}
    for name, values in labels.items():
        there = _asked(name, values)
        design = _design((rows[there] - mean) / scale)
        gram = design.T @ design + ridge * torch.eye(design.shape[1], dtype=torch.float64)
        weights[name] = torch.linalg.solve(gram, design.T @ F.one_hot(values[there]).double())
    result: dict[str, dict[str, float]] = {}
    for split in ("test", "unseen"):
        rows, labels = _rows_and_labels(tower, split, num_images // 2, seed + 1, layer)
        design = _design((rows - mean) / scale)
        result[split] = {}
        for name, values in labels.items():
            there = _asked(name, values)
            read = (design[there] @ weights[name]).argmax(-1)
            result[split][name] = (read == values[there]).double().mean().item()
    return result


def _asked(name: str, values: torch.Tensor) -> torch.Tensor:
    """The patches an attribute is asked of: all for ``present``, else those with something of the kind."""
    return torch.ones_like(values, dtype=torch.bool) if name == "present" else values > 0


def _design(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1).double()


def _rows_and_labels(
    tower: SiglipVisionModel, split: str, count: int, seed: int, layer: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    source = pictures(split, seed=seed + 1_000_003, numbers=0.3)
    scenes = [next(source) for _ in range(count)]
    device = tower.device
    rows = [
        tower(pixels(scenes[first : first + 256]).to(device), output_hidden_states=True).hidden_states[layer].cpu()
        for first in range(0, count, 256)
    ]
    return torch.cat(rows).flatten(0, 1), {name: values.flatten() for name, values in _stacked_labels(scenes).items()}


def _stacked_labels(scenes: Sequence[AnyScene]) -> dict[str, torch.Tensor]:
    """Labels of all pictures, (B, patches) int64 each, and ``present``: 1 where a thing or digit is centred."""
    told = [patch_labels(scene) for scene in scenes]
    labels = {name: torch.from_numpy(np.stack([one[name] for one in told])) for name in ATTRIBUTES}
    labels["present"] = ((labels["shape"] > 0) | (labels["digit"] > 0)).long()
    return labels
