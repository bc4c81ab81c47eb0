"""Schooling of the fledgling's language model: next-token learning of answers over lessons."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from alula_fledgling.raising.curriculum import DRILLED, SHARES, Curriculum, Lessons, lessons
from alula_fledgling.raising.head_start import give_head_start
from alula_fledgling.raising.muon import Muon
from alula_fledgling.raising.tokenizer import END, IMAGE, PAD, token_id

Progress = Callable[[int, int, dict[str, float]], None]
"""Called after each step with the steps done, all steps, and figures to show."""


@dataclass(frozen=True)
class Phase:
    """A part of the schooling: one curriculum for a share of the steps.

    Attributes:
        share: of all steps.
        curriculum: what the lessons are made of.
        batch_size: lessons in a step.
    """

    share: float
    curriculum: Curriculum
    batch_size: int


@dataclass(frozen=True)
class Schooling:
    """The plan of the schooling.

    Attributes:
        steps: optimiser steps.
        layers: of the decoder.
        phases: short lessons of separate texts first, with drills, then without; dialogues with distractions last.
        matrix_lr: learning rate of the weight matrices (Muon).
        other_lr: learning rate of embeddings and norms (AdamW).
        warmup: share of the steps over which the rates rise.
        decay: share of the steps at the end over which they fall to zero.
    """

    steps: int = 3000
    layers: int = 6
    phases: tuple[Phase, ...] = (
        Phase(0.1, Curriculum(length=96, apart=True, distraction=0.0, shares=DRILLED), batch_size=24),
        Phase(0.55, Curriculum(length=96, apart=True, distraction=0.0, shares=SHARES), batch_size=24),
        Phase(0.35, Curriculum(length=144, distraction=0.3, shares=SHARES), batch_size=16),
    )
    matrix_lr: float = 0.01
    other_lr: float = 0.004
    weight_decay: float = 0.02
    warmup: float = 0.15
    decay: float = 0.5


def language_model_config(tokenizer: PreTrainedTokenizerFast, layers: int = Schooling.layers) -> Qwen3Config:
    """A small Qwen3: grouped queries, heads that are not width / heads wide, norms on queries and keys."""
    eos, pad = token_id(tokenizer, END), token_id(tokenizer, PAD)
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def school(
    tokenizer: PreTrainedTokenizerFast,
    plan: Schooling,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Qwen3ForCausalLM:
    """Raise a language model from nothing; float32, evaluation mode, on ``device``."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(language_model_config(tokenizer, plan.layers)).train()
    fused = model.config._attn_implementation
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # for rows so short the fused kernel's backward pass is slower
    give_head_start(model, seed)
    nn.Module.to(model, device)
    generator = torch.Generator().manual_seed(seed)
    image_id = token_id(tokenizer, IMAGE)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=plan.matrix_lr, weight_decay=plan.weight_decay, dtype=dtype),
        torch.optim.AdamW(others, lr=plan.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    batches = _batches(tokenizer, plan, seed)
    for step, batch in enumerate(batches):
        factor = rate_factor(step, plan.steps, plan.warmup, plan.decay)
        for optimiser, rate in zip(optimisers, (plan.matrix_lr, plan.other_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        ids, labels, weights, positions = (
            torch.from_numpy(each).to(device) for each in (batch.ids, batch.labels, batch.weights, batch.positions)
        )
        places, answers, weights = answer_places(labels, weights)
        rows = foreign_tokens(model.get_input_embeddings(), ids, image_id, generator)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            # transformers keeps texts apart whose positions start again
            hidden = model.model(inputs_embeds=rows, position_ids=positions, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.flatten(0, 1)[places])
        losses = F.cross_entropy(logits.float(), answers, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)  # gradients keep their memory
        if progress is not None:
            progress(step + 1, plan.steps, {"loss": loss.item()})
    model.set_attn_implementation(fused)
    return model.eval()


def _batches(tokenizer: PreTrainedTokenizerFast, plan: Schooling, seed: int) -> Iterator[Lessons]:
    """The lessons of all steps, phase after phase."""
    done = 0
    for number, phase in enumerate(plan.phases):
        until = (
            plan.steps
            if phase is plan.phases[-1]
            else round(plan.steps * sum(p.share for p in plan.phases[: number + 1]))
        )
        source = lessons(tokenizer, phase.curriculum, seed=seed * 100 + number, batch_size=phase.batch_size)
        yield from itertools.islice(source, until - done)
        done = until


def rate_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Linear rise, a plateau, linear fall: the share of the full learning rate at ``step``."""
    done = (step + 1) / steps
    return min(1.0, (step + 1) / max(1.0, steps * warmup), (1 - done + 1 / steps) / decay)


def answer_places(
    labels: torch.Tensor, weights: torch.Tensor, share: float = 0.4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where answers are predicted: flat positions, the tokens that follow and their weights, each (B * L * share,).

    Their number is the same for every batch, filled up with ignored ones (or cut), so that all batches
    allocate tensors of the same sizes and memory is reused as it is.

    Args:
        labels: (B, L), -100 where nothing is to be learned.
        weights: (B, L) of the labels.
    """
    batch, length = labels.shape
    following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    places = torch.argsort(following == -100, stable=True)[: int(batch * length * share)]
    return places, following[places], F.pad(weights[:, 1:], (0, 1)).flatten()[places]


def foreign_tokens(embeddings: nn.Module, ids: torch.Tensor, image_id: int, generator: torch.Generator) -> torch.Tensor:
    """Embed ``ids`` (B, L) as (B, L, d), with vectors that are no word's wherever the image token stands.

    Such a vector is noise, plus a mix of three words, plus a part shared by the lesson, at a random length: what rows
    of an unknown tower may look like.
    """
    weight: torch.Tensor = embeddings.weight  # type: ignore[assignment]
    batch, length = ids.shape
    with torch.no_grad():
        width, rms = weight.shape[1], weight.pow(2).mean().sqrt()
        mix = torch.rand(batch, 1, 3, generator=generator).to(weight)
        gain = torch.empty(batch, 1, 1).uniform_(-1.0, 1.5, generator=generator).exp().to(weight)
        shared = torch.randn(batch, 1, width, generator=generator).to(weight)
        vectors = torch.randn(batch, length, width, generator=generator).to(weight).mul_(mix[..., :1] * rms)
        for _ in range(3):
            words = torch.randint(weight.shape[0], (batch, length), generator=generator).to(weight.device)
            vectors.addcmul_(F.embedding(words, weight), mix[..., 1:2])
        vectors.add_(shared * mix[..., 2:] * rms).mul_(gain)
    return torch.where((ids == image_id)[..., None], vectors, embeddings(ids))
